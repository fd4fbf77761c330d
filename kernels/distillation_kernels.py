"""Student and teacher softmax over the prototypes, tile by tile: the Triton kernels of the distillation loss.

The logits of a tile come from two matrix products side by side and live only in registers. Forward: each program walks
over a few tiles with an online softmax of both. Backward: the tiles are recomputed.
"""

from collections.abc import Iterator, Sequence

import torch
from torch import Tensor

from .dispatch import CompileCase, device_guard, dot, next_power_of_2, tl, triton

TILES_PER_PROGRAM = 4  # tiles of prototypes that one program of the forward pass walks over
LAUNCH = {"num_warps": 8, "num_stages": 3}
_WORKSPACE = 2**24  # gradients of logits held at a time on a GPU: 32 MiB in bf16, which stays in the L2 cache
_TINY = 1e-30


# --- kernels


@triton.jit
def _tile_logits(
    student, directions, teacher, teacher_directions, centre, teacher_scale, student_scale, m, k, M, K,
    E: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_K: tl.constexpr, BLOCK_E: tl.constexpr,
):  # fmt: skip
    """Logits of a tile divided by their temperatures, (BLOCK_M, BLOCK_K) each; prototypes past the last are -inf."""
    student_logits = tl.zeros([BLOCK_M, BLOCK_K], tl.float32)
    teacher_logits = tl.zeros([BLOCK_M, BLOCK_K], tl.float32)
    rows, columns = m.to(tl.int64)[:, None] * E, k.to(tl.int64)[None, :] * E
    for start in range(0, E, BLOCK_E):
        e = start + tl.arange(0, BLOCK_E)
        row_inside = (m < M)[:, None] & (e < E)[None, :]
        column_inside = (k < K)[None, :] & (e < E)[:, None]
        s = tl.load(student + rows + e[None, :], mask=row_inside, other=0.0)
        d = tl.load(directions + columns + e[:, None], mask=column_inside, other=0.0)
        student_logits = dot(s, d, student_logits)
        t = tl.load(teacher + rows + e[None, :], mask=row_inside, other=0.0)
        d = tl.load(teacher_directions + columns + e[:, None], mask=column_inside, other=0.0)
        teacher_logits = dot(t, d, teacher_logits)
    c = tl.load(centre + k, mask=k < K, other=0.0)
    student_logits = tl.where((k < K)[None, :], student_logits * student_scale, float("-inf"))
    teacher_logits = tl.where((k < K)[None, :], (teacher_logits - c[None, :]) * teacher_scale, float("-inf"))
    return student_logits, teacher_logits


@triton.jit
def forward_kernel(
    student,  # (M,E)
    directions,  # (K,E), unit rows
    teacher,  # (M,E)
    teacher_directions,  # (K,E), unit rows
    centre,  # (K,) fp32
    teacher_temperature,  # () fp32
    parts,  # (3,splits,M) fp32: log-sum-exp of student, of teacher, and the teacher's mean of the student's logit
    student_scale,
    M,
    K,
    splits,
    E: tl.constexpr,
    TILES: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_K: tl.constexpr,
    BLOCK_E: tl.constexpr,
):
    """Both softmaxes of a block of rows over TILES tiles of prototypes, one after another, online."""
    m = tl.program_id(0) * BLOCK_M + tl.arange(0, BLOCK_M)
    split = tl.program_id(1)
    teacher_scale = 1.0 / tl.load(teacher_temperature)
    student_peak = tl.full([BLOCK_M], float("-inf"), tl.float32)
    teacher_peak = tl.full([BLOCK_M], float("-inf"), tl.float32)
    student_sum = tl.zeros([BLOCK_M], tl.float32)
    teacher_sum = tl.zeros([BLOCK_M], tl.float32)
    weighted = tl.zeros([BLOCK_M], tl.float32)
    for tile in range(split * TILES, tl.minimum(split * TILES + TILES, tl.cdiv(K, BLOCK_K))):
        k = tile * BLOCK_K + tl.arange(0, BLOCK_K)
        s, t = _tile_logits(
            student, directions, teacher, teacher_directions, centre, teacher_scale, student_scale, m, k, M, K,
            E, BLOCK_M, BLOCK_K, BLOCK_E,
        )  # fmt: skip
        peak = tl.maximum(student_peak, tl.max(s, 1))
        student_sum = student_sum * tl.exp(student_peak - peak) + tl.sum(tl.exp(s - peak[:, None]), 1)
        student_peak = peak
        peak = tl.maximum(teacher_peak, tl.max(t, 1))
        shrink = tl.exp(teacher_peak - peak)
        p = tl.exp(t - peak[:, None])
        teacher_sum = teacher_sum * shrink + tl.sum(p, 1)
        weighted = weighted * shrink + tl.sum(p * tl.where((k < K)[None, :], s, 0.0), 1)
        teacher_peak = peak
    part = parts + split.to(tl.int64) * M + m
    size = tl.cast(splits, tl.int64) * M  # Triton specialises a 1 to a constant, which has no .to
    tl.store(part, student_peak + tl.log(student_sum), mask=m < M)
    tl.store(part + size, teacher_peak + tl.log(teacher_sum), mask=m < M)
    tl.store(part + 2 * size, weighted / teacher_sum, mask=m < M)


