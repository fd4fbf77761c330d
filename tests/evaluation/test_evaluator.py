"""Evaluation of a list: sharding, interruption, failures, sizes, reports."""

import json
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.distributed as dist
from PIL import Image

from fsr_fast.commands.evaluate import main as evaluate_command
from fsr_fast.config import CONFIG_FOLDER, build_config, read_yaml
from fsr_fast.dataloading import synthetic
from fsr_fast.dataloading.datasets import build_datasets
from fsr_fast.errors import UserError
from fsr_fast.evaluation import evaluator, predictions
from fsr_fast.evaluation.evaluator import choose_images, evaluate_network
from fsr_fast.evaluation.inference import infer, infer_like
from fsr_fast.evaluation.journal import Journal, fingerprint
from fsr_fast.evaluation.metrics import ConfusionMatrix
from fsr_fast.evaluation.passes import patch_sizes
from fsr_fast.evaluation.samples import WINDOW, Failure, Sample, batches_of_like_size
from fsr_fast.evaluation.tally import Tally, class_counts, count_image
from fsr_fast.models import build_network
from fsr_fast.models.work import TrunkPass, TrunkShape
from fsr_fast.runtime.checkpoint import write_checkpoint
from fsr_fast.runtime.distributed import Process
from tests import helpers
from tests.runtime import children

CPU = torch.device("cpu")
ALONE = Process(0, 1, CPU)
RECIPE = helpers.config()
NETWORK = helpers.network(RECIPE).eval()


def dataset_of(root: Path, *changes):
    config = build_config(helpers.values(*changes, root=root), "the test")
    return build_datasets(config.data)[1], config


def evaluate(root: Path, *changes, network=NETWORK, process=ALONE, **options):
    dataset, config = dataset_of(root, *changes)
    return evaluate_network(network, dataset, config, process, **options)


def checkpoint(folder: Path, root: Path, seed: int = 0, *changes) -> Path:
    config = build_config(helpers.values(*changes, root=root), "the test")
    state = {"iteration": 7, "config": config.model_dump(mode="json"), "classes": list(helpers.CLASSES)}
    return write_checkpoint(folder, {**state, "student": helpers.network(config, seed).state_dict()})


# --- processes


def synthetic_evaluation(root: Path, process: Process):
    changes = {
        "data": {"dataset": "synthetic", "classes": None, "train_list": "train_aug", "root": str(root)},
        "model": {"backbone_options": {**RECIPE.model.backbone_options, "patch_size": 16}},
        "cam": {"scales": [1.0]},
    }
    dataset, config = dataset_of(root, changes)
    torch.manual_seed(0)
    network = build_network(config.model, dataset.classes, config.data.image_size)
    return evaluate_network(network, dataset, config, process)


def work(rank: int, folder: str) -> None:
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{folder}/meeting", rank=rank, world_size=2)
    found = synthetic_evaluation(Path(folder) / "data", Process(rank, 2, CPU))
    counts = {kind: (tally.matrix.counts, tally.bands) for kind, tally in found.tallies.items()}
    torch.save((counts, found.results, found.images), f"{folder}/{rank}.pt")
    dist.destroy_process_group()


@pytest.mark.ddp
def test_two_processes_count_what_one_counts(tmp_path):
    synthetic.generate(tmp_path / "data", train=1, val=5, processes=1)
    assert children.exit_codes([children.start(work, rank, str(tmp_path)) for rank in (0, 1)]) == [0, 0]
    alone = synthetic_evaluation(tmp_path / "data", ALONE)
    for rank in (0, 1):
        counts, results, images = torch.load(tmp_path / f"{rank}.pt")
        assert images == alone.images == 5
        assert list(counts) == ["pseudo", "seg"]
        for kind, tally in alone.tallies.items():
            assert torch.equal(counts[kind][0], tally.matrix.counts)
            assert torch.equal(counts[kind][1], tally.bands)
        assert results == alone.results


# --- interruption


class InterruptAt:
    """Counts images, and stops the evaluation before one of them."""

    def __init__(self, number: int | None = None) -> None:
        self.number, self.names = number, []

    def __call__(self, result, *arguments):
        if len(self.names) == self.number:
            raise KeyboardInterrupt
        self.names.append(result.sample.name)
        return COUNT(result, *arguments)


COUNT = evaluator._count


