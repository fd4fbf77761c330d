"""A run goes on with another number of processes: what is exact then, and what is not."""

import signal

import torch

from fsr_fast.config import load_config
from fsr_fast.runtime.checkpoint import read_checkpoint
from fsr_fast.runtime.distributed import Process
from fsr_fast.trainer import Trainer
from tests.runtime import children
from tests.test_resume import assert_same, flat


def test_images_augmentation_and_all_weights_go_on_exactly_with_other_processes(recipe, tmp_path):
    path = recipe("run")
    stopped = children.start_ranks(path, 1, children.signal_one, 2, signal.SIGTERM, 0)
    assert children.exit_codes(stopped) == [143]
    state = read_checkpoint(tmp_path / "run")
    assert state["iteration"] == 3
    config = load_config(["--config", str(path)])[0]
    alone, *pair = (
        Trainer(config, Process(rank, size, torch.device("cpu"))) for rank, size in ((0, 1), (0, 2), (1, 2))
    )
    for trainer in pair:
        assert trainer.iteration == 3
        kept = {name: state[name] for name in ("student", "teacher", "centres", "optimiser")}
        found = {name: getattr(trainer.train_state, name).state_dict() for name in kept}
        assert_same(flat(found), flat(kept))
    for _ in range(3):
        whole = next(alone.loader)
        parts = [next(trainer.loader) for trainer in pair]
        for rank, part in enumerate(parts):
            assert part.indices.tolist() == whole.indices[rank::2].tolist()
            for view, expected in zip(part.views, whole.views, strict=True):
                assert torch.equal(view, expected[rank::2])
        assert pair[0].loader.state_dict() == alone.loader.state_dict()
    for trainer in (alone, *pair):
        trainer.close()
