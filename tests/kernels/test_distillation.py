"""Distillation loss: both paths against the reference, whose logits are all written out."""

from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from bench.launches import launches
from fsr_fast.kernels import distillation, distillation_kernels, distillation_loss
from fsr_fast.kernels.distillation import (
    distillation_blocks_op,
    distillation_rows_backward_op,
    distillation_rows_op,
)
from fsr_fast.reference.losses import distillation_loss as reference
from tests.kernels.helpers import (
    assert_close,
    assert_low_precision,
    compile_backend,
    converted,
    gradients,
    leaf,
    permuted,
)

SHAPES = ((5, 7, 11), (70, 20, 300), (3, 40, 65))  # M, E, K: several tiles of rows, of prototypes, of the width
LABELS = ("loss", "student", "student_head", "weight")


def arguments(
    M: int, E: int, K: int, dtype: torch.dtype = torch.float32, device: torch.device | str = "cpu"
) -> tuple[dict[str, Tensor], Tensor]:
    """The five tensors by name, of which student and student head require a gradient, and row weights that do."""
    generator = torch.Generator().manual_seed(M * E + K)

    def draw(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator, dtype=torch.float64)

    tensors = {
        "student": F.normalize(draw(M, E), dim=1),
        "teacher": F.normalize(draw(M, E), dim=1),
        "student_head": draw(K, E),
        "teacher_head": draw(K, E) * 3,
        "centre": draw(K) * 0.1,
    }
    tensors = {name: tensor.to(dtype).to(device) for name, tensor in tensors.items()}
    tensors["student"].requires_grad_()
    tensors["student_head"].requires_grad_()
    weight = torch.rand(M, generator=generator, dtype=torch.float64).to(dtype).to(device).requires_grad_()
    return tensors, weight


def run(function: Any, tensors: dict[str, Tensor], weight: Tensor | None, **options: Any) -> list[Tensor]:
    """Loss and the gradients of student, student head and, where given, weight."""
    loss = function(**tensors, weight=weight, **options)
    inputs = [tensors["student"], tensors["student_head"], *([] if weight is None else [weight])]
    return [loss, *gradients(loss, inputs)]


def check_against_reference(shape: tuple[int, int, int], dtype: torch.dtype, device: torch.device) -> None:
    tensors, weight = arguments(*shape, dtype, device)
    exact, exact_weight = converted(tensors, torch.float64), leaf(weight.double())
    for given, exact_given in ((None, None), (weight, exact_weight)):
        for temperature in (0.04, torch.tensor(0.07, device=device)):
            ours = run(distillation_loss, tensors, given, teacher_temperature=temperature)
            truth = run(reference, exact, exact_given, teacher_temperature=float(temperature))
            for name, actual, expected in zip(LABELS, ours, truth, strict=False):
                bound = (
                    1e-7 if isinstance(temperature, Tensor) and dtype == torch.float64 else None
                )  # a fp32 temperature
                assert_close(actual, expected, bound, label=f"{name} {shape}")


@pytest.mark.parametrize("shape", SHAPES)
def test_kernels_equal_reference(shape: tuple[int, int, int], triton_device: torch.device) -> None:
    check_against_reference(shape, torch.float32, triton_device)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.usefixtures("torch_path")
def test_torch_path_equals_reference(dtype: torch.dtype) -> None:
    for shape in SHAPES:
        check_against_reference(shape, dtype, torch.device("cpu"))


