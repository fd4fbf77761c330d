"""Every row of the paper's tables, and every choice between paper and official code, trains and does what it says.

Each case trains the tiny network for two iterations on the tiny data set; what it changes is read off the step.
"""

import functools
import math
from pathlib import Path
from typing import Any, NamedTuple

import pytest
import torch
from torch import Tensor

from fsr_fast import reference, train
from fsr_fast.commands.ablate import TABLES, Changes, row_config
from fsr_fast.config import Config, build_config, dump_config
from fsr_fast.method.masking import find_edges, mask_edges
from fsr_fast.method.step import FSRStep, StepOutput
from fsr_fast.runtime.checkpoint import read_checkpoint
from tests import helpers

BATCH, N = 4, 16
BASE_LOSSES = {"classification", "affinity", "segmentation", "uncertain", "class_token"}


class Seen(NamedTuple):
    """One iteration, as the step saw it."""

    views: tuple[Tensor, Tensor]
    output: StepOutput
    view2_cam: Tensor
    """(B, N), largest normalised activation over the present classes, before the update."""
    edges: Tensor
    """(B, N), patches of view 2 with an edge."""


class Trained(NamedTuple):
    iterations: list[Seen]
    checkpoint: dict[str, Any]

    @property
    def masks(self) -> Tensor:
        masks = [seen.output.mask for seen in self.iterations]
        assert all(mask is not None for mask in masks)
        return torch.stack(masks)

    def losses(self, index: int = 0) -> dict[str, float]:
        return {name: value.item() for name, value in self.iterations[index].output.losses.items()}


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    """A function that trains by changes to the recipe, each case once."""
    folder = tmp_path_factory.mktemp("switches")
    root = helpers.write_dataset(folder / "data")
    short = {
        "optim": {"iterations": 2, "warmup": 0, "batch_size": BATCH},
        "evaluate": {"limit": 1},
        "mask": {"edge_low": 10.0, "edge_high": 30.0},  # the squares are pale in grey
    }

    @functools.cache
    def cached(case: str) -> Trained:
        base = build_config(helpers.values(short, root=root, output=folder / "run"), "the test")
        return _train(row_config(base, CASES[case], folder / case, seed=3), folder / f"{case}.yaml")

    return cached


def _train(config: Config, file: Path) -> Trained:
    seen: list[Seen] = []
    forward = FSRStep.forward

    def spy(step, views, labels, draws, schedule):
        with torch.no_grad():
            cam = reference.normalise_cam(step.student(views[1]).cam) * labels[..., None, None]
            edges = find_edges(step.student.denormalise(views[1]), step.config.mask)
            edges = mask_edges(edges, step.selector.shape).mask
        output = forward(step, views, labels, draws, schedule)
        seen.append(Seen(views, output, cam.amax(1).flatten(1), edges))
        return output

    file.write_text(dump_config(config))
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(FSRStep, "forward", spy)
        train.main(["--config", str(file)])
    return Trained(seen, read_checkpoint(config.run.output))


CASES: dict[str, Changes] = {
    "recipe": {},
    **{f"table_{number}_{row}": changes for number, table in TABLES.items() for row, changes in table.rows.items()},
    "multiply": {"model": {"mask_mode": "multiply"}},
    "no_mask": {"model": {"mask_mode": "none"}},
    "averaged_encoder": {"teacher": {"encoder_momentum": 0.5}},
    "projector_of_the_student": {"teacher": {"projector_momentum": 0.0}},
    "fixed_projector": {"teacher": {"projector_momentum": 1.0}},
    "blocks": {"mask": {"block": 2}},
    "aux_guide": {"mask": {"source": "aux"}},
    "multi_scale_guide": {"mask": {"multi_scale": True}},
    "random_start": {"mask": {"random_fraction": 0.5}},
    "energy": {"loss": {"energy": 1000.0}},
    "stochastic_teacher": {"teacher": {"stochastic_depth": "always"}},
    "stochastic_maps": {"teacher": {"stochastic_depth": "shared"}},
}
SAME = ("table_3_full", "table_4_both", "table_5_none")
"""Rows that are the full method, with all switches as in the recipe."""


