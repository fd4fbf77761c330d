"""Student and teacher softmax over the prototypes, tile by tile: the Triton kernels of the distillation loss.

The logits of a tile come from two matrix products side by side and live only in registers. Forward: each program walks
over a few tiles with an online softmax of both. Backward: the tiles are recomputed. Logits carry log2 e beside their
temperature, so that an exponential is a single instruction. Where a multiprocessor has the room, the rows of a program
stay in its shared memory: read again for every tile, they would be two thirds of what the L2 cache has to deliver.
"""

import math
from collections.abc import Iterator, Sequence

import torch
from torch import Tensor

from .dispatch import CompileCase, device_guard, dot, next_power_of_2, tl, triton

PROTOTYPES = 256  # that one program walks over
_WORKSPACE = 2**24  # gradients of logits held at a time on a GPU: 32 MiB in bf16, which stays in the L2 cache
_TINY = 1e-30
LOG2_E = tl.constexpr(math.log2(math.e))


# --- kernels


@triton.jit
def _load_rows(rows, m, start, M, E: tl.constexpr, BLOCK_E: tl.constexpr):
    """Columns from `start` of the rows `m` of (M,E), (BLOCK_M, BLOCK_E); 0 outside."""
    e = start + tl.arange(0, BLOCK_E)
    inside = (m < M)[:, None] & (e < E)[None, :]
    return tl.load(rows + m.to(tl.int64)[:, None] * E + e[None, :], mask=inside, other=0.0)


@triton.jit
def _tile_logits(
    student_rows, teacher_rows, student, directions, teacher, teacher_directions, centre, student_scale, teacher_scale,
    m, k, M, K, E: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_K: tl.constexpr, BLOCK_E: tl.constexpr,
):  # fmt: skip
    """Logits of a tile times the scales, (BLOCK_M, BLOCK_K) each; hugely negative beyond the last prototype.

    The given rows are the first BLOCK_E columns of student and teacher; more are loaded here if there are any.
    """
    student_logits = tl.zeros([BLOCK_M, BLOCK_K], tl.float32)
    teacher_logits = tl.zeros([BLOCK_M, BLOCK_K], tl.float32)
    for start in range(0, E, BLOCK_E):
        e = start + tl.arange(0, BLOCK_E)
        inside = (k < K)[None, :] & (e < E)[:, None]
        here = k.to(tl.int64)[None, :] * E + e[:, None]
        if E > BLOCK_E:
            student_rows = _load_rows(student, m, start, M, E, BLOCK_E)
        student_logits = dot(student_rows, tl.load(directions + here, mask=inside, other=0.0), student_logits)
        if E > BLOCK_E:
            teacher_rows = _load_rows(teacher, m, start, M, E, BLOCK_E)
        teacher_logits = dot(teacher_rows, tl.load(teacher_directions + here, mask=inside, other=0.0), teacher_logits)
    c = tl.load(centre + k, mask=k < K, other=0.0) * teacher_scale
    beyond = tl.where(k < K, 0.0, -1e30)
    return student_logits * student_scale + beyond[None, :], teacher_logits * teacher_scale + (beyond - c)[None, :]


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
    student_scale *= LOG2_E
    teacher_scale = LOG2_E / tl.load(teacher_temperature)
    student_rows = _load_rows(student, m, 0, M, E, BLOCK_E)
    teacher_rows = _load_rows(teacher, m, 0, M, E, BLOCK_E)
    student_peak = tl.full([BLOCK_M], float("-inf"), tl.float32)
    teacher_peak = tl.full([BLOCK_M], float("-inf"), tl.float32)
    student_sum = tl.zeros([BLOCK_M], tl.float32)
    teacher_sum = tl.zeros([BLOCK_M], tl.float32)
    weighted = tl.zeros([BLOCK_M], tl.float32)
    for tile in range(split * TILES, tl.minimum(split * TILES + TILES, tl.cdiv(K, BLOCK_K))):
        k = tile * BLOCK_K + tl.arange(0, BLOCK_K)
        s, t = _tile_logits(
            student_rows, teacher_rows, student, directions, teacher, teacher_directions, centre, student_scale,
            teacher_scale, m, k, M, K, E, BLOCK_M, BLOCK_K, BLOCK_E,
        )  # fmt: skip
        peak = tl.maximum(student_peak, tl.max(s, 1))
        student_sum = student_sum * tl.exp2(student_peak - peak) + tl.sum(tl.exp2(s - peak[:, None]), 1)
        student_peak = peak
        peak = tl.maximum(teacher_peak, tl.max(t, 1))
        shrink = tl.exp2(teacher_peak - peak)
        p = tl.exp2(t - peak[:, None])
        teacher_sum = teacher_sum * shrink + tl.sum(p, 1)
        weighted = weighted * shrink + tl.sum(p * s, 1)
        teacher_peak = peak
    part = parts + split.to(tl.int64) * M + m
    size = tl.cast(splits, tl.int64) * M  # Triton specialises a 1 to a constant, which has no .to
    tl.store(part, (student_peak + tl.log2(student_sum)) / LOG2_E, mask=m < M)
    tl.store(part + size, (teacher_peak + tl.log2(teacher_sum)) / LOG2_E, mask=m < M)
    tl.store(part + 2 * size, weighted / (teacher_sum * LOG2_E), mask=m < M)


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
    TILES: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_K: tl.constexpr,
    BLOCK_E: tl.constexpr,
):
    """factor · (softmax of the student - softmax of the teacher) for TILES tiles of the prototypes first..stop-1."""
    m = tl.program_id(0) * BLOCK_M + tl.arange(0, BLOCK_M)
    student_scale *= LOG2_E
    teacher_scale = LOG2_E / tl.load(teacher_temperature)
    student_rows = _load_rows(student, m, 0, M, E, BLOCK_E)
    teacher_rows = _load_rows(teacher, m, 0, M, E, BLOCK_E)
    for tile in range(TILES):
        k = first + (tl.program_id(1) * TILES + tile) * BLOCK_K + tl.arange(0, BLOCK_K)
        s, t = _tile_logits(
            student_rows, teacher_rows, student, directions, teacher, teacher_directions, centre, student_scale,
            teacher_scale, m, k, M, stop, E, BLOCK_M, BLOCK_K, BLOCK_E,
        )  # fmt: skip
        student_log_sum = tl.load(log_sums + m, mask=m < M, other=float("inf")) * LOG2_E
        teacher_log_sum = tl.load(log_sums + M + m, mask=m < M, other=float("inf")) * LOG2_E
        weight = tl.load(factor + m, mask=m < M, other=0.0)
        difference = tl.exp2(s - student_log_sum[:, None]) - tl.exp2(t - teacher_log_sum[:, None])
        here = m.to(tl.int64)[:, None] * (stop - first) + (k - first)[None, :]
        tl.store(output + here, difference * weight[:, None], mask=(m < M)[:, None] & (k < stop)[None, :])