@pytest.mark.usefixtures("torch_path")
def test_torch_path_in_blocks_of_rows_equals_reference(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(distillation, "_BLOCK", 900)  # 3 rows at a time
    check_against_reference(SHAPES[1], torch.float64, torch.device("cpu"))


def test_kernels_with_a_small_workspace_equal_reference(
    triton_device: torch.device, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(distillation_kernels, "_WORKSPACE", 70 * 64 * 2)  # 128 prototypes at a time: 128, 128 and 44
    check_against_reference(SHAPES[1], torch.float32, triton_device)


@pytest.mark.usefixtures("torch_path")
def test_gradients_are_those_of_finite_differences() -> None:
    tensors, weight = arguments(4, 3, 5, torch.float64)
    fixed = {name: tensors[name] for name in ("teacher", "teacher_head", "centre")}

    def function(student: Tensor, student_head: Tensor, weight: Tensor) -> Tensor:
        return distillation_loss(student=student, student_head=student_head, weight=weight, **fixed)

    assert torch.autograd.gradcheck(function, (tensors["student"], tensors["student_head"], weight))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_rounding_is_no_worse_than_torch_s(dtype: torch.dtype, path: torch.device) -> None:
    tensors, weight = arguments(40, 32, 150, dtype, path)
    ours = run(distillation_loss, tensors, weight)
    low = run(reference, tensors, weight)
    truth = run(reference, converted(tensors, torch.float32), leaf(weight.float()))
    assert ours[0].dtype == torch.float32
    for name, actual, rounded, expected in zip(LABELS, ours, low, truth, strict=True):
        place = expected.abs().max().item() * torch.finfo(dtype).eps / 2
        assert_low_precision(actual, rounded, expected, place, label=name)


def test_autocast_is_followed(path: torch.device) -> None:
    tensors, _ = arguments(40, 32, 150, device=path)
    with torch.autocast(path.type, torch.bfloat16):
        ours = run(distillation_loss, tensors, None)
        low = run(reference, tensors, None)
    truth = run(reference, tensors, None)
    for name, actual, rounded, expected in zip(LABELS, ours, low, truth, strict=False):
        assert actual.dtype == torch.float32
        assert not torch.equal(actual, expected)  # the products are in bf16
        place = expected.abs().max().item() * torch.finfo(torch.bfloat16).eps / 2
        assert_low_precision(actual, rounded, expected, place, label=name)


def test_heads_of_length_1_need_not_be_normalised_again(path: torch.device) -> None:
    tensors, weight = arguments(5, 7, 11, device=path)
    unit = {name: F.normalize(tensors[name].detach(), dim=1) for name in ("student_head", "teacher_head")}
    expected = distillation_loss(**(tensors | unit), weight=weight)
    assert_close(distillation_loss(**(tensors | unit), weight=weight, normalise_heads=False), expected)
    longer = distillation_loss(**(tensors | {"student_head": 2 * unit["student_head"]}), normalise_heads=False)
    assert not torch.allclose(longer, distillation_loss(**(tensors | unit)))


def test_fp16_gradients_of_small_weights_are_kept(path: torch.device) -> None:
    # so small that fp16 rounds the gradients of single logits away, though not their sums
    tensors, _ = arguments(200, 7, 11, torch.float16, path)
    weight = torch.full((200,), 5e-7, device=path, requires_grad=True)
    ours = run(distillation_loss, tensors, weight)
    truth = run(reference, converted(tensors, torch.float32), weight)
    for name, actual, expected in zip(LABELS, ours, truth, strict=True):
        assert_close(actual, expected, 0.03, label=name)


def test_teacher_gets_no_gradient(triton_device: torch.device) -> None:
    tensors, _ = arguments(5, 7, 11, device=triton_device)
    for name in ("teacher", "teacher_head", "centre"):
        tensors[name].requires_grad_()
    distillation_loss(**tensors).backward()
    assert tensors["student"].grad is not None
    assert all(tensors[name].grad is None for name in ("teacher", "teacher_head", "centre"))


def test_kernels_save_no_logits(triton_device: torch.device) -> None:
    M, E, K = 70, 8, 300
    tensors, _ = arguments(M, E, K, device=triton_device)
    saved: list[int] = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: saved.append(t.numel()) or t, lambda t: t):
        distillation_loss(**tensors)
    assert saved
    assert max(saved) <= max(M, K) * E


def test_far_logits_do_not_overflow(triton_device: torch.device) -> None:
    tensors, _ = arguments(5, 20, 130, device=triton_device)
    tensors["centre"] = tensors["centre"] * 100
    options = {"student_temperature": 0.002, "teacher_temperature": 0.002}
    ours = run(distillation_loss, tensors, None, **options)
    truth = run(reference, tensors, None, **options)
    # a probability is off by as much, relatively, as its logit absolutely; products of three tf32 passes keep 21 bits
    far = max((tensors[name] @ tensors[f"{name}_head"].T).abs().max().item() for name in ("student", "teacher")) / 0.002
    bound = far * 2**-21 if triton_device.type == "cuda" else 1e-4
    for name, actual, expected in zip(LABELS, ours, truth, strict=False):
        assert_close(actual, expected, bound, label=name)


@pytest.mark.parametrize(
    ("E", "dtype", "kibibytes", "stay"),
    [
        (256, torch.bfloat16, 227, True),  # H100
        (256, torch.bfloat16, 163, False),  # A100
        (128, torch.float16, 163, True),
        (512, torch.bfloat16, 227, False),
        (256, torch.float32, 227, False),
    ],
)
def test_rows_are_read_once_where_shared_memory_holds_them(
    E: int, dtype: torch.dtype, kibibytes: int, stay: bool
) -> None:
    options = distillation_kernels.launch_options(E, dtype, kibibytes * 1024)
    assert (options["BLOCK_E"] == E) == stay


def test_operators_pass_opcheck_on_permuted_layouts(triton_device: torch.device) -> None:
    tensors, _ = arguments(5, 7, 11, device=triton_device)
    given = [permuted(tensors[name]) for name in ("student", "student_head", "teacher", "teacher_head")]
    given += [tensors["centre"], torch.tensor(0.04, device=triton_device)]
    torch.library.opcheck(distillation_rows_op, (*given, 0.1))
    with torch.no_grad():
        _, log_sums = distillation_rows_op(*given, 0.1)
    gradient = torch.ones(5, device=triton_device)
    detached = [tensor.detach() for tensor in given]
    torch.library.opcheck(distillation_rows_backward_op, (gradient, log_sums, *detached, 0.1))


@pytest.mark.parametrize("with_gradient", [True, False])
def test_torch_path_passes_opcheck_on_permuted_layouts(with_gradient: bool) -> None:
    tensors, weight = arguments(5, 7, 11)
    student, head, teacher, teacher_head = (
        permuted(tensors[name]) for name in ("student", "student_head", "teacher", "teacher_head")
    )
    given = student, head, weight, teacher, teacher_head, tensors["centre"], torch.tensor(0.04)
    given = given if with_gradient else tuple(tensor.detach() for tensor in given)
    torch.library.opcheck(distillation_blocks_op, (*given, 0.1, with_gradient))


def test_compiles_without_graph_breaks(path: torch.device) -> None:
    tensors, weight = arguments(5, 7, 11, device=path)
    compiled = torch.compile(distillation_loss, fullgraph=True, backend=compile_backend(path))
    ours = run(compiled, tensors, weight)
    for actual, expected in zip(ours, run(distillation_loss, tensors, weight), strict=True):
        assert_close(actual, expected)


@pytest.mark.parametrize(
    ("changed", "error", "message"),
    [
        ({"student": torch.zeros(4)}, ValueError, r"student must be \(M,E\)"),
        ({"student": torch.zeros(0, 3), "teacher": torch.zeros(0, 3)}, ValueError, "none of them empty"),
        ({"teacher": torch.zeros(3, 3)}, ValueError, r"teacher must be \(4, 3\)"),
        ({"teacher_head": torch.zeros(5, 4)}, ValueError, r"teacher_head must be \(5, 3\)"),
        ({"centre": torch.zeros(1, 5)}, ValueError, r"centre must be \(5,\)"),
        ({"weight": torch.zeros(5)}, ValueError, r"weight must be \(4,\)"),
        ({"student_temperature": 0.0}, ValueError, "student_temperature must be > 0"),
        ({"teacher_temperature": -1.0}, ValueError, "teacher_temperature must be > 0"),
        ({"centre": torch.zeros(5, dtype=torch.int64)}, TypeError, "centre is int64"),
        ({"teacher": torch.zeros(4, 3, device="meta")}, ValueError, "teacher is on meta"),
    ],
)
def test_bad_input_is_refused_in_one_line(changed: dict[str, Any], error: type[Exception], message: str) -> None:
    tensors, _ = arguments(4, 3, 5)
    with pytest.raises(error, match=message) as caught:
        distillation_loss(**(tensors | changed))
    assert "\n" not in str(caught.value)


def test_kernels_refuse_float64(triton_device: torch.device) -> None:
    tensors, _ = arguments(4, 3, 5, torch.float64, triton_device)
    with pytest.raises(TypeError, match="student is float64"):
        distillation_loss(**tensors)


def test_outputs_without_gradient_get_no_zeros(path: torch.device) -> None:
    tensors, _ = arguments(3, 4, 5, device=path)
    loss = distillation_loss(**tensors)
    gradient = torch.ones_like(loss)
    with launches() as backward:
        torch.autograd.grad(loss, [tensors["student"], tensors["student_head"]], gradient)
    assert backward
    assert "zeros" not in backward
