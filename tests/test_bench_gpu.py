import importlib
import json
import subprocess
import sys

import pytest
import torch

from bench import gpu, step
from fsr_fast import reference
from fsr_fast.config import dump_config, load_config
from fsr_fast.errors import UserError

CPU = torch.device("cpu")


def printing(text: str, code: int = 0) -> list[str]:
    return [sys.executable, "-c", f"print({text!r}); raise SystemExit({code})"]


def test_every_part_is_run_once_and_noted(tmp_path):
    parts = {"good": printing("3 passed in 1s"), "bad": printing("1 failed, 2 passed in 1s", 1)}
    done = gpu.run_parts(parts, tmp_path, "abc")
    assert {name: (part["passed"], part["tests"]) for name, part in done.items()} == {
        "good": (True, 3),
        "bad": (False, 2),
    }
    assert json.loads((tmp_path / "parts.json").read_text()) == {"commit": "abc", "parts": done}
    assert "1 failed" in (tmp_path / "bad.log").read_text()


def test_only_what_has_not_passed_is_run_again_at_the_same_commit(tmp_path):
    first = {"good": printing("3 passed"), "bad": printing("1 failed", 1)}
    gpu.run_parts(first, tmp_path, "abc")
    second = {"good": printing("never run", 1), "bad": printing("1 passed")}
    assert all(part["passed"] for part in gpu.run_parts(second, tmp_path, "abc").values())
    assert not gpu.run_parts(second, tmp_path, "another")["good"]["passed"]


def test_no_part_is_begun_when_the_time_is_over(tmp_path):
    ticks = iter(range(0, 10_000, 60))
    parts = {str(number): printing("1 passed") for number in range(5)}
    done = gpu.run_parts(parts, tmp_path, "abc", minutes=4, clock=lambda: next(ticks))
    assert list(done) == ["0", "1"]
    assert list(gpu.run_parts(parts, tmp_path, "abc")) == list(parts)


def test_a_part_that_hangs_is_stopped_and_has_failed(tmp_path, monkeypatch):
    monkeypatch.setattr(gpu, "LONGEST", 0.5)
    done = gpu.run_parts({"long": [sys.executable, "-c", "import time; time.sleep(60)"]}, tmp_path, "abc")
    assert (done["long"]["passed"], done["long"]["last"]) == (False, "stopped after 0.5 s")


def test_a_file_without_gpu_tests_is_no_failure(tmp_path):
    parts = {"none": printing("12 deselected in 1s", 5), "broken": printing("no tests ran", 5)}
    done = gpu.run_parts(parts, tmp_path, "abc")
    assert (done["none"]["passed"], done["broken"]["passed"]) == (True, False)


def test_all_kernels_and_benches_have_a_part():
    parts = gpu.list_parts()
    for name in ("check kernels", "check the rest", "bench test_step official", "bench test_affinity_loss"):
        assert name in parts


def test_the_tests_of_a_part_are_counted(tmp_path):
    command = gpu.list_parts()["bench test_crf"]
    small = [*command[: command.index("pytest") + 1], "tests/test_rounding.py", "-k", "directions"]
    part = gpu.run_parts({"check": small}, tmp_path, "abc")["check"]
    assert part["passed"]
    assert part["tests"] > 0


def test_the_parts_that_tell_the_most_come_first():
    names = list(gpu.list_parts())
    steps = ["bench test_step attention_backends", "bench test_step paper-vit_base", "step ours", "profile"]
    assert names[:5] == ["check kernels", *steps]
    order = [names.index(name) for name in ("bench test_data", "bench test_crf", "train fast", "check the rest")]
    assert order == sorted(order)


def test_a_rehearsal_starts_every_part_without_its_work_and_names_those_that_fail(tmp_path, capsys):
    code = "import sys; print(sys.argv[1:]); raise SystemExit(3 * ('bad' in sys.argv))"
    parts = {
        "check one": [sys.executable, "-c", code, "pytest"],
        "train one": [sys.executable, "-c", code, "train"],
        "train two": [sys.executable, "-c", code, "train", "bad"],
    }
    assert gpu.rehearse(parts, tmp_path) == ["train two"]
    printed = capsys.readouterr().out
    assert "check one: starts, ['pytest', '--collect-only']" in printed
    assert "train one: starts, ['train', '--print-config']" in printed
    assert "train two: FAILS" in printed


def test_parts_that_are_no_tests_resolve_their_settings(monkeypatch, capsys):
    parts = {name: command for name, command in gpu.list_parts().items() if "pytest" not in command}
    assert list(parts) == ["step ours", "profile", "step reference", "train fast", "train reference"]
    for name, (_, _, module, *arguments) in parts.items():
        if module in ("bench.step", "bench.profile"):
            with pytest.raises(SystemExit):
                importlib.import_module(module).main([*arguments, "--print-config"])
        else:
            assert arguments.pop(0) == "train"
            print(dump_config(load_config(arguments)[0]))
        assert f"engine: {'reference' if 'reference' in name else 'fast'}" in capsys.readouterr().out


def test_every_test_of_a_bench_in_several_parts_is_in_one_of_them():
    for name, chosen in gpu.SPLIT.items():
        command = [sys.executable, "-m", "pytest", "--collect-only", f"bench/{name}.py"]
        listed = subprocess.run(command, cwd=gpu.ROOT, capture_output=True, text=True, check=True).stdout
        tests = [line.partition("::")[2] for line in listed.splitlines() if "::" in line]
        assert tests
        assert all(sum(part in test for part in chosen) == 1 for test in tests), tests


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_without_a_gpu_it_says_what_to_run_instead():
    with pytest.raises(UserError, match="no CUDA GPU; on a CPU, make test"):
        gpu.main([])


def test_the_reference_s_energy_is_ours_on_a_gpu_alone():
    generator = torch.Generator().manual_seed(0)
    logits, images = (torch.randn(1, channels, 8, 8, generator=generator) for channels in (5, 3))
    given = logits, 50 * images, torch.zeros(1, 8, 8, dtype=torch.uint8)
    for kind in ("cpu", "cuda"):
        with step._technique(step.Technique(engine="reference"), torch.device(kind)):
            assert (reference.losses.dense_energy is step._fast_energy) == (kind == "cuda")
            found = reference.losses.energy_loss(*given)
        torch.testing.assert_close(found, reference.losses.energy_loss(*given), rtol=1e-4, atol=0)


@pytest.mark.parametrize("engine", ["fast", "reference"])
def test_a_step_of_either_engine_is_timed(engine):
    setting = step.Setting(backbone="vit_tiny_patch16_224", batch=2, size=64)
    row = step.measure(setting, step.Technique(engine), CPU, 1, warm_up=0)
    assert row["images_per_second"] == pytest.approx(2 / row["seconds"])
    assert ("units" in row) == (engine == "fast")


@pytest.mark.parametrize("preset", step.PRESETS)
def test_a_step_of_either_engine_computes_the_same(preset):
    setting = step.Setting(preset, "vit_tiny_patch16_224", batch=2, size=64)
    losses = []
    for technique in (step.Technique(), step.Technique("reference"), step.Technique("reference", attention="fused")):
        with step.running(setting, technique, CPU) as iterate:
            losses.append(iterate(0).losses)
    torch.testing.assert_close(losses[0], losses[1], rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(losses[1], losses[2], rtol=1e-4, atol=1e-5)
