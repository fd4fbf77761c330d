import json
import xml.etree.ElementTree as ElementTree
from pathlib import Path

import pytest

from bench import plot, tabulate

ROW = {"seconds": 4.0, "images_per_second": 0.5, "peak_gib": 3.25}
OURS = {
    "seconds": 2.0,
    "images_per_second": 1.0,
    "peak_gib": 2.0,
    "units": 13.8,
    "tflops_per_second": 0.1,
    "of_ceiling": 0.5,
}
SETTING = {"preset": "paper", "backbone": "vit", "batch": 2, "size": 448}


def cases(device: str) -> tabulate.Cases:
    technique = {"engine": "fast", "amp": "bf16"}
    return {
        "step paper": {"device": device, "setting": SETTING, "technique": technique, "rows": [OURS]},
        "step waterfall paper vit": {"device": device, "setting": SETTING, "rows": {"reference": ROW, "ours": OURS}},
    }


@pytest.fixture
def results(tmp_path):
    for device in ("cpu-x", "NVIDIA-H200"):
        (tmp_path / device).mkdir()
        (tmp_path / device / "step.json").write_text(json.dumps(cases(device)))
    return tmp_path


def test_a_gpu_s_records_come_before_a_cpu_s(results):
    assert [record["step paper"]["device"] for record in tabulate.read_cases(results, "step")] == [
        "NVIDIA-H200",
        "cpu-x",
    ]


def test_the_table_holds_the_recorded_figures(results):
    rows = tabulate.tabulate_steps(tabulate.read_cases(results, "step")).splitlines()[2:]
    assert rows[0] == "| NVIDIA-H200 | paper | vit | 448², 2 | fast | bf16 | 2 | 1 | 0.1 (50%) | 2 GiB |"
    assert len(rows) == 2


def test_the_table_says_what_was_switched_on(results):
    record = tabulate.read_cases(results, "step")[0]
    record["step paper"]["technique"] |= {"graphs": True, "fp8": False}
    assert "| fast | bf16, graphs | 2 |" in tabulate.tabulate_steps([record])


def test_a_second_share_is_that_of_the_dense_peak(results):
    record = tabulate.read_cases(results, "step")[0]
    record["step paper"]["rows"][0]["of_peak"] = 0.4
    assert "| 0.1 (50%, 40%) |" in tabulate.tabulate_steps([record])


def test_a_kernel_s_time_is_that_of_its_graph_where_it_was_taken(tmp_path):
    rows = [{"implementation": "ours", "phase": "forward", "median_ms": 2.0, "graph_ms": 0.5, "roofline_percent": 40.0}]
    (tmp_path / "gpu").mkdir()
    (tmp_path / "gpu" / "op.json").write_text(json.dumps({"op": {"device": "gpu", "rows": rows}}))
    assert tabulate.tabulate_kernels(tmp_path).endswith("| - | - | 0.5 ms | 40 % |")


def test_kernels_are_tabulated_by_phase(tmp_path):
    rows = [
        {"implementation": name, "phase": phase, "median_ms": time, "roofline_percent": 40.0}
        for phase in ("forward", "forward + backward")
        for name, time in (("eager", 8.0), ("ours", 2.0))
    ]
    (tmp_path / "gpu").mkdir()
    (tmp_path / "gpu" / "op.json").write_text(json.dumps({"op bf16": {"device": "gpu", "rows": rows}}))
    forward, both = tabulate.tabulate_kernels(tmp_path).splitlines()[2:]
    assert forward == "| op bf16 | gpu | forward | 8 ms | - | 2 ms | 40 % |"
    assert "forward + backward" in both


def test_tiles_are_tabulated_with_scores_where_there_are_masks():
    tiling = {"tile": 64, "overlap": 0.25, "pictures": 2, "differ": 1.5, "beside_seams": 2.25, "pseudo_differ": 0.125}
    known = {"tilings": [{**tiling, "mean_iou": 80.0}, {**tiling, "overlap": 0.5}], "whole_mean_iou": 79.96}
    unknown = {"tilings": [{**tiling, "mean_iou": None}], "whole_mean_iou": None}
    table = tabulate.tabulate_tiles([{"tiles creatures": known, "tiles photographs": unknown}])
    assert table.splitlines()[2:] == [
        "| creatures (2) | 64 | 1.50 % | 2.25 % | 0.12 % | 80.0 | 80.0 |",
        "| photographs (2) | 64 | 1.50 % | 2.25 % | 0.12 % | - | - |",
    ]


def test_large_pictures_are_tabulated_by_megapixel():
    rows = [
        {"tile": tile, "megapixels": 2.0, "seconds": 9.0, "start_mib": 512.0, "peak_mib": 1024.0} for tile in (None, 64)
    ]
    assert tabulate.tabulate_large([{"evaluation_cost": {"rows": rows}}]).splitlines()[2:] == [
        "| whole | 2 | 9 | 4.5 | 1.00 GiB |",
        "| tiles of 64 | 2 | 9 | 4.5 | 1.00 GiB |",
    ]


