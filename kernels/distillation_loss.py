"""Cross-entropy from the teacher's to the student's prototype distribution, without K-wide logits kept for backward.

Triton: the forward pass merges the parts of the online softmax; the backward pass computes the logits' gradient of as
many prototypes as fit a fixed workspace, and two library products take it from there. CPU: the forward pass takes the
gradients of a block of rows while its logits are at hand. All sums have a fixed order.
"""

import torch
import torch.nn.functional as F
from torch import Tensor

from .dispatch import FEATURE_DTYPES, device_guard, require_dtype, require_same_device, triton, use_triton
from .prototype_softmax import LAUNCH, TILES_PER_PROGRAM, block_sizes, forward_kernel, logit_gradient_kernel

_BLOCK = 2**22  # logits held at a time on a CPU
_WORKSPACE = 2**24  # gradients of logits held at a time on a GPU: 32 MiB in bf16, which stays in the L2 cache
_TINY = 1e-30


@torch.library.custom_op("fsr::distillation_rows", mutates_args=())
def distillation_rows(
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
    (M, E), K = student.shape, directions.shape[0]
    blocks = block_sizes(E, student.dtype)
    splits = triton.cdiv(K, TILES_PER_PROGRAM * blocks["BLOCK_K"])
    parts = student.new_empty((3, splits, M), dtype=torch.float32)
    tensors = [x.contiguous() for x in (student, directions, teacher, teacher_directions, centre)]
    with device_guard(student):
        forward_kernel[(triton.cdiv(M, blocks["BLOCK_M"]), splits)](
            *tensors,
            teacher_temperature,
            parts,
            1 / student_temperature,
            M,
            K,
            splits,
            E,
            TILES_PER_PROGRAM,
            **blocks,
            **LAUNCH,
        )
    log_sums = parts[:2].logsumexp(dim=1)
    cross = ((parts[1] - log_sums[1]).exp() * parts[2]).sum(dim=0)
    return log_sums[0] - cross, log_sums


@distillation_rows.register_fake
def _(student, directions, teacher, teacher_directions, centre, teacher_temperature, student_temperature):
    M = student.shape[0]
    return student.new_empty(M, dtype=torch.float32), student.new_empty((2, M), dtype=torch.float32)


@torch.library.custom_op("fsr::distillation_rows_backward", mutates_args=())
def distillation_rows_backward(
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
    """Differentiate :func:`distillation_rows`; its arguments and results are documented there.

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
    (M, E), K = student.shape, directions.shape[0]
    blocks = block_sizes(E, student.dtype)
    largest = gradient.abs().amax().clamp(min=_TINY)  # keeps the gradient of a logit inside the range of fp16
    factor = gradient / largest
    tensors = [x.contiguous() for x in (student, directions, teacher, teacher_directions, centre)]
    student_gradient = student.new_zeros((M, E), dtype=torch.float32)
    directions_gradient = directions.new_empty((K, E))
    step = max(1, _WORKSPACE // (M * blocks["BLOCK_K"])) * blocks["BLOCK_K"]
    for first in range(0, K, step):
        stop = min(first + step, K)
        logit_gradient = student.new_empty((M, stop - first))
        with device_guard(student):
            logit_gradient_kernel[(triton.cdiv(M, blocks["BLOCK_M"]), triton.cdiv(stop - first, blocks["BLOCK_K"]))](
                *tensors, teacher_temperature, log_sums, factor, logit_gradient, 1 / student_temperature,
                first, stop, M, E, **blocks, **LAUNCH,
            )  # fmt: skip
        student_gradient += logit_gradient @ tensors[1][first:stop]
        torch.mm(logit_gradient.T, tensors[0], out=directions_gradient[first:stop])
    scale = largest / student_temperature
    return (student_gradient * scale).to(student.dtype), directions_gradient.mul_(scale)


@distillation_rows_backward.register_fake
def _(gradient, log_sums, student, directions, *_):
    return student.new_empty(student.shape), directions.new_empty(directions.shape)


def _setup(ctx, inputs, output):
    *tensors, ctx.student_temperature = inputs
    ctx.save_for_backward(output[1], *tensors)
    ctx.mark_non_differentiable(output[1])


def _backward(ctx, gradient, _):
    gradients = distillation_rows_backward(gradient.contiguous(), *ctx.saved_tensors, ctx.student_temperature)
    return *gradients, *([None] * 5)


distillation_rows.register_autograd(_backward, setup_context=_setup)


class _RowBlocks(torch.autograd.Function):
    """Loss and gradient of a block of rows from the same logits: nothing is kept and nothing computed twice."""

    @staticmethod
    def forward(ctx, student, directions, weight, teacher, teacher_directions, centre, temperatures, with_gradient):
        student_temperature, teacher_temperature = temperatures
        wide = weight.dtype
        losses = torch.empty_like(weight)
        largest = weight.abs().amax().clamp(min=_TINY)  # keeps the gradient of a logit inside the range of fp16
        factor = weight / (largest * student_temperature)
        student_gradient = torch.empty_like(student) if with_gradient else None
        directions_gradient = torch.zeros_like(directions, dtype=wide) if with_gradient else None
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
        ctx.save_for_backward(losses, largest, student_gradient, directions_gradient)
        return torch.dot(losses, weight)

    @staticmethod
    def backward(ctx, gradient):
        losses, largest, student_gradient, directions_gradient = ctx.saved_tensors
        factor = largest * gradient
        directions_gradient = (directions_gradient * factor).to(student_gradient.dtype)
        return student_gradient * factor, directions_gradient, losses * gradient, *([None] * 5)


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
) -> Tensor:
    """Cross-entropy between the teacher's and the student's distribution over prototypes.

    Args:
        student: (M,E) fp32, bf16, fp16 (fp64 on the torch path), L2-normalised bottleneck vectors, used as given.
        teacher: (M,E), the teacher's, used as given; no gradient.
        student_head: (K,E), prototype directions; each row is L2-normalised here (weight normalisation with gain 1).
        teacher_head: (K,E), the teacher's; no gradient.
        centre: (K,), running mean of the teacher's logits; no gradient.
        student_temperature: > 0.
        teacher_temperature: > 0, a number, or a 0-d tensor, which is not checked, since that would wait for the GPU.
        weight: (M,), weight of each row, or None for the mean over the rows.

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
    directions = F.normalize(student_head.to(wide), dim=1).to(dtype)
    with torch.no_grad():
        teacher_directions = F.normalize(teacher_head.to(wide), dim=1).to(dtype)
    inputs = student.to(dtype), directions, teacher.detach().to(dtype), teacher_directions, centre.detach().to(wide)
    if use_triton(student):
        require_dtype("distillation_loss: student", student, FEATURE_DTYPES)
        if not isinstance(teacher_temperature, Tensor):
            teacher_temperature = torch.full((), teacher_temperature, device=device)
        losses, _ = distillation_rows(*inputs, teacher_temperature.to(device, torch.float32), student_temperature)
        return losses.mean() if weight is None else (losses * weight.to(wide)).sum()
    if weight is None:
        weight = student.new_full((student.shape[0],), 1 / student.shape[0], dtype=wide)
    with_gradient = torch.is_grad_enabled() and any(t.requires_grad for t in (student, directions, weight))
    temperatures = student_temperature, teacher_temperature
    return _RowBlocks.apply(*inputs[:2], weight.to(wide), *inputs[2:], temperatures, with_gradient)
