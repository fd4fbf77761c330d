"""Masked cross-attention: both paths against the reference, whose keys and values are written out."""

from typing import Any

import pytest
import torch
from torch import Tensor

from bench.launches import launches
from fsr_fast.kernels.cross_attention import (
    masked_cross_attention,
    masked_cross_attention_backward_op,
    masked_cross_attention_op,
)
from fsr_fast.reference.attention import masked_cross_attention as reference
from tests.kernels.helpers import (
    assert_close,
    assert_low_precision,
    compile_backend,
    converted,
    gradients,
    permuted,
)

MODES = ("exclude", "multiply", "none")
SHAPES = ((2, 37, 24, 3), (1, 5, 48, 2), (3, 70, 40, 5))  # B, N, D, heads
LONG, WIDE = (1, 530, 36, 2), (1, 9, 300, 2)  # more than one step of every loop over parts, columns, summands
VECTORS = ("norm_weight", "norm_bias", "q_bias", "k_bias", "v_bias", "proj_bias")
MATRICES = ("q_weight", "k_weight", "v_weight", "proj_weight")


def arguments(
    B: int, N: int, D: int, dtype: torch.dtype = torch.float32, device: torch.device | str = "cpu", mean: float = 0.5
) -> tuple[dict[str, Tensor], Tensor]:
    """Tensors by argument name, leaves that require a gradient, and a mask that covers all of the last image."""
    generator = torch.Generator().manual_seed(B * N + D)

    def draw(*shape: int, scale: float = 1.0, shift: float = 0.0) -> Tensor:
        values = torch.randn(*shape, generator=generator, dtype=torch.float64) * scale + shift
        return values.to(dtype).to(device).requires_grad_()

    tensors = {"class_token": draw(B, D), "tokens": draw(B, N, D, scale=2.0, shift=mean)}
    tensors |= {name: draw(D, scale=0.3, shift=1.0 if name == "norm_weight" else 0.0) for name in VECTORS}
    tensors |= {name: draw(D, D, scale=D**-0.5) for name in MATRICES}
    mask = torch.rand(B, N, generator=generator) < 0.4
    mask[-1] |= B > 1
    return tensors, mask.to(device)


def run(function: Any, tensors: dict[str, Tensor], mask: Tensor | None, **options: Any) -> list[Tensor]:
    """Output, attention and all gradients."""
    output, attention = function(mask=mask, **tensors, **options, return_attention=True)
    return [output, attention, *gradients(output, tensors.values())]


def last_place(tensor: Tensor, dtype: torch.dtype) -> float:
    """Half a unit in the last place of the largest value, if it were rounded to ``dtype``."""
    return tensor.abs().max().item() * torch.finfo(dtype).eps / 2


def names(tensors: dict[str, Tensor]) -> list[str]:
    return ["output", "attention", *tensors]


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("mode", MODES)
@pytest.mark.usefixtures("torch_path")
def test_torch_path_equals_reference(mode: str, dtype: torch.dtype) -> None:
    for B, N, D, heads in SHAPES:
        tensors, mask = arguments(B, N, D, dtype)
        ours = run(masked_cross_attention, tensors, mask, heads=heads, mask_mode=mode)
        truth = run(reference, converted(tensors, torch.float64), mask, heads=heads, mask_mode=mode)
        for name, actual, expected in zip(names(tensors), ours, truth, strict=True):
            if name != "k_bias" or mode == "multiply":
                assert_close(actual, expected, label=f"{name} {(B, N, D, heads)}")


@pytest.mark.parametrize(
    ("shape", "mode"),
    [
        (SHAPES[0], "exclude"),
        (SHAPES[0], "none"),
        (SHAPES[1], "exclude"),
        (SHAPES[2], "multiply"),
        (LONG, "exclude"),
        (WIDE, "exclude"),
    ],
)
def test_kernels_equal_reference(shape: tuple[int, int, int, int], mode: str, triton_device: torch.device) -> None:
    B, N, D, heads = shape
    tensors, mask = arguments(B, N, D, device=triton_device)
    ours = run(masked_cross_attention, tensors, mask, heads=heads, mask_mode=mode)
    truth = run(reference, converted(tensors, torch.float64), mask, heads=heads, mask_mode=mode)
    for name, actual, expected in zip(names(tensors), ours, truth, strict=True):
        if name != "k_bias" or mode == "multiply":
            assert_close(actual, expected, label=name)


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.usefixtures("torch_path")
def test_gradients_are_those_of_finite_differences(mode: str) -> None:
    tensors, mask = arguments(2, 4, 6, torch.float64)
    keys = list(tensors)

    def function(*values: Tensor) -> Tensor:
        given = dict(zip(keys, values, strict=True))
        return masked_cross_attention(mask=mask, **given, heads=2, mask_mode=mode)

    assert torch.autograd.gradcheck(function, tuple(tensors.values()))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("mode", ["exclude", "multiply"])
