"""What the host launches in an iteration outside the transformer's blocks, on a GPU in name."""

import json
from collections import Counter

import pytest

from bench.harness import RESULTS
from bench.host import PARTS, Launches, count_iteration, summarise
from bench.step import Setting

CASE = "counts an iteration of two images, outside the blocks"
RECORDED = json.loads((RESULTS / "sm_90/counts.json").read_text())[CASE]["counts"]


@pytest.fixture(scope="module")
def counted() -> tuple[Launches, int]:
    with pytest.MonkeyPatch.context() as patch:
        patch.delenv("FSR_KERNELS", raising=False)
        return count_iteration(Setting(backbone="vit_tiny_patch16_224"))


@pytest.mark.parametrize("part", PARTS)
def test_no_part_of_an_iteration_launches_more_than_is_recorded(counted, part):
    assert summarise(*counted)[part] <= RECORDED[part]


def test_every_launch_belongs_to_a_part_and_to_a_kind(counted):
    summary = summarise(*counted)
    assert sum(summary[part] for part in PARTS) == summary["launches"] == counted[0].total()
    assert sum(summary[kind] for kind in ("casts and copies", "our kernels", "other operators")) == summary["launches"]
    assert summary["views, allocations"] > 0


def test_gradients_belong_to_the_part_whose_they_are(counted):
    launched = Counter(counted[0])
    assert launched["decoder", "convolution_backward"] == launched["decoder", "convolution"] == 3
    assert launched["distillation", "logit_gradient_kernel"] == launched["distillation", "forward_kernel"] == 2
    assert launched["projector", "gelu_backward"] == 2


def test_each_part_s_weights_are_cast_once(counted):
    """Casts of weights and inputs, and of their gradients."""
    assert counted[0]["maps", "_to_copy"] == 4
    assert counted[0]["classifiers", "_to_copy"] == 0
