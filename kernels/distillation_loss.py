"""Cross-entropy from the teacher's to the student's prototype distribution, without K-wide logits kept for backward."""

import torch
import torch.nn.functional as F
from torch import Tensor

_BLOCK = 2**22  # logits held at a time on a CPU


def _wide(dtype: torch.dtype) -> torch.dtype:
    return torch.promote_types(dtype, torch.float32)


def _check(student, teacher, student_head, teacher_head, centre, weight, student_temperature) -> None:
    if student.ndim != 2 or student_head.ndim != 2 or 0 in student.shape or 0 in student_head.shape:
        raise ValueError(
            f"distillation_loss: student must be (M,E) and student_head (K,E), none of them empty, got "
            f"{tuple(student.shape)} and {tuple(student_head.shape)}"
        )
    (M, E), K = student.shape, student_head.shape[0]
    expected = {
        "teacher": (teacher, (M, E)),
        "student_head": (student_head, (K, E)),
        "teacher_head": (teacher_head, (K, E)),
        "centre": (centre, (K,)),
    }
    if weight is not None:
        expected["weight"] = (weight, (M,))
    for name, (tensor, shape) in expected.items():
        if tensor.shape != shape:
            raise ValueError(f"distillation_loss: {name} must be {shape}, got {tuple(tensor.shape)}")
    for name, tensor in {"student": student, **{name: tensor for name, (tensor, _) in expected.items()}}.items():
        if not tensor.is_floating_point():
            raise TypeError(f"distillation_loss: {name} must be floating point, got {tensor.dtype}")
    if student_temperature <= 0:
        raise ValueError(f"distillation_loss: student_temperature must be > 0, got {student_temperature}")


class _RowBlocks(torch.autograd.Function):
    """Loss and gradient of a block of rows from the same logits: nothing is kept and nothing computed twice."""

    @staticmethod
    def forward(ctx, student, directions, weight, teacher, teacher_directions, centre, temperatures, with_gradient):
        student_temperature, teacher_temperature = temperatures
        wide = weight.dtype
        losses = torch.empty_like(weight)
        largest = weight.abs().amax().clamp(min=1e-30)  # keeps the gradient of a logit inside the range of fp16
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
        student: (M,E), floating point, L2-normalised bottleneck vectors, used as given.
        teacher: (M,E), the teacher's, used as given; no gradient.
        student_head: (K,E), prototype directions; each row is L2-normalised here (weight normalisation with gain 1).
        teacher_head: (K,E), the teacher's; no gradient.
        centre: (K,), running mean of the teacher's logits; no gradient.
        student_temperature: > 0.
        teacher_temperature: > 0, number or 0-d tensor.
        weight: (M,), weight of each row, or None for the mean over the rows.

    Returns:
        0-d tensor, fp32 (fp64 for fp64 input): the mean of the rows' losses, or their weighted sum.

    Raises:
        ValueError: a shape or temperature is wrong.
        TypeError: a tensor is not floating point.

    Source: Eq. 8, 9.
    """
    _check(student, teacher, student_head, teacher_head, centre, weight, student_temperature)
    wide = _wide(student.dtype)
    device = student.device.type
    dtype = torch.get_autocast_dtype(device) if torch.is_autocast_enabled(device) else student.dtype
    directions = F.normalize(student_head.to(wide), dim=1).to(dtype)
    with torch.no_grad():
        teacher_directions = F.normalize(teacher_head.to(wide), dim=1).to(dtype)
    if weight is None:
        weight = student.new_full((student.shape[0],), 1 / student.shape[0], dtype=wide)
    with_gradient = torch.is_grad_enabled() and any(t.requires_grad for t in (student, directions, weight))
    return _RowBlocks.apply(
        student.to(dtype),
        directions,
        weight.to(wide),
        teacher.detach().to(dtype),
        teacher_directions,
        centre.detach().to(wide),
        (student_temperature, teacher_temperature),
        with_gradient,
    )