def test_rounding_is_no_worse_than_torch_s(mode: str, dtype: torch.dtype, path: torch.device) -> None:
    tensors, mask = arguments(2, 45, 48, dtype, path)
    options = {"heads": 3, "mask_mode": mode}
    ours = run(masked_cross_attention, tensors, mask, **options)
    low = run(reference, tensors, mask, **options)
    truth = run(reference, converted(tensors, torch.float32), mask, **options)
    assert ours[0].dtype == dtype
    for name, actual, rounded, expected in zip(names(tensors), ours, low, truth, strict=True):
        assert_low_precision(actual, rounded, expected, last_place(expected, dtype), label=name)


def test_autocast_is_followed(path: torch.device) -> None:
    tensors, mask = arguments(2, 45, 48, device=path)
    with torch.autocast(path.type, torch.bfloat16):
        ours = masked_cross_attention(mask=mask, **tensors, heads=3)
        low = reference(mask=mask, **tensors, heads=3)
    truth = reference(mask=mask, **tensors, heads=3)
    assert ours.dtype == torch.bfloat16
    assert_low_precision(ours, low, truth, label="output")
    results = [gradients(output.float(), tensors.values()) for output in (ours, low, truth)]
    for name, actual, rounded, expected in zip(tensors, *results, strict=True):
        assert actual.dtype == torch.float32
        assert_low_precision(actual, rounded, expected, last_place(expected, torch.bfloat16), label=name)


def test_an_all_masked_row_is_answered_with_the_bias(path: torch.device) -> None:
    tensors, mask = arguments(2, 19, 24, device=path)
    output, attention, *found = run(masked_cross_attention, tensors, mask, heads=3)
    gradient = dict(zip(tensors, found, strict=True))
    assert torch.equal(output[1], tensors["proj_bias"])
    assert not attention[1].any()
    assert not gradient["tokens"][1].any()
    assert not gradient["class_token"][1].any()
    assert gradient["tokens"][0].any()


def test_the_key_bias_has_a_zero_gradient_where_it_cancels(path: torch.device) -> None:
    tensors, mask = arguments(2, 19, 24, device=path)
    for mode in MODES:
        output = masked_cross_attention(mask=mask, **tensors, heads=3, mask_mode=mode)
        (gradient,) = torch.autograd.grad(output.sum(), [tensors["k_bias"]])
        assert bool(gradient.any()) == (mode == "multiply")


def test_biases_and_mask_may_be_absent(triton_device: torch.device) -> None:
    tensors, mask = arguments(2, 19, 24, device=triton_device)
    tensors = {
        name: tensor for name, tensor in tensors.items() if name not in ("q_bias", "k_bias", "v_bias", "proj_bias")
    }
    absent = dict.fromkeys(("q_bias", "k_bias", "v_bias", "proj_bias"))
    for given, mode in ((mask, "exclude"), (mask, "multiply"), (None, "exclude")):
        ours = run(masked_cross_attention, tensors, given, heads=3, mask_mode=mode, **absent)
        expected = run(reference, tensors, given, heads=3, mask_mode=mode, **absent)
        for name, value, truth in zip(names(tensors), ours, expected, strict=True):
            assert_close(value, truth, label=f"{name} {mode}")


def test_tokens_with_a_large_mean_are_normalised_exactly(triton_device: torch.device) -> None:
    tensors, mask = arguments(2, 37, 24, device=triton_device, mean=50.0)
    ours = masked_cross_attention(mask=mask, **tensors, heads=3)
    truth = reference(mask=mask, **converted(tensors, torch.float64), heads=3)
    assert_close(ours, truth, 3e-5)  # the mean alone costs 25 units of the last place of the deviation


def test_kernels_save_nothing_of_the_size_of_the_tokens(triton_device: torch.device) -> None:
    tensors, mask = arguments(2, 64, 48, device=triton_device)
    saved: list[Tensor] = []

    def pack(tensor: Tensor) -> Tensor:
        saved.append(tensor)
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        masked_cross_attention(mask=mask, **tensors, heads=3)
    inputs = {tensor.untyped_storage().data_ptr() for tensor in tensors.values()}
    ours = [tensor for tensor in saved if tensor.untyped_storage().data_ptr() not in inputs]
    assert ours
    assert max(tensor.numel() for tensor in ours) < tensors["tokens"].numel() // 2