@triton.jit
def logit_gradient_kernel(
    student,  # (M,E)
    directions,  # (K,E), unit rows
    teacher,  # (M,E)
    teacher_directions,  # (K,E), unit rows
    centre,  # (K,) fp32
    teacher_temperature,  # () fp32
    log_sums,  # (2,M) fp32: log-sum-exp of student and teacher
    factor,  # (M,) fp32
    output,  # (M,stop-first)
    student_scale,
    first,
    stop,
    M,
    E: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_K: tl.constexpr,
    BLOCK_E: tl.constexpr,
):
    """factor · (softmax of the student - softmax of the teacher) for a tile of the prototypes first..stop-1."""
    m = tl.program_id(0) * BLOCK_M + tl.arange(0, BLOCK_M)
    k = first + tl.program_id(1) * BLOCK_K + tl.arange(0, BLOCK_K)
    s, t = _tile_logits(
        student, directions, teacher, teacher_directions, centre, 1.0 / tl.load(teacher_temperature), student_scale,
        m, k, M, stop, E, BLOCK_M, BLOCK_K, BLOCK_E,
    )  # fmt: skip
    student_log_sum = tl.load(log_sums + m, mask=m < M, other=float("inf"))
    teacher_log_sum = tl.load(log_sums + M + m, mask=m < M, other=float("inf"))
    difference = tl.exp(s - student_log_sum[:, None]) - tl.exp(t - teacher_log_sum[:, None])
    difference *= tl.load(factor + m, mask=m < M, other=0.0)[:, None]
    here = m.to(tl.int64)[:, None] * (stop - first) + (k - first)[None, :]
    tl.store(output + here, difference, mask=(m < M)[:, None] & (k < stop)[None, :])


# --- launch


def block_sizes(E: int, dtype: torch.dtype) -> dict[str, int]:
    """Choose the tiles, the same for every number of rows and prototypes.

    Args:
        E: bottleneck width.
        dtype: of the matrix products; in fp32 they take three passes and more registers.

    Returns:
        The block sizes by argument name.
    """
    full = dtype == torch.float32
    BLOCK_E = min(32 if full else 64, max(16, next_power_of_2(E)))
    return {"BLOCK_M": 64 if full else 128, "BLOCK_K": 64, "BLOCK_E": BLOCK_E}


def launch_rows(
    sides: Sequence[Tensor], teacher_temperature: Tensor, student_temperature: float
) -> tuple[Tensor, Tensor]:
    """Results of ``fsr::distillation_rows``, whose first five tensors are `sides`."""
    tensors = [one.contiguous() for one in sides]
    student, directions = tensors[:2]
    (M, E), K = student.shape, directions.shape[0]
    blocks = block_sizes(E, student.dtype)
    splits = triton.cdiv(K, TILES_PER_PROGRAM * blocks["BLOCK_K"])
    parts = student.new_empty((3, splits, M), dtype=torch.float32)
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


def launch_rows_backward(
    gradient: Tensor,
    log_sums: Tensor,
    sides: Sequence[Tensor],
    teacher_temperature: Tensor,
    student_temperature: float,
) -> tuple[Tensor, Tensor]:
    """Results of ``fsr::distillation_rows_backward``, whose `sides` are those of :func:`launch_rows`."""
    tensors = [one.contiguous() for one in sides]
    student, directions = tensors[:2]
    (M, E), K = student.shape, directions.shape[0]
    blocks = block_sizes(E, student.dtype)
    largest = gradient.abs().amax().clamp(min=_TINY)  # keeps the gradient of a logit inside the range of fp16
    factor = gradient / largest
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
        student_gradient += logit_gradient @ directions[first:stop]
        torch.mm(logit_gradient.T, student, out=directions_gradient[first:stop])
    scale = largest / student_temperature
    return (student_gradient * scale).to(student.dtype), directions_gradient.mul_(scale)


def compile_cases() -> Iterator[CompileCase]:
    """List the shipped configurations (E = 256; K is not a constant) for the ahead-of-time compile test.

    Yields:
        Both kernels in each dtype; bf16 for every target.
    """
    fp32 = ("centre", "teacher_temperature", "parts", "log_sums", "factor")
    types = dict.fromkeys(fp32, "*fp32") | dict.fromkeys(("M", "splits"), "i32") | {"student_scale": "fp32"}
    types |= dict.fromkeys(("K", "first", "stop"), "i32:16")
    for kind, dtype in (("bf16", torch.bfloat16), ("fp16", torch.float16), ("fp32", torch.float32)):
        features = ("student", "directions", "teacher", "teacher_directions", "output")
        named = types | dict.fromkeys(features, f"*{kind}")
        constants = {"E": 256, "TILES": TILES_PER_PROGRAM} | block_sizes(256, dtype)
        for kernel in (forward_kernel, logit_gradient_kernel):
            yield CompileCase(
                f"{kernel.__name__.removesuffix('_kernel')} {kind} E=256",
                kernel,
                {name: named[name] for name in kernel.arg_names if name in named},
                {name: constants[name] for name in kernel.arg_names if name in constants},
                LAUNCH["num_warps"],
                LAUNCH["num_stages"],
                main=kind == "bf16",
            )
