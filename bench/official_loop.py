"""The official training loop beside ours: the same weights, views, draws and schedule, iteration by iteration."""

import contextlib
import io
import tempfile
from collections.abc import Mapping
from types import FunctionType, SimpleNamespace
from typing import Any
from unittest import mock

import torch
from torch import Tensor

from bench.clone import BATCH, CLASSES, PATCH, PROTOTYPES, SIDE, exact_filter, image_labels, relative
from fsr_fast.config import CONFIG_FOLDER, Config, build_config, read_yaml
from fsr_fast.engine import build_step
from fsr_fast.method.optim import build_optimiser, fill_missing_gradients, set_learning_rate
from fsr_fast.method.schedules import schedule_at
from fsr_fast.models import Network, build_network
from fsr_fast.models.official import official_sizes

STARTS, LITERAL = 2, 2000
"""Iterations before L_seg and the energy count: here, and as a number in the text of the official loop."""
WARMUP = 2
LOSSES = ("classification", "affinity", "segmentation", "class_token", "uncertain")
"""In the order in which the official loop averages them over its processes, after its update."""

Record = dict[str, Any]
"""Results of one iteration of the official loop, by name."""


def compare_loops(
    code: SimpleNamespace, student: Any, teacher: Any, views: tuple[Tensor, Tensor], iterations: int
) -> dict[str, float]:
    """Train both sides from the student's weights; return the largest difference of all iterations, by name."""
    config = read_recipe(student.state_dict(), iterations)
    network = build_network(config.model, tuple(map(str, range(CLASSES))), SIDE)
    network.load_state_dict(student.state_dict())
    records = train_theirs(code, student, teacher, views, iterations)
    return train_ours(network.double(), config, records, views)


def read_recipe(weights: dict[str, Tensor], iterations: int = 1) -> Config:
    """Return the official recipe for the network that an official checkpoint holds."""
    values = read_yaml(CONFIG_FOLDER / "voc_official.yaml")
    sizes = official_sizes(weights, "the clone").model.model_dump(mode="json")
    changes: Mapping[str, dict[str, Any]] = {
        "model": {**sizes, "stochastic_depth": 0.0},
        "data": {"image_size": SIDE, "dataset": "synthetic", "root": None},
        "mask": {"block": 2},
        "loss": {"segmentation_start": STARTS, "energy": 0.05},  # both sides sum exactly the same
        "optim": {"iterations": iterations, "warmup": min(WARMUP, iterations - 1), "batch_size": BATCH},
        "run": {"device": "cpu", "amp": "off"},
    }
    for section, content in changes.items():
        values[section] = values.get(section, {}) | content
    return build_config(values, "voc_official")


