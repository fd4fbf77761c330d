import json
from contextlib import contextmanager
from types import SimpleNamespace

import pytest
import torch
from torch._inductor import config as inductor

from bench import profile, step
from bench.harness import RESULTS
from bench.profile import PARTS, profile_step, sum_parts, tabulate_profiles
from bench.step import Setting, Technique

RECORDED = [case for file in RESULTS.glob("*/profile.json") for case in json.loads(file.read_text()).items()]


def test_the_operators_of_a_step_are_listed_with_their_times_the_longest_first():
    setting = Setting(backbone="vit_tiny_patch16_224", batch=1, size=64)
    found = profile_step(setting, Technique(), torch.device("cpu"), iterations=2)
    times = [milliseconds for milliseconds, _ in found["kernels"].values()]
    assert times == sorted(times, reverse=True)
    assert 0.5 * found["milliseconds"] < sum(times) <= found["milliseconds"]
    assert found["kernels"]["fsr::refine_pseudo_labels"][1] == 1, "once per iteration"


@pytest.mark.parametrize(("graphs", "warm_up"), [(False, 1), (True, 4)])
def test_iterations_are_timed_once_graphs_are_replayed(monkeypatch, graphs, warm_up):
    numbers: list[int] = []

    @contextmanager
    def running(*_):
        yield lambda number: numbers.append(number) or SimpleNamespace(work=None)

    monkeypatch.setattr(step, "running", running)
    monkeypatch.setattr(step, "measure_ceiling", lambda *_: 1.0)
    monkeypatch.setattr(profile, "running", running)
    for call in (step.measure, profile.profile_step):
        numbers.clear()
        call(Setting(), Technique(graphs=graphs), torch.device("cpu"), 2)
        assert numbers == list(range(warm_up + 2))
    numbers.clear()
    step.measure(Setting(), Technique(graphs=graphs), torch.device("cpu"), 2, warm_up=0)
    assert numbers == [0, 1]


def test_products_are_tuned_while_a_technique_runs_that_says_so():
    setting = Setting(backbone="vit_tiny_patch16_224", batch=1, size=64)
    for tune in (True, False):
        with step.running(setting, Technique(tune=tune), torch.device("cpu")):
            assert inductor.max_autotune_gemm == tune
    assert not inductor.max_autotune_gemm


@pytest.mark.parametrize(("case", "content"), RECORDED, ids=[case for case, _ in RECORDED])
def test_every_recorded_kernel_belongs_to_a_part(case, content):
    sums = sum_parts(content["kernels"])
    assert set(sums) <= set(PARTS)
    together = sum(milliseconds for milliseconds, _ in sums.values())
    assert together == pytest.approx(sum(milliseconds for milliseconds, _ in content["kernels"].values()))
    assert together < content["milliseconds"]


def test_parts_stand_side_by_side():
    kernels = {"flash_fwd": [2.0, 12.0], "nvjet_a": [3.0, 4.0], "_refine": [0.5, 1.0], "at::bicubic": [1.0, 2.0]}
    first = {"title": "before", "milliseconds": 7.0, "kernels": kernels}
    second = {"title": "now", "milliseconds": 4.0, "kernels": {"nvjet_a": [3.0, 4.0]}}
    assert tabulate_profiles([{"one": first, "two": second}]).splitlines() == [
        "| part | before | now |",
        "|---|---:|---:|",
        "| attention | 2.0 ms (12) | - |",
        "| matrix products | 3.0 ms (4) | 3.0 ms (4) |",
        "| bicubic resizing | 1.0 ms (2) | - |",
        "| our kernels | 0.5 ms (1) | - |",
        "| **kernels together** | **6.5 ms** | **3.0 ms** |",
        "| an iteration | 7.0 ms | 4.0 ms |",
    ]