# --- launch


def launch_options(E: int, dtype: torch.dtype, shared_bytes: int) -> dict[str, int]:
    """Choose the tiles, the same for every number of rows and prototypes.

    Args:
        E: bottleneck width.
        dtype: of the matrix products; in fp32 they take three passes and more registers.
        shared_bytes: shared memory that a program may use.

    Returns:
        Block sizes, warps and stages by argument name. BLOCK_E < E: the rows are read again for every tile.
    """
    width = max(16, next_power_of_2(E))
    if dtype == torch.float32:
        return {"BLOCK_M": 64, "BLOCK_K": 64, "BLOCK_E": min(32, width), "num_warps": 8, "num_stages": 3}
    if 4 * width * (128 + 2 * 32) + 2**14 <= shared_bytes:  # rows and two tiles of both sides, and the results
        return {"BLOCK_M": 128, "BLOCK_K": 32, "BLOCK_E": width, "num_warps": 8, "num_stages": 2}
    return {"BLOCK_M": 128, "BLOCK_K": 64, "BLOCK_E": min(64, width), "num_warps": 8, "num_stages": 3}


def _options(student: Tensor) -> dict[str, int]:
    """The options on the device of `student` (M,E); the interpreter has no limit."""
    shared_bytes = 2**20
    if student.is_cuda:
        properties = torch.cuda.get_device_properties(student.device)
        shared_bytes = properties.shared_memory_per_block_optin  # type: ignore[attr-defined]  # not in torch's stubs
    return launch_options(student.shape[1], student.dtype, shared_bytes)