def test_the_speed_of_waiting_threads_is_tabulated_alone_and_beside_another_process():
    rates = {"openmp": [100.0, 102.0], "10,000 turns": [90.0, 92.0], "passive": [80.0, 82.0]}
    halves = {name: [rate / 2 for rate in values] for name, values in rates.items()}
    record = {
        f"waiting {others} {threads}": {"threads": threads, "pictures_per_second": found}
        for others, found in enumerate((rates, halves))
        for threads in (1, 2)
    }
    rows = tabulate.tabulate_waiting([record]).splitlines()[2:]
    assert rows[0] == "| 2 | OpenMP's default, 300,000 turns | 100, 102: 101 ± 1.4 | 50, 51: 50 ± 0.7 |"
    assert [row[:5] for row in rows] == ["| 2 |"] * 3 + ["| 1 |"] * 3


@pytest.mark.parametrize(("device", "panels"), [("cpu-x", 1), ("NVIDIA-H200", 2)])
def test_the_waterfall_shows_every_technique_and_memory_on_a_gpu(tmp_path, device, panels):
    plot.draw_waterfall(cases(device), tmp_path / "waterfall.svg")
    text = "".join(ElementTree.parse(tmp_path / "waterfall.svg").getroot().itertext())
    assert "reference" in text
    assert "x2)" in text, "the last bar says how many times the first it is"
    assert text.count("ours") == panels


TABLES = {
    f"tables 4 {row}": {
        "table": 4,
        "row": row,
        "seeds": {str(seed): {"pseudo": score + seed, "seg": score - seed} for seed in range(3)},
    }
    for row, score in (("both", 70.0), ("none", 60.0))  # not in the paper's order
}


def test_the_rows_of_a_table_are_tabulated_seed_by_seed():
    none, both = tabulate.tabulate_rows([TABLES], 4).splitlines()[2:]
    assert none == "| none | 60.0, 61.0, 62.0: 61.0 ± 1.0 | 60.0, 59.0, 58.0: 59.0 ± 1.0 |"
    assert both.startswith("| both | 70.0")
    assert len(tabulate.tabulate_rows([TABLES], 3).splitlines()) == 2


def drawn(path: Path) -> tuple[str, int]:
    """The texts of a picture, and how many marks it has."""
    root = ElementTree.parse(path).getroot()
    return "".join(root.itertext()), sum(element.tag.endswith("use") for element in root.iter())


def test_the_rows_of_a_table_have_a_dot_per_seed(tmp_path):
    plot.draw_rows(TABLES, 4, tmp_path / "all.svg")
    fewer = {case: content | {"seeds": {"0": content["seeds"]["0"]}} for case, content in TABLES.items()}
    plot.draw_rows(fewer, 4, tmp_path / "one.svg")
    text, marks = drawn(tmp_path / "all.svg")
    assert "both" in text
    assert "pseudo, mIoU" in text
    assert marks - drawn(tmp_path / "one.svg")[1] >= 2 * 2 * 2  # two more seeds of two rows in two panels


def test_both_engines_are_drawn_with_a_line_per_seed(tmp_path):
    curve = [{"iteration": 100 * n, "wall_seconds": 9.0 * n, "pseudo_miou": 1.0, "seg_miou": 5.0 * n} for n in (1, 2)]
    records = [{f"fast {seed}": {"curve": curve} for seed in (0, 1)}]
    plot.draw_engines({"fast": records, "reference": records}, tmp_path / "engines.svg")
    text, marks = drawn(tmp_path / "engines.svg")
    assert "reference" in text
    assert "seconds" in text
    assert marks >= 2 * 2 * 2 * 2 * 2  # points, seeds, engines, panels, kinds


def test_pipelines_are_tabulated_by_their_views():
    row = {"implementation": "dali", "images_per_second": 80.0, "cpu_ms_per_image": 23.0, "host_memory_mib": 2048.0}
    cases = {"data plain": {"device": "cpu-x", "images": "photographs", "rows": [row]}}
    last = tabulate.tabulate_data([cases]).splitlines()[-1]
    assert last == "| cpu-x | plain | photographs | dali | 80 | 23 ms | 2 GiB |"


