"""The distillation loss of a batch: all logits written out against tiles of them."""

from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from bench.harness import Floor, compare, size
from fsr_fast.kernels import distillation_loss


def written_out(student: Tensor, teacher: Tensor, student_head: Tensor, teacher_head: Tensor, centre: Tensor) -> Tensor:
    """Eq. 8 as one writes it: both logits, softmax, log-softmax."""
    logits = (F.linear(student, F.normalize(student_head, dim=1)) / 0.1).float()
    with torch.no_grad():
        teacher_logits = F.linear(teacher, F.normalize(teacher_head, dim=1)).float()
        target = ((teacher_logits - centre) / 0.04).softmax(dim=1)
    return -(target * logits.log_softmax(dim=1)).sum(dim=1).mean()


@pytest.mark.parametrize("amp", [False, True], ids=["fp32", "amp"])
@pytest.mark.parametrize("prototypes", [4096, 65536])
def test_distillation_loss(benchmark: Any, device: torch.device, amp: bool, prototypes: int) -> None:
    if device.type == "cpu" and (amp or prototypes != 4096):
        pytest.skip("the CPU is measured in fp32 at the paper's number of prototypes")
    M, E = size(device, gpu=(16 * 313, 256), cpu=(313, 256))  # the masked patches of 16 images, of one
    K = prototypes

    def inputs(generator: torch.Generator) -> tuple[Tensor, ...]:
        def draw(*shape: int) -> Tensor:
            return torch.randn(*shape, generator=generator)

        student, teacher = (F.normalize(draw(M, E), dim=1).to(device) for _ in range(2))
        student_head, teacher_head = (draw(K, E).to(device) for _ in range(2))
        centre = (draw(K) * 0.1).to(device)
        return student.requires_grad_(), teacher, student_head.requires_grad_(), teacher_head, centre

    features = 4 * (M + K) * E  # of the student, or of the teacher
    floor = Floor(
        forward_bytes=2 * features + 4 * K,
        forward_flops=4 * M * K * E,
        backward_bytes=3 * features + 4 * K,
        backward_flops=4 * M * K * E,  # the two products of the gradient; logits computed again are not necessary work
    )
    compare(
        benchmark,
        device,
        f"distillation_loss {'amp' if amp else 'fp32'} M={M} K={K}",
        ours=distillation_loss,
        eager=written_out,
        inputs=inputs,
        floor=floor,
        dtype=torch.bfloat16 if amp else torch.float32,
        amp=amp,
        graph=True,
    )
