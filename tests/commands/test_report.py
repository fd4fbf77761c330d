import itertools
import json
import shutil
from html.parser import HTMLParser
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from fsr_fast.commands.report import main
from fsr_fast.dataloading.datasets import build_datasets
from fsr_fast.errors import UserError
from fsr_fast.evaluation import passes
from fsr_fast.models.build import open_trained
from fsr_fast.options import Given
from fsr_fast.reporting import gallery
from fsr_fast.train import main as train
from tests import helpers
from tests.browser import open_page

PICTURES = 7


class Page(HTMLParser):
    """Elements of a page, with the text of headings and captions."""

    def __init__(self, path: Path) -> None:
        super().__init__()
        self.source = path.read_text()
        self.elements: list[tuple[str, dict[str, str | None]]] = []
        self.texts: list[tuple[str, str]] = []
        self._open: list[str] = []
        self.feed(self.source)

    def handle_starttag(self, tag, attributes):
        self.elements.append((tag, dict(attributes)))
        self._open.append(tag)

    def handle_data(self, data):
        if data.strip() and self._open:
            self.texts.append((self._open[-1], data.strip()))

    def all(self, tag: str) -> list[dict[str, str | None]]:
        return [attributes for name, attributes in self.elements if name == tag]

    def text(self, tag: str) -> list[str]:
        return [text for name, text in self.texts if name == tag]


def train_run(folder: Path, name: str, **changes) -> Path:
    recipe = helpers.values(
        {
            "run": {"picture_every": 2, "evaluate_every": 2, "log_every": 1},
            "optim": {"iterations": 4},
            "loss": {"segmentation_start": 0},
        },
        changes,
        root=folder / "data",
        output=folder / name,
    )
    train(["--config", str(helpers.write_config(folder / f"{name}.yaml", recipe))])
    return folder / name


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    path = tmp_path_factory.mktemp("reports")
    helpers.write_dataset(path / "data", val=PICTURES)
    train_run(path, "first")
    train_run(path, "second", mask={"ratio": 0.25}, model={"aggregation": "gap"})
    return path


@pytest.fixture(scope="module")
def report(folder) -> Path:
    main([str(folder / "first"), "--rows", "2"])
    return folder / "first" / "report.html"


@pytest.fixture(scope="module")
def comparison(folder) -> Path:
    main([str(folder / "first"), str(folder / "second"), "--rows", "1", "--output", str(folder / "both.html")])
    return folder / "both.html"


def test_the_page_holds_all_that_it_shows(report):
    page = Page(report)
    addresses = [value for _, given in page.elements for key, value in given.items() if key in ("src", "href")]
    assert all(address.startswith(("#", "data:")) for address in addresses)
    assert "default-src 'none'" in page.all("meta")[2]["content"]
    assert page.source.count("plotly.js v") == 1
    assert [path.name for path in report.parent.glob(".report*")] == []


def test_it_gives_the_scores_of_the_summary_by_class(report):
    page, summary = Page(report), json.loads((report.parent / "summary.json").read_text())
    cells = page.text("td")
    for kind in ("pseudo", "seg"):
        result = summary["results"][kind]
        for scores in result["classes"].values():
            assert f"{scores['iou']:.1f}" in cells
        assert f"{result['mean_iou']:.1f} %" in page.text("dd")


def test_curves_end_at_what_was_recorded(report):
    figures = json.loads(Page(report).source.partition('id="specifications">')[2].partition("</script>")[0])
    lines = [json.loads(line) for line in (report.parent / "metrics.jsonl").read_text().splitlines()]
    curves = {curve["name"]: curve for curve in figures["losses"]["data"]}
    logged = [line for line in lines if "loss/total" in line]
    assert curves["total"]["x"] == [line["iteration"] for line in logged]
    assert curves["total"]["y"] == [line["loss/total"] for line in logged]
    assert set(curves) == {"total", "classification", "affinity", "segmentation", "uncertain", "class token"}
    seg = next(curve for curve in figures["miou"]["data"] if curve["name"] == "seg")
    assert seg["x"] == [2, 4]
    assert seg["y"][-1] == json.loads((report.parent / "summary.json").read_text())["seg_miou"]
    assert f"Over the iterations, peak memory in GiB ends at {logged[-1]['memory_gib']:.4g}." in Page(report).source


def test_the_confusion_matrix_of_all_pictures_is_that_of_the_evaluation(report):
    figures = json.loads(Page(report).source.partition('id="specifications">')[2].partition("</script>")[0])
    counts = np.array(figures["confusion-1"]["data"][0]["customdata"])
    summary = json.loads((report.parent / "summary.json").read_text())
    expected = [scores["iou"] for scores in summary["results"]["seg"]["classes"].values()]
    union = counts.sum(0) + counts.sum(1) - counts.diagonal()
    np.testing.assert_allclose(100 * counts.diagonal() / union, expected, rtol=1e-9)