def weights_differ(one: Trained, other: Trained) -> bool:
    pairs = ((value, other.checkpoint["student"].get(name)) for name, value in one.checkpoint["student"].items())
    return any(second is None or not torch.equal(first, second) for first, second in pairs)


@pytest.mark.parametrize("case", [case for case in CASES if case != "recipe"])
def test_every_switch_trains_and_changes_the_weights(run, case):
    changed, usual = run(case), run("recipe")
    assert len(changed.iterations) == 2
    assert all(seen.output.loss.isfinite() for seen in changed.iterations)
    assert all(value.isfinite().all() for value in changed.checkpoint["student"].values())
    assert weights_differ(changed, usual) == (case not in SAME)


# --- Table 3


@pytest.mark.parametrize("strategy", ["random", "uncertain"])
@pytest.mark.parametrize(("ratio", "count"), [(0.1, 1), (0.2, 3), (0.3, 4), (0.4, 6), (0.5, 8)])
def test_the_ratio_sets_how_many_patches_are_masked(run, strategy, ratio, count):
    assert (run(f"table_3_{strategy}_{ratio}").masks.sum(-1) == count).all()


def test_uncertain_patches_are_masked_first_and_random_ones_regardless(run):
    shares = {}
    for strategy in ("random", "uncertain"):
        case = run(f"table_3_{strategy}_0.4")
        cam = torch.stack([seen.view2_cam for seen in case.iterations])
        uncertain = (cam > 0.2) & (cam < 0.7)
        left = uncertain.sum(-1) - (uncertain & case.masks).sum(-1)
        shares[strategy] = (uncertain & case.masks).sum(-1), left
    inside, left = shares["uncertain"]
    assert ((left == 0) | (inside == 6)).all()
    assert not ((shares["random"][1] == 0) | (shares["random"][0] == 6)).all()


def test_cam_strict_masks_the_uncertain_patches_alone(run):
    case = run("table_3_cam_strict")
    cam = torch.stack([seen.view2_cam for seen in case.iterations])
    assert torch.equal(case.masks, (cam > 0.2) & (cam < 0.7))
    assert len(case.masks.sum(-1).unique()) > 1


def test_edge_strict_masks_the_patches_with_edges_alone(run):
    case = run("table_3_edge_strict")
    assert torch.equal(case.masks, torch.stack([seen.edges for seen in case.iterations]))
    assert 0 < case.masks.sum() < case.masks.numel()


# --- Table 4


@pytest.mark.parametrize(
    ("row", "off"),
    [
        ("none", {"uncertain", "class_token"}),
        ("unc", {"class_token"}),
        ("cer_gap", {"uncertain"}),
        ("cer_gmp", {"uncertain"}),
        ("cer_mca", {"uncertain"}),
        ("both", set()),
    ],
)
def test_a_row_computes_the_losses_that_it_names(run, row, off):
    case = run(f"table_4_{row}")
    assert set(case.losses()) == BASE_LOSSES - off
    has_aggregator = any(name.startswith("encoder.cls_blocks.") for name in case.checkpoint["student"])
    assert has_aggregator == (row not in ("cer_gap", "cer_gmp"))


def test_the_aggregation_changes_the_class_tokens_loss(run):
    losses = {run(f"table_4_cer_{aggregation}").losses()["class_token"] for aggregation in ("gap", "gmp", "mca")}
    assert len(losses) == 3


# --- Table 5


def changed_views(run, row: str) -> list[tuple[Tensor, Tensor]]:
    """Views (3, H, W) of a row that differ from the recipe's, each with the recipe's."""
    pairs = zip(run(f"table_5_{row}").iterations, run("recipe").iterations, strict=True)
    views = [
        (new, old) for one, other in pairs for new, old in zip(*map(torch.cat, (one.views, other.views)), strict=True)
    ]
    return [(new, old) for new, old in views if not torch.equal(new, old)]