def test_an_interrupted_evaluation_goes_on_and_gives_the_same_result(tmp_path, monkeypatch, capsys):
    root = helpers.write_dataset(tmp_path / "data", val=5)
    arguments = ["--checkpoint", str(checkpoint(tmp_path / "run", root)), "--output"]
    evaluate_command([*arguments, str(tmp_path / "whole")])
    first, second = InterruptAt(3), InterruptAt()
    monkeypatch.setattr(evaluator, "_count", first)
    with pytest.raises(KeyboardInterrupt):
        evaluate_command([*arguments, str(tmp_path / "parts")])
    assert not (tmp_path / "parts" / "metrics.json").exists()
    (journal,) = (tmp_path / "parts").glob("images.*")
    journal.write_text(journal.read_text() + '{"name":"picture_12","coun')  # cut short by the interruption
    monkeypatch.setattr(evaluator, "_count", second)
    evaluate_command([*arguments, str(tmp_path / "parts")])
    assert len(first.names) == 3
    assert sorted(first.names + second.names) == [f"picture_{number}" for number in (10, 11, 12, 8, 9)]
    assert "3 images were evaluated before the interruption" in capsys.readouterr().out
    whole, parts = (json.loads((tmp_path / name / "metrics.json").read_text()) for name in ("whole", "parts"))
    assert whole == parts
    lines = [sorted((tmp_path / name / "images.jsonl").read_text().splitlines()) for name in ("whole", "parts")]
    assert lines[0] == lines[1]
    assert [path.name for path in (tmp_path / "parts").glob("images.*")] == ["images.jsonl"]


@pytest.mark.parametrize("change", ["weights", "settings", "data"])
def test_what_other_weights_settings_or_data_have_counted_is_not_taken(tmp_path, monkeypatch, change):
    root = helpers.write_dataset(tmp_path / "data", val=4)
    output = ["--output", str(tmp_path / "out")]
    path = checkpoint(tmp_path / "run", root)
    monkeypatch.setattr(evaluator, "_count", InterruptAt(2))
    with pytest.raises(KeyboardInterrupt):
        evaluate_command(["--checkpoint", str(path), *output])
    second = InterruptAt()
    monkeypatch.setattr(evaluator, "_count", second)
    if change == "weights":
        checkpoint(tmp_path / "run", root, 1)
    options = {"settings": ["--threshold", "0.2"], "data": ["--root", str(shutil.copytree(root, tmp_path / "moved"))]}
    evaluate_command(["--checkpoint", str(path), *options.get(change, []), *output])
    assert len(second.names) == 4


def test_a_finished_evaluation_is_done_anew(tmp_path, monkeypatch):
    root = helpers.write_dataset(tmp_path / "data", val=3)
    arguments = ["--checkpoint", str(checkpoint(tmp_path / "run", root)), "--output", str(tmp_path / "out")]
    for _ in range(2):
        counted = InterruptAt()
        monkeypatch.setattr(evaluator, "_count", counted)
        evaluate_command(arguments)
        assert len(counted.names) == 3


def test_processes_that_come_and_go_leave_one_journal(tmp_path):
    header = {"classes": ["a"], "weights": "x"}
    journals = [Journal(tmp_path, rank, header) for rank in (0, 1, 2)]
    for rank, journal in enumerate(journals):
        journal.open()
        journal.write({"name": f"image_{rank}"} if rank else {"name": "image_0", "error": "damaged"})
        journal.close()
    alone = Journal(tmp_path, 0, header)
    assert alone.found == {"image_1", "image_2"}
    alone.open()
    alone.write({"name": "image_0"})
    alone.close()
    lines = [json.loads(line) for line in alone.join().read_text().splitlines()]
    assert lines[0] == header
    assert sorted(line["name"] for line in lines[1:]) == ["image_0", "image_1", "image_2"]
    assert not any("error" in line for line in lines)
    assert [path.name for path in tmp_path.iterdir()] == ["images.jsonl"]


def test_the_fingerprint_changes_with_every_weight():
    network = helpers.network(RECIPE)
    before = fingerprint(network)
    assert before == fingerprint(helpers.network(RECIPE))
    with torch.no_grad():
        next(network.decoder.parameters()).view(-1)[-1] += 1e-3
    assert fingerprint(network) != before


# --- failures


@pytest.mark.parametrize("workers", [0, 1])
def test_an_image_that_cannot_be_read_is_named_and_the_others_are_scored(tmp_path, caplog, workers):
    root = helpers.write_dataset(tmp_path / "data", val=4)
    (root / "JPEGImages" / "picture_9.jpg").write_bytes(b"no picture")
    found = evaluate(root, {"data": {"workers": workers}})
    assert found.images == 3
    assert list(found.failed) == ["picture_9"]
    assert "picture_9.jpg" in found.failed["picture_9"]
    assert "1 of 4 images could not be evaluated: 'picture_9'" in caplog.text
    assert sum(row["pixels"] for row in found.results["seg"]["classes"].values()) == 3 * 40 * 36