def test_a_run_is_tabulated_class_by_class():
    def scores(cat, dog):
        return {"mean": (cat + dog) / 2, "classes": {"cat": cat, "dog": dog}}

    gpu = {"photographs 0": {"device": "gpu", "pseudo": scores(60.0, 40.0), "seg": scores(61.0, 43.0)}}
    cpu = {"photographs 0": {"device": "cpu", "pseudo": scores(40.0, 20.0), "seg": scores(41.0, 23.0)}}
    assert tabulate.tabulate_classes([gpu, cpu]).splitlines() == [
        "| IoU | pseudo, gpu | seg, gpu | pseudo, cpu | seg, cpu |",
        "|---|---|---|---|---|",
        "| cat | 60.0 | 61.0 | 40.0 | 41.0 |",
        "| dog | 40.0 | 43.0 | 20.0 | 23.0 |",
        "| **mean** | 50.0 | 52.0 | 30.0 | 32.0 |",
    ]


def test_seeds_are_tabulated_with_their_worst_class_and_the_worst_of_all():
    def scores(mean, worst):
        return {"mean": mean, "classes": {"background": 90.0, "pogo": worst}}

    cases = {
        f"seeds {seed}": {"seed": seed, "pseudo": scores(70.0 + seed, 60.0 - seed), "seg": scores(80.0, 66.0 + seed)}
        for seed in (0, 2)
    }
    lines = tabulate.tabulate_seeds([cases]).splitlines()[2:]
    assert lines[1] == "| 2 | 72.0 | pogo 58.0 | 80.0 | pogo 68.0 |"
    assert lines[2] == "| **mean, worst of all** | **71.0** | **pogo 58.0** | **80.0** | **pogo 66.0** |"


def test_differences_from_the_official_code_are_tabulated_by_kind_and_in_full():
    differences = {
        "network: CAM": 2e-16,
        "network: class logits": 1e-16,
        "operation: affinity loss": 3e-16,
        "operation: dense energy": 1e-10,
        "loop: loss affinity": 4e-12,
        "loop: loss energy": 5e-10,
        "loop: mask": 0.0,
    }
    records = [{"official": {"iterations": 12, "differences": differences}}]
    assert tabulate.tabulate_official(records, whole=False).splitlines()[2:] == [
        "| network: all outputs | 2.0e-16 |",
        "| operations | 3.0e-16 |",
        "| operation: dense energy and its gradient | 1.0e-10 |",
        "| 12 iterations: losses | 4.0e-12 |",
        "| 12 iterations: energy | 5.0e-10 |",
        "| 12 iterations: mask | 0.0e+00 |",
    ]
    assert len(tabulate.tabulate_official(records, whole=True).splitlines()) == 2 + len(differences)


def test_both_settings_of_stochastic_depth_are_tabulated_seed_by_seed():
    def runs(name, *means):
        return {
            f"{name} {seed}": {"seed": seed, "pseudo": {"mean": mean}, "seg": {"mean": mean - 1}}
            for seed, mean in enumerate(means)
        }

    lines = tabulate.tabulate_depth([runs("seeds", 80.0, 84.0, 99.0)], [runs("depth", 81.0, 82.0)]).splitlines()
    assert lines[0] == "| mIoU of seeds 0, 1 | pseudo | seg |", "seeds of both alone"
    assert lines[2] == "| `shared` | 80.0, 84.0: 82.0 ± 2.8 | 79.0, 83.0: 81.0 ± 2.8 |"
    assert lines[4] == "| `shared` - `never`, seed by seed | -1.0, +2.0: +0.5 ± 2.1 | -1.0, +2.0: +0.5 ± 2.1 |"


@pytest.mark.parametrize(("limit", "part"), [(None, "evaluate"), (2000, "evaluate, 2,000 images")])
def test_rehearsals_are_tabulated_by_part(limit, part):
    measured = {"seconds": 99.0, "cpu_seconds": 12.34, "memory_mib": 512, "open_files": 9}
    content = {"layout": "coco", "part": "evaluate", "images": [82081, 40137], "limit": limit, **measured}
    last = tabulate.tabulate_rehearsal([{"rehearsal coco": content}]).splitlines()[-1]
    assert last == f"| coco | 82,081, 40,137 | {part} | 12.3 | 0.50 GiB | 9 |"


def test_sizes_are_tabulated_in_gigabytes():
    case = {"installation": "everything", "bytes": 6_609_977_316}
    assert tabulate.tabulate_sizes([{"sizes everything": case}]).splitlines()[-1] == "| everything | 6.6 GB |"


def test_figures_stand_between_their_markers_alone():
    text = "a\n<!-- figures: steps -->\nold\n<!-- end -->\nb\n<!-- figures: other -->\nkept\n<!-- end -->\n"
    filled = tabulate.fill(text, {"steps": "new"})
    assert filled == text.replace("old", "new")
    assert tabulate.fill(filled, {"steps": "new"}) == filled


def test_the_documents_hold_what_is_recorded():
    tables = tabulate.tabulate(plot.RESULTS)
    for document in plot.DOCUMENTS:
        text = document.read_text(encoding="utf-8")
        assert tabulate.fill(text, tables) == text, f"{document.name}: run python -m bench.plot"
