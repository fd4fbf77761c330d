"""Launch every operation as on a GPU, up to the point where Triton has made IR of the kernels.

A launch makes a constant of every integer argument that is 1, which the table of `compile_cases` leaves out. No GPU is
needed: nothing is compiled further and nothing runs. ``python -m tests.kernels.lowering`` prints what cannot be
lowered, one JSON row each, and what was.
"""

import json
from collections import Counter
from typing import Any

from bench.fake_gpu import TARGET, admit_cpu_tensors  # before the kernels are defined

# isort: split
import torch
from torch import Tensor
from triton._C.libtriton import ir
from triton.compiler import ASTSource, make_backend
from triton.runtime.jit import JITFunction

from fsr_fast import kernels

SIZES = {"one of everything": (1, 1, 1), "odd": (2, 3, 5), "usual": (2, 4, 16)}
"""Images, classes, side of the patch grid."""
DTYPES = (torch.float32, torch.bfloat16)
GENERATOR = torch.Generator().manual_seed(0)


def numbers(*shape: int, dtype: torch.dtype = torch.float32, gradient: bool = False) -> Tensor:
    return torch.rand(shape, generator=GENERATOR).to(dtype).requires_grad_(gradient)


def launch_all(size: tuple[int, int, int], dtype: torch.dtype) -> None:
    """Call every operation once, forward and backward."""
    B, C, side = size
    N, D, heads, pixels = side * side, 16 * side, side, 4 * side
    labels, uniform, classes = torch.ones(B, C), numbers(B, N), numbers(C, D)
    features, gradient = numbers(B, N, D, dtype=dtype, gradient=True), {"dtype": dtype, "gradient": True}
    cams = [numbers(B, C, side, side, dtype=dtype) for _ in range(2)]
    images, maps = 255 * numbers(B, 3, pixels, pixels), numbers(B, C, pixels, pixels, **gradient)
    pixel_labels = torch.zeros(B, pixels, pixels, dtype=torch.uint8)
    mask = torch.zeros(B, N, dtype=torch.bool)

    losses = [kernels.affinity_sums(features, torch.zeros(B, N, dtype=torch.int64))]
    weights_of_sets = kernels.segmentation_counts(pixel_labels)
    losses.append(kernels.segmentation_sum(numbers(B, C + 1, side, side, **gradient), pixel_labels, weights_of_sets))
    losses.append(kernels.dense_energy(maps.float(), images, pixel_labels))
    for rows, prototypes in ((B, 64 * C), (B * N, 1024)):
        heads_of_both = numbers(prototypes, D, gradient=True), numbers(prototypes, D)
        vectors = numbers(rows, D, **gradient), numbers(rows, D, dtype=dtype)
        losses.append(kernels.distillation_loss(*vectors, *heads_of_both, numbers(prototypes)))
    weights = {f"{name}_weight": numbers(D, D, gradient=True) for name in ("q", "k", "v", "proj")}
    weights |= {f"{name}_bias": numbers(D, gradient=True) for name in ("q", "k", "v", "proj")}
    weights |= {"norm_weight": numbers(D, gradient=True), "norm_bias": numbers(D, gradient=True)}
    for mode in ("exclude", "multiply", "none"):
        token = numbers(B, D, gradient=True)
        losses.append(kernels.masked_cross_attention(token, features, mask, **weights, heads=heads, mask_mode=mode))
    sum(loss.float().sum() for loss in losses).backward()

    merged = kernels.merge_cams(cams, cams, labels, max_classes=C, size=(pixels, pixels))
    kernels.merge_cams(cams[:1], cams[:1], labels, max_classes=C + 1, size=(pixels, pixels), output_size=(side, side))
    classes_of_slots, live = torch.zeros_like(merged.classes), torch.ones_like(merged.live)
    size_twice = (2 * pixels, 2 * pixels)
    kernels.refine_pseudo_labels(images, merged.values, classes_of_slots, live, size=size_twice, dilations=(1, 2))
    kernels.pixel_adaptive_refinement(images, maps, iterations=2, dilations=(1,))
    for k in (1, N):
        kernels.uncertain_mask(features, classes, labels, uniform, k=k)
        kernels.uncertain_mask_from_cam(cams[0], labels, uniform, grid=(side, side), k=k)
        kernels.top_k_mask(uniform, k=k)
    kernels.top_k_mask(numbers(B, 1), k=1, grid=(side, side), block=side)
    steps, third = torch.ones(2, B, 4, 2, dtype=torch.float64), torch.full((3,), 0.3)
    views = images.to(torch.uint8).movedim(1, 3).expand(2, -1, -1, -1, -1)
    kernels.jitter_colours(views, steps, third, third)
    kernels.jitter_colours(views[:, :, :1, :1], steps, third, third)
    kernels.apply_policy(views, torch.ones(2, 2, B, 7, dtype=torch.float64), (1, 0, 0))
    kernels.dense_crf(numbers(B, C, pixels, pixels).softmax(1), images.to(torch.uint8), iterations=1)


def main() -> None:
    """Print what fails, and the number of specialisations of each kernel."""
    failures: dict[str, dict[str, Any]] = {}
    made: Counter[str] = Counter()
    found: set[tuple[str, str]] = set()
    case = ""

    def lower(kernel, key, signature, device, constants, options, attributes, warmup) -> None:
        if (kernel.__name__, key) in found:
            return
        found.add((kernel.__name__, key))
        backend, context = make_backend(TARGET), ir.context()
        ir.load_dialects(context)
        backend.load_dialects(context)
        functions = backend.get_codegen_implementation(options), backend.get_module_map()
        try:
            ASTSource(kernel, signature, constants, attributes).make_ir(TARGET, options, *functions, context)
        except Exception as error:  # whatever the front end meets
            what = {"kernel": kernel.__name__, "case": case, "error": str(error)[-600:], "signature": signature}
            failures.setdefault(kernel.__name__, what)
        made[kernel.__name__] += 1

    JITFunction._do_compile = lower
    admit_cpu_tensors()
    for name, size in SIZES.items():
        for dtype in DTYPES:
            case = f"{name}, {dtype}"
            launch_all(size, dtype)
    print(json.dumps({"failures": list(failures.values()), "made": made}))


if __name__ == "__main__":
    main()