def test_the_gallery_goes_from_best_to_worst_and_knows_its_choices(report):
    page = Page(report)
    ious = [float(text.removeprefix("IoU ").partition(" ")[0]) for text in page.text("small")]
    choices = [article["data-choices"].split() for article in page.all("article")]
    assert ious == sorted(ious, reverse=True)
    assert [("best" in given) for given in choices][:2] == [True, True]
    assert [("worst" in given) for given in choices][-2:] == [True, True]
    assert all(sum(choice in given for given in choices) == 2 for choice in ("best", "worst", "random"))
    captions = page.text("figcaption")
    assert all(captions.count(title) >= len(ious) for title in ("image", "truth", "CAM", "pseudo", "seg", "CRF"))


def test_a_limit_is_said(folder, tmp_path):
    main([str(folder / "first"), "--limit", "3", "--rows", "1", "--output", str(tmp_path / "page.html")])
    assert f"From 3 of {PICTURES} pictures" in Page(tmp_path / "page.html").source


@pytest.fixture(scope="module")
def tall(tmp_path_factory) -> Path:
    """Root of a data set whose one validation picture is larger than a network takes whole."""
    root = helpers.write_dataset(tmp_path_factory.mktemp("tall") / "data", val=1)
    (name,) = (root / "ImageSets/Segmentation/val.txt").read_text().split()
    for path in (root / "JPEGImages" / f"{name}.jpg", root / "SegmentationClass" / f"{name}.png"):
        with Image.open(path) as small:
            small.resize((40, 1280), Image.Resampling.NEAREST).save(path)
    return root


@pytest.mark.parametrize(("options", "longest"), [((), 512), (("--side", "128"), 128), (("--tile", "64"), 64)])
def test_large_pictures_pass_as_in_predict(folder, tall, tmp_path, monkeypatch, options, longest):
    passed, looked_at = [], []
    run_trunk, attention = passes.run_trunk, gallery.class_attention

    def run(network, views):
        passed.extend(max(view.shape[-2:]) for view in views)
        return run_trunk(network, views)

    def look(network, images):
        looked_at.append(max(images.shape[-2:]))
        return attention(network, images)

    monkeypatch.setattr(passes, "run_trunk", run)
    monkeypatch.setattr(gallery, "class_attention", look)
    output = tmp_path / "page.html"
    main([str(folder / "first"), "--root", str(tall), "--cam.scales", "1.0", *options, "--output", str(output)])
    assert max(passed) == longest
    assert looked_at == [512]
    captions = Page(output).text("figcaption")
    assert {"image", "truth", "pseudo", "seg", "CRF"} <= set(captions)


def test_entries_of_large_pictures_are_small(folder, tall):
    trained = open_trained(folder / "first", {"data.root": Given("--root", str(tall))}, None, with_data=True)
    _, validation = build_datasets(trained.config.data, trained.network.reading)
    (entry,) = gallery.look(
        trained.network, validation, trained.config, torch.device("cpu"), limit=None, rows=1
    ).entries
    assert entry.image.shape == (320, 10, 3)
    assert {one.shape for one in (entry.truth, entry.pseudo, entry.seg, entry.crf)} == {(320, 10)}
    np.testing.assert_array_equal(entry.truth, validation.mask(0)[::4, ::4])


def test_it_is_accessible(report, comparison):
    for path in (report, comparison):
        page = Page(path)
        assert page.all("html")[0]["lang"] == "en"
        assert {"header", "nav", "main", "footer"} <= {tag for tag, _ in page.elements}
        assert all(picture["alt"] for picture in page.all("img"))
        assert len(page.all("caption")) == len(page.all("table")) > 0
        ids = [given["id"] for _, given in page.elements if "id" in given]
        assert len(ids) == len(set(ids))
        assert {given["aria-labelledby"] for _, given in page.elements if "aria-labelledby" in given} <= set(ids)
        assert {link["href"].removeprefix("#") for link in page.all("a")} <= set(ids)
        levels = [int(tag[1]) for tag, _ in page.elements if tag in ("h1", "h2", "h3", "h4")]
        assert levels.count(1) == 1
        assert all(deeper - level <= 1 for level, deeper in itertools.pairwise(levels))


def test_several_runs_are_compared(comparison):
    page = Page(comparison)
    rows = page.source.partition("<caption>Settings that differ</caption>")[2].partition("</table>")[0]
    for words in ("mask.ratio", "0.4", "0.25", "model.aggregation", "mca", "gap"):
        assert words in rows
    assert "data.root" not in rows
    figures = json.loads(page.source.partition('id="specifications">')[2].partition("</script>")[0])
    lines = {curve["name"]: curve["line"] for curve in figures["losses"]["data"]}
    assert lines["total · first"]["color"] == lines["total · second"]["color"] != lines["affinity · first"]["color"]
    assert lines["total · first"]["dash"] != lines["total · second"]["dash"]
    assert {curve["name"] for curve in figures["speed"]["data"]} == {
        "images per second · first",
        "images per second · second",
    }
    assert "its class token has no attention" in page.source