def test_a_network_that_gives_nothing_finite_is_said_to(tmp_path):
    root = helpers.write_dataset(tmp_path / "data", val=2)
    network = helpers.network(RECIPE).eval()
    with torch.no_grad():
        network.encoder.norm.weight.fill_(torch.nan)
    with pytest.raises(UserError, match=r"none of 2 images could be evaluated.* the network's result is not finite"):
        evaluate(root, network=network)


def test_the_command_reports_a_failure_and_ends_with_an_error(tmp_path):
    root = helpers.write_dataset(tmp_path / "data", val=3)
    damaged = root / "JPEGImages" / "picture_9.jpg"
    content = damaged.read_bytes()
    damaged.write_bytes(b"no picture")
    output = tmp_path / "out"
    arguments = ["--checkpoint", str(checkpoint(tmp_path / "run", root)), "--output", str(output)]
    with pytest.raises(UserError, match=r"1 of 3 images could not be evaluated .* 'picture_9'"):
        evaluate_command(arguments)
    metrics = json.loads((output / "metrics.json").read_text())
    assert (metrics["images"], list(metrics["failed"])) == (2, ["picture_9"])
    assert "**picture_9** failed" in (output / "report.md").read_text()
    assert '"picture_9","error"' in (output / "images.jsonl").read_text()
    damaged.write_bytes(content)
    evaluate_command(arguments)
    assert json.loads((output / "metrics.json").read_text())["images"] == 3


def test_an_image_for_which_memory_runs_out_fails_alone(tmp_path, monkeypatch):
    root = helpers.write_dataset(tmp_path / "data", val=4)
    sizes = []

    def scarce(network, images, *arguments, **options):
        sizes.append(len(images))
        if len(images) > 1 or len(sizes) == 3:
            raise torch.OutOfMemoryError("CUDA out of memory")
        return infer_like(network, images, *arguments, **options)

    monkeypatch.setattr(predictions, "infer_like", scarce)
    found = evaluate(root)
    assert sizes == [4, 1, 1, 1, 1]
    assert found.images == 3
    assert found.failed == {"picture_9": "OutOfMemoryError: CUDA out of memory"}


def test_an_evaluation_without_any_image_is_an_error(tmp_path):
    root = helpers.write_dataset(tmp_path / "data", val=2)
    for name in ("picture_8", "picture_9"):
        (root / "JPEGImages" / f"{name}.jpg").write_bytes(b"no picture")
    with pytest.raises(UserError, match=r"none of 2 images could be evaluated; the first was 'picture_8'"):
        evaluate(root)


# --- sizes and memory


def sample(index: int, height: int, width: int) -> Sample:
    return Sample(index, str(index), np.zeros((height, width, 3), np.uint8), np.zeros(3, np.float32), None)


def test_images_that_are_alike_in_whole_patches_score_as_they_do_alone():
    generator = helpers.generator()
    images = [torch.randn(3, *size, generator=generator) for size in ((48, 32), (49, 31), (47, 33))]
    labels = [torch.tensor(present) for present in ([1.0, 0, 0], [1.0, 1, 0], [0, 0, 1.0])]
    options = {"cam_scales": (1.0, 0.5), "scales": (1.0, 1.5), "flip": True, "amp": "off"}
    assert len({patch_sizes(tuple(image.shape[1:]), (1.0, 0.5, 1.5), 8) for image in images}) == 1
    for image, present, found in zip(images, labels, infer_like(NETWORK, images, labels, **options), strict=True):
        expected = infer(NETWORK, image[None], present[None], **options)
        assert found.seg_logits.shape[-2:] == image.shape[-2:]
        assert torch.allclose(found.seg_logits, expected.seg_logits, rtol=1e-4, atol=1e-4)
        assert torch.allclose(found.cams.values, expected.cams.values, atol=1e-4)