def _backward_tiles(E: int, options: dict[str, int]) -> int:
    """Tiles of a program of the backward pass, which gains from several only if its rows stay."""
    return PROTOTYPES // options["BLOCK_K"] if options["BLOCK_E"] >= E else 1


def launch_rows(
    sides: Sequence[Tensor], teacher_temperature: Tensor, student_temperature: float
) -> tuple[Tensor, Tensor]:
    """Results of ``fsr::distillation_rows``, whose first five tensors are `sides`."""
    tensors = [one.contiguous() for one in sides]
    student, directions = tensors[:2]
    (M, E), K = student.shape, directions.shape[0]
    options = _options(student)
    splits = triton.cdiv(K, PROTOTYPES)
    parts = student.new_empty((3, splits, M), dtype=torch.float32)
    with device_guard(student):
        forward_kernel[(triton.cdiv(M, options["BLOCK_M"]), splits)](
            *tensors, teacher_temperature, parts, 1 / student_temperature,
            M, K, splits, E, TILES=PROTOTYPES // options["BLOCK_K"], **options,
        )  # fmt: skip
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
    options = _options(student)
    tiles = _backward_tiles(E, options)
    factor, largest = gradient / student_temperature, None
    if student.dtype == torch.float16:  # keeps the gradient of a logit inside its range
        largest = factor.abs().amax().clamp(min=_TINY)
        factor = factor / largest
    products = []
    directions_gradient = directions.new_empty((K, E))
    step = max(1, _WORKSPACE // (M * options["BLOCK_K"])) * options["BLOCK_K"]
    for first in range(0, K, step):
        stop = min(first + step, K)
        logit_gradient = student.new_empty((M, stop - first))
        with device_guard(student):
            grid = triton.cdiv(M, options["BLOCK_M"]), triton.cdiv(stop - first, tiles * options["BLOCK_K"])
            logit_gradient_kernel[grid](
                *tensors, teacher_temperature, log_sums, factor, logit_gradient, 1 / student_temperature,
                first, stop, M, E, TILES=tiles, **options,
            )  # fmt: skip
        products.append(logit_gradient @ directions[first:stop])
        torch.mm(logit_gradient.T, student, out=directions_gradient[first:stop])
    student_gradient = products[0] if len(products) == 1 else torch.stack(products).sum(0)
    if largest is None:
        return student_gradient, directions_gradient
    return student_gradient * largest, directions_gradient.mul_(largest)


def compile_cases() -> Iterator[CompileCase]:
    """List the shipped configurations (E = 256; K is not a constant) for the ahead-of-time compile test.

    Yields:
        Both kernels in each dtype, with rows that stay and with rows that are read again; bf16 for every target.
    """
    fp32 = ("centre", "teacher_temperature", "parts", "log_sums", "factor")
    types = dict.fromkeys(fp32, "*fp32") | dict.fromkeys(("M", "splits"), "i32") | {"student_scale": "fp32"}
    types |= dict.fromkeys(("K", "first", "stop"), "i32:16")
    names = {torch.bfloat16: "bf16", torch.float16: "fp16", torch.float32: "fp32"}
    for dtype, kibibytes in ((torch.bfloat16, 227), (torch.bfloat16, 99), (torch.float16, 227), (torch.float32, 99)):
        features = ("student", "directions", "teacher", "teacher_directions", "output")
        named = types | dict.fromkeys(features, f"*{names[dtype]}")
        options = launch_options(256, dtype, kibibytes * 1024)
        for kernel in (forward_kernel, logit_gradient_kernel):
            backward = kernel is logit_gradient_kernel
            tiles = _backward_tiles(256, options) if backward else PROTOTYPES // options["BLOCK_K"]
            constants = {"E": 256, "TILES": tiles} | options
            yield CompileCase(
                f"{kernel.__name__.removesuffix('_kernel')} {names[dtype]} E=256 {kibibytes} KiB",
                kernel,
                {name: named[name] for name in kernel.arg_names if name in named},
                {name: constants[name] for name in kernel.arg_names if name in constants},
                options["num_warps"],
                options["num_stages"],
                main=dtype == torch.bfloat16,
                least=90 if kibibytes == 227 else 80,
            )