def test_a_block_under_autocast_takes_few_launches(triton_device: torch.device) -> None:
    tensors, mask = arguments(2, 9, 24, device=triton_device)
    with torch.autocast(triton_device.type, torch.bfloat16), launches() as forward:
        output = masked_cross_attention(mask=mask, **tensors, heads=3)
    gradient = torch.ones_like(output)
    with launches() as backward:
        torch.autograd.grad(output, list(tensors.values()), gradient)
    around = ["projection_kernel", "projection_kernel"]
    assert forward == ["native_layer_norm", *around, "attend_kernel", "combine_kernel", *around]
    assert len(backward) == 26, backward


def test_attention_carries_no_gradient(triton_device: torch.device) -> None:
    tensors, mask = arguments(2, 9, 24, device=triton_device)
    _, attention = masked_cross_attention(mask=mask, **tensors, heads=3, return_attention=True)
    assert attention.dtype == torch.float32
    assert not attention.requires_grad
    assert_close(attention.sum(dim=-1)[0], torch.ones(3, device=triton_device))


@pytest.mark.parametrize("mode", ["exclude", "multiply"])
def test_operators_pass_opcheck_on_permuted_layouts(mode: str, triton_device: torch.device) -> None:
    tensors, mask = arguments(2, 7, 24, device=triton_device)
    order = [f"{name}_{kind}" for name in ("norm", "q", "k", "v", "proj") for kind in ("weight", "bias")]
    given = [permuted(tensors[name].detach()).requires_grad_() for name in ("class_token", "tokens", *order)]
    given.insert(2, permuted(mask))
    torch.library.opcheck(masked_cross_attention_op, (*given, 3, mode, 1e-6, torch.float32))
    given = [tensor.detach() for tensor in given]
    output, *kept = masked_cross_attention_op(*given, 3, mode, 1e-6, torch.float32)
    backward = (permuted(torch.ones_like(output)), *given, *kept, mode, torch.float32)
    torch.library.opcheck(masked_cross_attention_backward_op, backward)


def test_permuted_tokens_give_the_same_result(triton_device: torch.device) -> None:
    tensors, mask = arguments(2, 19, 24, device=triton_device)
    plain = run(masked_cross_attention, tensors, mask, heads=3)
    tensors["tokens"] = permuted(tensors["tokens"])
    mask = permuted(mask)
    for actual, expected in zip(run(masked_cross_attention, tensors, mask, heads=3), plain, strict=True):
        assert torch.equal(actual, expected)


def test_compiles_without_graph_breaks(path: torch.device) -> None:
    tensors, mask = arguments(2, 19, 24, device=path)
    compiled = torch.compile(masked_cross_attention, fullgraph=True, backend=compile_backend(path))
    ours = run(compiled, tensors, mask, heads=3)
    for actual, expected in zip(ours, run(masked_cross_attention, tensors, mask, heads=3), strict=True):
        assert_close(actual, expected)


@pytest.mark.parametrize(
    ("changed", "error", "message"),
    [
        ({"class_token": torch.zeros(2, 11)}, ValueError, r"class_token must be \(B,D\)"),
        ({"tokens": torch.zeros(2, 0, 12)}, ValueError, "at least one patch"),
        ({"mask": torch.zeros(2, 9)}, TypeError, "mask .* is float32; expected bool"),
        ({"mask": torch.zeros(2, 8, dtype=torch.bool)}, ValueError, r"mask must be \(2,9\)"),
        ({"heads": 5}, ValueError, "heads must divide the width 12"),
        ({"mask_mode": "drop"}, ValueError, "mask_mode must be one of"),
        ({"v_weight": torch.zeros(12, 11)}, ValueError, r"v_weight must be \(12, 12\)"),
        ({"norm_bias": torch.zeros(11)}, ValueError, r"norm_bias must be \(12,\)"),
        ({"tokens": torch.zeros(2, 9, 12, dtype=torch.int64)}, TypeError, "tokens is int64"),
        ({"k_weight": torch.zeros(12, 12, device="meta")}, ValueError, "k_weight is on meta"),
    ],
)
def test_bad_input_is_refused_in_one_line(changed: dict[str, Any], error: type[Exception], message: str) -> None:
    tensors, mask = arguments(2, 9, 12)
    with pytest.raises(error, match=message) as caught:
        masked_cross_attention(**({"mask": mask, "heads": 3} | tensors | changed))
    assert "\n" not in str(caught.value)


def test_kernels_refuse_float64(triton_device: torch.device) -> None:
    tensors, mask = arguments(2, 9, 12, torch.float64, triton_device)
    with pytest.raises(TypeError, match="tokens is float64"):
        masked_cross_attention(mask=mask, **tensors, heads=3)