def test_batches_hold_like_sizes_and_no_more_pixels_than_allowed():
    sizes = [(10, 20), (20, 10), (10, 20), (10, 20), (11, 20), (30, 30), (20, 10)]
    samples = [sample(index, *size) for index, size in enumerate(sizes)]
    bad = Failure("x", "damaged")
    found = list(batches_of_like_size([*samples[:3], bad, *samples[3:]], lambda size: (size[0] // 10, size[1]), 400))
    assert [batch if isinstance(batch, Failure) else [one.index for one in batch] for batch in found] == [
        [0, 2], bad, [3, 4], [5], [1, 6],
    ]  # fmt: skip


def test_no_more_images_wait_than_the_window_holds():
    drawn = []

    def endless():
        for index in range(10 * WINDOW):
            drawn.append(index)
            yield sample(index, 8, 8 + index)

    batches = batches_of_like_size(endless(), lambda size: size, 10**9)
    for count in range(1, 20):
        next(batches)
        assert len(drawn) - count < WINDOW


def test_what_is_kept_of_an_image_adds_up_to_the_confusion_matrix():
    generator = np.random.default_rng(0)
    tally, matrix, both = Tally(3), ConfusionMatrix(3), np.zeros((2, 4, 3), int)
    for _ in range(4):
        truth, prediction = generator.integers(0, 4, (2, 30, 40)).astype(np.uint8)
        truth[:4] = 255
        counts = json.loads(json.dumps(count_image(prediction, truth, 3, CPU)))
        matrix.update(prediction, truth)
        tally.add(counts)
        both += class_counts(counts, 3)
    assert torch.equal(tally.matrix.counts, matrix.counts)
    assert both[0, :, 0].tolist() == matrix.counts.diagonal().tolist()
    assert both[0, :, 1].tolist() == matrix.counts.sum(1).tolist()
    assert both[0, :, 2].tolist() == matrix.counts.sum(0).tolist()
    assert both[1].tolist() == tally.bands.tolist()


@pytest.mark.filterwarnings("error")
def test_masks_that_cannot_be_written_to_are_counted_without_a_warning():
    labels = np.ones((8, 8), np.uint8)
    labels.flags.writeable = False
    torch.set_warn_always(True)  # torch would say it once a process
    try:
        assert count_image(labels, labels, 1, CPU)["cells"] == [[1, 1, 64]]
    finally:
        torch.set_warn_always(False)


@pytest.mark.parametrize(
    ("count", "limit", "training_limit", "while_training", "alone"),
    [
        (10, None, 500, list(range(10)), list(range(10))),
        (10, None, 4, [0, 3, 6, 9], list(range(10))),
        (10, 6, 4, [0, 2, 4], list(range(6))),
        (10, None, None, list(range(10)), list(range(10))),
    ],
)
def test_a_validation_while_training_takes_every_nth_image(count, limit, training_limit, while_training, alone):
    config = helpers.config({"evaluate": {"limit": limit, "training_limit": training_limit}})
    assert list(choose_images(count, config, during_training=True)) == while_training
    assert list(choose_images(count, config)) == alone


@pytest.mark.parametrize(("recipe", "size"), [("voc_vit_b", (375, 500)), ("coco_vit_b", (480, 640))])
def test_validations_take_at_most_five_percent_of_the_trunk_s_arithmetic_by_default(recipe, size):
    config = build_config(read_yaml(CONFIG_FOLDER / f"{recipe}.yaml"), recipe)
    shape = TrunkShape(768, 12 * 768**2, patch_values=768, depth=12, patches=(config.data.image_size // 16) ** 2)
    one_view = TrunkPass(((1, shape.patches),), shape.depth, gradient=False)
    units = 14.8  # passes of one view that an image of a training step needs at least, in the paper's preset
    training = config.run.evaluate_every * config.optim.batch_size * units * shape.flops([one_view])
    sizes = patch_sizes(size, sorted({*config.cam.scales, *config.evaluate.scales}), 16)
    groups = tuple((2, height * width // 256) for height, width in sizes)
    images = len(choose_images(5_000, config, during_training=True))
    validation = images * shape.flops([TrunkPass(groups, shape.depth, gradient=False)])
    assert 0.01 < validation / training <= 0.05


# --- report


def test_the_report_holds_every_figure(tmp_path):
    root = helpers.write_dataset(tmp_path / "data", val=3)
    output = tmp_path / "out"
    checkpoint(tmp_path / "run", root)
    evaluate_command(["--checkpoint", str(tmp_path / "run"), "--crf", "--output", str(output)])
    metrics = json.loads((output / "metrics.json").read_text())
    text = (output / "report.md").read_text()
    for kind in ("pseudo", "seg", "seg+crf"):
        result = metrics["results"][kind]
        values = [result[key] for key in ("mean_iou", "mean_boundary_iou", "mean_precision", "mean_recall")]
        row = next(line for line in text.splitlines() if line.startswith(f"| {kind} |"))
        assert [f"{value:.2f}" if value is not None else "-" for value in values] == row.split(" | ")[1:5]
        assert {"iou", "boundary_iou", "precision", "recall", "pixels"} == set(result["classes"]["red"])
        assert np.sum(metrics["confusion"][kind]) == 3 * 40 * 36
        picture = output / f"confusion_{kind.replace('+', '_')}.png"
        assert f"({picture.name})" in text
        with Image.open(picture) as image:
            assert min(image.size) > 200
    assert "pydensecrf" in (output / "images.jsonl").read_text().splitlines()[0]