def draw_uniform(iterations: int) -> Tensor:
    """Draw u of Eq. 3 for blocks of 2 × 2 patches: (iterations, B, blocks)."""
    blocks = (SIDE // PATCH // 2) ** 2
    return torch.rand(iterations, BATCH, blocks, generator=torch.Generator().manual_seed(2), dtype=torch.float64)


# --- theirs


def train_theirs(
    code: SimpleNamespace, student: Any, teacher: Any, views: tuple[Tensor, Tensor], iterations: int
) -> list[Record]:
    """Run the official `train` on the same views in every iteration; return the results of each."""
    train = code.train
    records: list[Record] = []
    args = train.parser.parse_args([])
    vars(args).update(
        max_iters=iterations,
        fsr_iters=iterations,
        warmup_iters=min(WARMUP, iterations - 1),
        input_size=SIDE,
        out_dim=PROTOTYPES,
        spg=BATCH,
        log_iters=10**6,
        eval_iters=10**6,
        num_classes=CLASSES + 1,
        block_size=2 * PATCH,
    )
    batch = [["0"] * BATCH, [view.clone() for view in views], image_labels()]
    built = iter((student, teacher))
    stand_ins = {
        "build_model": lambda *_, **__: next(built),
        "MultiviewTransform": mock.MagicMock(),
        "DataLoader": lambda *_, **__: [batch] * iterations,
        "voc": mock.MagicMock(),
        "setup_logger": lambda *_: None,
        **_recorders(train, student, teacher, records, draw_uniform(iterations)),
    }
    constants = tuple(STARTS if one == LITERAL else one for one in train.train.__code__.co_consts)
    body = FunctionType(train.train.__code__.replace(co_consts=constants), vars(train))
    exact = exact_filter().bilateralfilter_batch  # also where the clone's lattice is built
    patched = mock.patch.object(code.losses, "bilateralfilter_batch", exact, create=True)
    with tempfile.TemporaryDirectory() as folder, mock.patch.multiple(train, **stand_ins), patched:
        args.work_dir = folder
        with contextlib.redirect_stdout(io.StringIO()):
            body(args)
    return records


def _recorders(train: Any, student: Any, teacher: Any, records: list[Record], uniform: Tensor) -> dict[str, Any]:
    """Return functions of the official loop, wrapped to record their results."""
    refine, energy, reduce, draws = (
        train.refine_cams_with_bkg_v2,
        train.get_energy_loss,
        train.reduce_tensor,
        iter(uniform),
    )

    class Generator(train.MaskGenerator):  # type: ignore[misc]
        def __call__(self, *arguments: Any, **options: Any) -> Tensor:
            with mock.patch("torch.rand", return_value=next(draws).clone()):
                mask: Tensor = super().__call__(*arguments, **options)
            records.append({"mask": mask})
            return mask

    def note_labels(*arguments: Any, **options: Any) -> Tensor:
        labels: Tensor = refine(*arguments, **options)
        records[-1].setdefault("pseudo labels", labels)  # view 1's come first
        return labels

    def note_energy(**options: Any) -> Tensor:
        records[-1]["loss energy"] = energy(**options).double()
        loss: Tensor = records[-1]["loss energy"]
        return loss

    def note_loss(loss: Tensor) -> Tensor:
        left = [name for name in LOSSES if f"loss {name}" not in records[-1]]
        records[-1][f"loss {left[0]}"] = loss.detach()
        if len(left) == 1:
            gradients = ((name, one.grad) for name, one in student.named_parameters() if one.grad is not None)
            records[-1]["gradients"] = {name: one.clone() for name, one in gradients}
            for side, network in (("student", student), ("teacher", teacher)):
                records[-1][side] = {name: value.clone() for name, value in network.state_dict().items()}
        averaged: Tensor = reduce(loss)
        return averaged

    return {
        "MaskGenerator": Generator,
        "refine_cams_with_bkg_v2": note_labels,
        "get_energy_loss": note_energy,
        "reduce_tensor": note_loss,
    }


# --- ours


def train_ours(
    network: Network, config: Config, theirs: list[Record], views: tuple[Tensor, Tensor]
) -> dict[str, float]:
    """Run our iterations on the same views and draws; return the largest difference of all iterations, by name."""
    step = build_step(network.train(), config, 2).double()
    optimiser = build_optimiser(network, config.optim)
    worst: dict[str, float] = {}
    for iteration, (record, uniform) in enumerate(zip(theirs, draw_uniform(len(theirs)), strict=True)):
        schedule = schedule_at(config, iteration)
        set_learning_rate(optimiser, schedule.learning_rate_factor)
        draws = step.draw(BATCH, torch.Generator().manual_seed(0))._replace(uniform=uniform)
        output = step(views, image_labels(), draws, schedule)
        optimiser.zero_grad()
        output.loss.backward()
        fill_missing_gradients(optimiser)
        gradients = {name: one.grad.clone() for name, one in network.named_parameters() if one.grad is not None}
        optimiser.step()
        assert step.teacher.network is not None
        step.teacher.update_ema(network, schedule.encoder_momentum, schedule.projector_momentum)
        assert output.mask is not None
        found = {f"loss {name}": relative(loss, record[f"loss {name}"]) for name, loss in output.losses.items()}
        found["mask"] = relative(output.mask, record["mask"].flatten(1))
        if output.pseudo_labels is not None:
            found["pseudo labels"] = relative(output.pseudo_labels, record["pseudo labels"])
        found["gradients"] = largest_difference(gradients, record["gradients"])
        found["weights of the student"] = largest_difference(network.state_dict(), record["student"])
        found["weights of the teacher"] = largest_difference(step.teacher.network.state_dict(), record["teacher"])
        worst = {name: max(value, worst.get(name, 0.0)) for name, value in (worst | found).items()}
    return worst


def largest_difference(ours: Mapping[str, Tensor], theirs: Mapping[str, Tensor]) -> float:
    """Return the largest difference of all tensors, relative to the largest value of them all."""
    largest = max(one.abs().max().item() for one in theirs.values())
    return max((ours[name] - one).abs().max().item() for name, one in theirs.items()) / largest
