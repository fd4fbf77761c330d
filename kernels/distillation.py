"""Cross-entropy from the teacher's to the student's prototype distribution, without K-wide logits kept for backward.

Triton: the forward pass merges the parts of the online softmax; the backward pass computes the logits' gradient of as
many prototypes as fit a fixed workspace, and two library products do the rest. CPU: the forward pass computes the
gradients of a block of rows while its logits are at hand. All sums have a fixed order.
"""

import torch
import torch.nn.functional as F
from torch import Tensor

from .dispatch import FEATURE_DTYPES, require_dtype, require_same_device, use_triton
from .distillation_kernels import launch_rows, launch_rows_backward

_BLOCK = 2**22  # logits held at a time on a CPU
_TINY = 1e-30


# --- torch path


def _blocks_torch(sides, weight, teacher_temperature, student_temperature, with_gradient):
    """Loss and gradient of a block of rows from the same logits, which are neither kept nor computed twice."""
    student, directions, teacher, teacher_directions, centre = sides
    wide = weight.dtype
    losses = torch.empty_like(weight)
    largest = weight.abs().amax().clamp(min=_TINY)  # keeps the gradient of a logit inside the range of fp16
    factor = weight / (largest * student_temperature)
    student_gradient = student.new_empty(student.shape if with_gradient else 0)
    directions_gradient = directions.new_zeros(directions.shape if with_gradient else 0, dtype=wide)
    step = max(1, _BLOCK // directions.shape[0])
    for start in range(0, student.shape[0], step):
        rows = slice(start, start + step)
        target = (teacher[rows] @ teacher_directions.T).to(wide)
        target = target.sub_(centre).div_(teacher_temperature).softmax(dim=1)
        logits = (student[rows] @ directions.T).to(wide).div_(student_temperature)
        log_sum = logits.logsumexp(dim=1)
        losses[rows] = log_sum - torch.linalg.vecdot(target, logits)
        if with_gradient:
            gradient = logits.sub_(log_sum[:, None]).exp_().sub_(target)
            gradient = gradient.mul_(factor[rows, None]).to(student.dtype)
            torch.mm(gradient, directions, out=student_gradient[rows])
            directions_gradient += gradient.T @ student[rows]
    return torch.dot(losses, weight), losses, largest, student_gradient, directions_gradient


# --- registration


@torch.library.custom_op("fsr::distillation_rows", mutates_args=())
def distillation_rows_op(
    student: Tensor,
    directions: Tensor,
    teacher: Tensor,
    teacher_directions: Tensor,
    centre: Tensor,
    teacher_temperature: Tensor,
    student_temperature: float,
) -> tuple[Tensor, Tensor]:
    """Compute the cross-entropy of each row; differentiable in the first two arguments.

    Args:
        student: (M,E) fp32, bf16 or fp16.
        directions: (K,E), same dtype, unit rows.
        teacher: (M,E), same dtype.
        teacher_directions: (K,E), same dtype, unit rows.
        centre: (K,) fp32.
        teacher_temperature: 0-d fp32.
        student_temperature: > 0.

    Returns:
        Losses (M,) fp32, and the log-sum-exp of student and teacher (2,M) fp32, which carries no gradient.

    Source: Eq. 8, 9.
    """
    sides = student, directions, teacher, teacher_directions, centre
    return launch_rows(sides, teacher_temperature, student_temperature)


@distillation_rows_op.register_fake
def _(student, *_):
    M = student.shape[0]
    return student.new_empty(M, dtype=torch.float32), student.new_empty((2, M), dtype=torch.float32)


@torch.library.custom_op("fsr::distillation_rows_backward", mutates_args=())
def distillation_rows_backward_op(
    gradient: Tensor,
    log_sums: Tensor,
    student: Tensor,
    directions: Tensor,
    teacher: Tensor,
    teacher_directions: Tensor,
    centre: Tensor,
    teacher_temperature: Tensor,
    student_temperature: float,
) -> tuple[Tensor, Tensor]:
    """Differentiate :func:`distillation_rows_op`; its arguments and results are documented there.

    Args:
        gradient: (M,) fp32, of the rows' losses.
        log_sums: (2,M) fp32, second result of the forward pass.
        student: as in the forward pass.
        directions: likewise.
        teacher: likewise.
        teacher_directions: likewise.
        centre: likewise.
        teacher_temperature: likewise.
        student_temperature: likewise.

    Returns:
        Gradients of student (M,E) and directions (K,E).

    Source: Eq. 8, 9.
    """
    sides = student, directions, teacher, teacher_directions, centre
    return launch_rows_backward(gradient, log_sums, sides, teacher_temperature, student_temperature)


@distillation_rows_backward_op.register_fake
def _(gradient, log_sums, student, directions, *_):
    return student.new_empty(student.shape), directions.new_empty(directions.shape)


@torch.library.custom_op("fsr::distillation_blocks", mutates_args=())
def distillation_blocks_op(
    student: Tensor,
    directions: Tensor,
    weight: Tensor,
    teacher: Tensor,
    teacher_directions: Tensor,
    centre: Tensor,
    teacher_temperature: Tensor,
    student_temperature: float,
    with_gradient: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """Weighted sum of the rows' losses on the torch path; arguments as in :func:`distillation_rows_op`.

    Differentiable in student, directions and weight (M,); ``with_gradient`` says whether gradients are needed.

    Returns:
        Loss (), losses (M,), largest weight (), and the gradients of student (M,E) and directions (K,E) divided by it,
        empty if not needed. Only the first carries a gradient.
    """
    sides = student, directions, teacher, teacher_directions, centre
    return _blocks_torch(sides, weight, teacher_temperature, student_temperature, with_gradient)


@distillation_blocks_op.register_fake
def _(student, directions, weight, *others):
    shapes = (student.shape, directions.shape) if others[-1] else (0, 0)
    scalars = weight.new_empty(()), weight.new_empty(weight.shape), weight.new_empty(())
    return *scalars, student.new_empty(shapes[0]), directions.new_empty(shapes[1], dtype=weight.dtype)


# --- autograd


def _setup_context(ctx, inputs, output):
    *tensors, ctx.student_temperature = inputs
    ctx.save_for_backward(output[1], *tensors)
    ctx.mark_non_differentiable(output[1])
    ctx.set_materialize_grads(False)  # for that output it would fill a tensor with zeros


def _backward(ctx, gradient, _):
    if gradient is None:
        return (None,) * 7
    gradients = distillation_rows_backward_op(gradient, *ctx.saved_tensors, ctx.student_temperature)
    return *gradients, *([None] * 5)


distillation_rows_op.register_autograd(_backward, setup_context=_setup_context)


def _setup_blocks_context(ctx, inputs, output):
    ctx.save_for_backward(*output[1:])
    ctx.mark_non_differentiable(*output[1:])
    ctx.set_materialize_grads(False)  # for those outputs it would fill tensors with zeros


def _backward_blocks(ctx, gradient, *_):
    if gradient is None:
        return (None,) * 9
    losses, largest, student_gradient, directions_gradient = ctx.saved_tensors
    factor = largest * gradient
    directions_gradient = (directions_gradient * factor).to(student_gradient.dtype)
    return student_gradient * factor, directions_gradient, losses * gradient, *([None] * 6)


distillation_blocks_op.register_autograd(_backward_blocks, setup_context=_setup_blocks_context)


# --- public function


def distillation_loss(
    student: Tensor,
    teacher: Tensor,
    student_head: Tensor,
    teacher_head: Tensor,
    centre: Tensor,
    *,
    student_temperature: float = 0.1,
    teacher_temperature: float | Tensor = 0.04,
    weight: Tensor | None = None,
    normalise_heads: bool = True,
) -> Tensor:
    """Cross-entropy between the teacher's and the student's distribution over prototypes.

    Args:
        student: (M,E) fp32, bf16, fp16 (fp64 on the torch path), L2-normalised bottleneck vectors, used as given.
        teacher: (M,E), the teacher's, used as given; no gradient.
        student_head: (K,E), prototype directions; each row is L2-normalised (weight normalisation with gain 1).
        teacher_head: (K,E), the teacher's; no gradient.
        centre: (K,), running mean of the teacher's logits; no gradient.
        student_temperature: > 0.
        teacher_temperature: > 0, a number, or a 0-d tensor, which is not checked, since that would wait for the GPU.
        weight: (M,), weight of each row, or None for the mean over the rows.
        normalise_heads: False: the rows of both heads have length 1 already.

    Returns:
        0-d tensor, fp32 (fp64 for fp64 input): the mean of the rows' losses, or their weighted sum.

    Raises:
        ValueError: a shape or temperature is wrong, or the tensors are on different devices.
        TypeError: a tensor has a dtype that is not supported.

    Source: Eq. 8, 9.
    """
    _check(student, teacher, student_head, teacher_head, centre, weight)
    for name, value in (("student", student_temperature), ("teacher", teacher_temperature)):
        if not isinstance(value, Tensor) and value <= 0:
            raise ValueError(f"distillation_loss: {name}_temperature must be > 0, got {value}")
    wide = torch.promote_types(student.dtype, torch.float32)
    device = student.device
    dtype = torch.get_autocast_dtype(device.type) if torch.is_autocast_enabled(device.type) else student.dtype
    heads = student_head.to(wide), teacher_head.detach().to(wide)
    if normalise_heads:
        heads = F.normalize(heads[0], dim=1), F.normalize(heads[1], dim=1)
    directions, teacher_directions = heads[0].to(dtype), heads[1].to(dtype)
    inputs = student.to(dtype), directions, teacher.detach().to(dtype), teacher_directions, centre.detach().to(wide)
    if not isinstance(teacher_temperature, Tensor):
        teacher_temperature = torch.full((), teacher_temperature, dtype=wide, device=device)
    if use_triton(student):
        require_dtype("distillation_loss: student", student, FEATURE_DTYPES)
        losses, _ = distillation_rows_op(*inputs, teacher_temperature.to(device, torch.float32), student_temperature)
        return losses.mean() if weight is None else (losses * weight.to(wide)).sum()
    if weight is None:
        weight = student.new_full((student.shape[0],), 1 / student.shape[0], dtype=wide)
    with_gradient = torch.is_grad_enabled() and any(t.requires_grad for t in (student, directions, weight))
    settings = teacher_temperature, student_temperature, with_gradient
    return distillation_blocks_op(*inputs[:2], weight.to(wide), *inputs[2:], *settings)[0]


def _check(student, teacher, student_head, teacher_head, centre, weight) -> None:
    if student.ndim != 2 or student_head.ndim != 2 or 0 in student.shape or 0 in student_head.shape:
        raise ValueError(
            f"distillation_loss: student must be (M,E) and student_head (K,E), none of them empty, got "
            f"{tuple(student.shape)} and {tuple(student_head.shape)}"
        )
    (M, E), K = student.shape, student_head.shape[0]
    tensors = {"student": student, "teacher": teacher, "student_head": student_head, "teacher_head": teacher_head}
    tensors |= {"centre": centre} | ({} if weight is None else {"weight": weight})
    shapes = {"teacher": (M, E), "student_head": (K, E), "teacher_head": (K, E), "centre": (K,), "weight": (M,)}
    for name, tensor in tensors.items():
        if tensor.shape != shapes.get(name, tensor.shape):
            raise ValueError(f"distillation_loss: {name} must be {shapes[name]}, got {tuple(tensor.shape)}")
        require_dtype(f"distillation_loss: {name}", tensor, (*FEATURE_DTYPES, torch.float64))
    require_same_device(**tensors)
