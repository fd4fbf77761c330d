"""Weights sharded over two processes: the same training as with whole ones, and the same checkpoints."""

import json
import signal
from pathlib import Path
from typing import Any

import pytest
import torch
from torch.distributed.tensor import DTensor

from fsr_fast.config import build_config
from fsr_fast.errors import UserError
from fsr_fast.runtime.checkpoint import read_checkpoint
from fsr_fast.trainer import Trainer
from tests import helpers
from tests.runtime import children
from tests.test_resume import flat

PRESETS = {"paper": {"run": {"checkpointing": True}, "optim": {"clip_norm": 0.5}}, "official": helpers.OFFICIAL}
SHORT = {"optim": {"iterations": 3, "learning_rate": 3e-4}}
HALF = {"run": {"amp": "bf16"}, "optim": {"iterations": 1, "warmup": 0}, "data": {"val_list": None}}
"""One iteration: what float32 rounds otherwise in the first update, bfloat16 may round up or down in the second."""
EVALUATED = {"run": {"evaluate_every": 1}, "evaluate": {"limit": 3}}  # the second process has one image fewer
SURVIVORS = ("student", "teacher", "centres", "optimiser", "loader", "guard")


def shard(wanted: bool) -> dict[str, dict[str, bool]]:
    return {"run": {"shard": wanted}}


def in_float64(rank: int, hook: children.Hook | None = None, *arguments: Any) -> None:
    """Compute in float64 to the end of this process."""
    widened = helpers.float64()
    widened.__enter__()
    Trainer.widened = widened  # held: a generator that is collected leaves its context
    if hook is not None:
        hook(rank, *arguments)


def note_shares(rank: int, folder: Path) -> None:
    """Write down how many numbers this process holds after training, of how many, and which tensors are whole."""
    finish = Trainer._finish

    def changed(self):
        named = dict(self.step.named_parameters())
        moments = [value for state in self.optimiser.state.values() for value in state.values() if value.ndim]
        everything = [*named.values(), *moments]
        report = {
            "whole": [name for name, value in named.items() if not isinstance(value, DTensor)],
            "held": sum(value.to_local().numel() for value in everything if isinstance(value, DTensor)),
            "all": sum(value.numel() for value in everything),
        }
        (folder / f"shares_{rank}.json").write_text(json.dumps(report))
        return finish(self)

    Trainer._finish = changed


def assert_close(run: Path, expected: Path, bound: float = 1e-9) -> None:
    """Compare all that the newest checkpoints hold but the configuration."""
    found, wanted = (flat({key: read_checkpoint(folder)[key] for key in SURVIVORS}) for folder in (run, expected))
    assert found.keys() == wanted.keys()
    for name, value in wanted.items():
        if not isinstance(value, torch.Tensor):
            assert found[name] == value, name
            continue
        difference = (found[name] - value).abs()
        if name.endswith("qkv.bias"):
            difference.view(3, -1)[1] = 0  # keys: their gradient is 0 but for rounding, of which AdamW takes the sign
        scale = value.abs().max().clamp(min=1) if name.startswith(".optimiser") else 1  # squares may be large
        assert difference.max() <= bound * scale, name


@pytest.mark.ddp
@pytest.mark.parametrize("preset", PRESETS)
def test_three_steps_and_their_scores_are_those_of_whole_weights(recipe, tmp_path, preset):
    shared, whole = (
        recipe(name, PRESETS[preset], SHORT, EVALUATED, shard(name == "shared")) for name in ("shared", "whole")
    )
    assert children.exit_codes(children.start_ranks(shared, 2, in_float64, note_shares, tmp_path)) == [0, 0]
    assert children.exit_codes(children.start_ranks(whole, 2, in_float64)) == [0, 0]
    assert_close(tmp_path / "shared", tmp_path / "whole")
    scores = [json.loads((tmp_path / name / "summary.json").read_text())["results"] for name in ("shared", "whole")]
    assert scores[0] == scores[1]
    for rank in (0, 1):
        shares = json.loads((tmp_path / f"shares_{rank}.json").read_text())
        assert shares["whole"] == []
        assert shares["held"] < 0.6 * shares["all"]


@pytest.mark.ddp
def test_a_step_in_half_precision_is_that_of_whole_weights(recipe, tmp_path):
    for name in ("shared", "whole"):
        path = recipe(name, SHORT, HALF, shard(name == "shared"))
        assert children.exit_codes(children.start_ranks(path, 2)) == [0, 0]
    assert_close(tmp_path / "shared", tmp_path / "whole", bound=1e-6)


@pytest.mark.ddp
@pytest.mark.parametrize("preset", PRESETS)
@pytest.mark.parametrize(("first", "second"), [((True, 2), (False, 1)), ((True, 1), (True, 2))])
def test_a_run_goes_on_with_and_without_sharding(recipe, tmp_path, preset, first, second):
    for name in ("changed", "whole"):
        for (wanted, size), code in ((first, 143), (second, 0)):
            path = recipe(name, PRESETS[preset], SHORT, shard(wanted and name == "changed"))
            stop = (children.signal_one, 1, signal.SIGTERM, 0) if code else ()
            assert children.exit_codes(children.start_ranks(path, size, in_float64, *stop)) == [code] * size
    assert_close(tmp_path / "changed", tmp_path / "whole")


@pytest.mark.parametrize(
    ("changes", "message"),
    [({"run": {"compile": True}}, "blocks cannot be compiled"), ({"cam": {"fp8": True}}, r"cam\.fp8: needs whole")],
)
def test_what_needs_whole_weights_is_refused(changes, message):
    with pytest.raises(UserError, match=message):
        build_config(helpers.values(changes, shard(True)), "the test")