def grey(view: Tensor) -> Tensor:
    return ((view * 0.5 + 0.5) * 255).round()


def roughness(view: Tensor) -> float:
    return view.diff(dim=-1).abs().mean().item() + view.diff(dim=-2).abs().mean().item()


def test_some_views_are_blurred(run):
    views = changed_views(run, "blur")
    assert 0 < len(views) < 4 * BATCH
    for new, old in views:
        assert roughness(new) < roughness(old)
        torch.testing.assert_close(grey(new).mean((1, 2)), grey(old).mean((1, 2)), rtol=0, atol=1.5)


def test_some_views_are_solarised(run):
    views = changed_views(run, "solarise")
    assert 0 < len(views) < 4 * BATCH
    for new, old in views:
        expected = torch.where(grey(old) >= 128, 255 - grey(old), grey(old))
        assert torch.equal(grey(new), expected)


@pytest.mark.parametrize("row", ["autoaugment", "randaugment"])
def test_a_learned_policy_changes_most_views(run, row):
    assert len(changed_views(run, row)) > 2 * BATCH


# --- beyond the tables


def test_the_aggregators_mask_has_three_modes(run):
    losses = [run(case).losses() for case in ("recipe", "multiply", "no_mask")]
    assert len({loss["class_token"] for loss in losses}) == 3
    assert len({loss["uncertain"] for loss in losses}) == 1


def test_the_momentum_of_the_encoder_makes_a_second_network(run):
    alone, averaged = run("recipe").checkpoint, run("averaged_encoder").checkpoint
    assert {name.partition(".")[0] for name in alone["teacher"]} == {"own_projector"}
    assert {name.partition(".")[0] for name in averaged["teacher"]} == {"network"}
    assert not torch.equal(
        averaged["teacher"]["network.encoder.norm.weight"], averaged["student"]["encoder.norm.weight"]
    )


def test_the_momentum_of_the_projector_sets_how_far_it_follows(run):
    name = "mlp.0.weight"
    student = {case: run(case).checkpoint["student"][f"projector.{name}"] for case in CASES if "projector" in case}
    teacher = {case: run(case).checkpoint["teacher"][f"own_projector.{name}"] for case in student}
    distance = {case: (student[case] - teacher[case]).norm().item() for case in student}
    assert distance["projector_of_the_student"] < 0.7 * distance["fixed_projector"]
    assert run("fixed_projector").losses()["uncertain"] == run("recipe").losses()["uncertain"]


def test_blocks_are_masked_whole(run):
    masks = run("blocks").masks.view(2, BATCH, 2, 2, 2, 2).transpose(3, 4).flatten(4)
    assert torch.equal(masks.all(-1), masks.any(-1))
    assert (masks.sum((2, 3, 4)) == 4 * math.ceil(4 * 0.4)).all()


@pytest.mark.parametrize("case", ["aux_guide", "multi_scale_guide", "random_start"])
def test_another_guide_masks_other_patches(run, case):
    masks, usual = run(case).masks[0], run("recipe").masks[0]
    assert (masks.sum(-1) == 6).all()
    assert not torch.equal(masks, usual)


def test_random_masks_end_when_their_share_of_the_training_is_over(run):
    case = run("random_start")
    cam = case.iterations[1].view2_cam
    uncertain = (cam > 0.2) & (cam < 0.7)
    inside = (uncertain & case.masks[1]).sum(-1)
    assert ((inside == uncertain.sum(-1)) | (inside == 6)).all()
    assert torch.equal(case.masks[0], run("table_3_random_0.4").masks[0])


def test_the_energy_is_one_more_loss(run):
    losses = run("energy").losses()
    assert set(losses) == BASE_LOSSES | {"energy"}
    assert losses["energy"] < 0
    assert losses["segmentation"] == run("recipe").losses()["segmentation"]


def test_stochastic_depth_reaches_the_teacher(run):
    case, usual = run("stochastic_teacher").losses(), run("recipe").losses()
    assert case["classification"] == usual["classification"]
    assert case["uncertain"] != usual["uncertain"]