def test_a_run_that_has_not_ended_is_shown_as_far_as_it_came(folder, tmp_path):
    for name in ("config.yaml", "metrics.jsonl"):
        (tmp_path / "begun").mkdir(exist_ok=True)
        shutil.copy(folder / "first" / name, tmp_path / "begun" / name)
    main([str(tmp_path / "begun")])
    page = Page(tmp_path / "begun" / "report.html")
    assert "has not finished" in page.source
    assert page.all("article") == []
    assert any(given.get("data-chart") == "losses" for given in page.all("div"))


def test_a_run_without_masks_shows_training_pictures_and_what_its_labels_allow(folder, tmp_path):
    (tmp_path / "data").mkdir()
    for part in ("JPEGImages", "ImageSets"):
        shutil.copytree(folder / "data" / part, tmp_path / "data" / part)
    shutil.copy(folder / "data/labels.csv", tmp_path / "data")
    run = train_run(tmp_path, "unscored", data={"val_list": None})
    main([str(run), "--rows", "2"])
    page = Page(run / "report.html")
    assert len(page.all("article")) == 2
    assert "truth" not in page.text("figcaption")
    assert "best" not in page.text("label"), "they are drawn at random"
    assert {"image", "CAM", "pseudo", "seg"} <= {text.removesuffix(" (empty)") for text in page.text("figcaption")}
    assert "Scores of the image labels on training pictures, percent" in page.text("caption")
    assert "has not finished" not in page.source
    assert any(given.get("data-chart") == "losses" for given in page.all("div"))


def test_names_from_the_run_cannot_become_markup(folder, tmp_path):
    run = tmp_path / "<script>alert(1)<"
    run.mkdir()
    shutil.copy(folder / "first" / "config.yaml", run)
    shutil.copy(folder / "first" / "metrics.jsonl", run)
    shutil.copytree(run, tmp_path / "other")
    main([str(run), str(tmp_path / "other"), "--output", str(tmp_path / "page.html")])
    source = (tmp_path / "page.html").read_text()
    assert "&lt;script&gt;alert(1)" in source
    assert "<script>alert(1)" not in source


def test_what_is_no_run_is_refused_and_nothing_is_written(folder, tmp_path):
    (tmp_path / "empty").mkdir()
    with pytest.raises(UserError, match=r"empty: not a run \(it has no config.yaml\)"):
        main([str(tmp_path / "empty")])
    with pytest.raises(UserError, match="two of them have the same name"):
        main([str(folder / "first"), str(folder / "first")])
    with pytest.raises(UserError, match="--rows: 0; expected 1 or more"):
        main([str(folder / "first"), "--rows", "0"])
    broken = tmp_path / "broken"
    broken.mkdir()
    shutil.copy(folder / "first" / "config.yaml", broken)
    (broken / "summary.json").write_text("{")
    with pytest.raises(UserError, match=r"summary\.json: not JSON"):
        main([str(broken)])
    assert not list(tmp_path.rglob("*.html"))


@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_a_browser_shows_every_chart_and_logs_nothing(report, tmp_path, scheme):
    with open_page(report.as_uri(), scheme, offline=True) as page:
        charts = page.locator("[data-chart]")
        assert charts.count() == 8
        assert page.locator("[data-chart] svg.main-svg").count() >= charts.count()
        assert page.locator("html").get_attribute("data-theme") == scheme
        page.screenshot(path=tmp_path / "page.png")
        with Image.open(tmp_path / "page.png") as shown:
            corner = shown.convert("L").getpixel((3, 3))
        assert corner > 200 if scheme == "light" else corner < 60
        page.get_by_role("button", name="Dark colours").press("Enter")
        assert page.locator("html").get_attribute("data-theme") != scheme


def test_the_gallery_and_the_training_pictures_are_chosen_by_keyboard(report):
    with open_page(report.as_uri()) as page:
        page.get_by_role("radio", name="all").press("ArrowRight")
        page.get_by_role("radio", name="best").press("ArrowRight")
        assert page.locator("article:visible").count() == 2
        ious = [float(text.split()[1]) for text in page.locator("article:visible small").all_text_contents()]
        assert ious == sorted(ious)
        slider = page.get_by_role("slider")
        before = page.locator("[data-snapshots] img:visible").get_attribute("data-iteration")
        slider.press("ArrowLeft")
        assert (page.locator("[data-snapshots] img:visible").get_attribute("data-iteration"), before) == ("2", "4")
