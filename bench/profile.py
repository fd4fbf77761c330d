"""Where a step's time goes, kernel by kernel: ``python -m bench.profile --batch 16 --amp bf16 --compile --graphs``.

Takes the options of ``python -m bench.step``. With ``FSR_RECORD=1`` the kernels are recorded; ``python -m bench.plot``
sums them by part of the step.
"""

import re
import sys
import time
from collections.abc import Sequence
from dataclasses import asdict
from typing import Any

import torch
from torch.autograd import DeviceType
from torch.profiler import ProfilerActivity, profile

from bench.harness import record
from bench.markdown import table
from bench.step import Setting, Technique, read_options, running

PARTS = {
    "attention": r"flash|sdpa|fmha|compute_dot_do_o|convert_dq",
    "convolutions": r"convol|conv::|fprop|dgrad|wgrad|[nN]chwTo|[nN]hwcTo",
    "matrix products": r"nvjet|gemm|gemv|cublas|cutlass|aten::(add|b)?mm",
    "compiled element-wise operations of the blocks": r"triton_",
    "bicubic resizing": r"bicubic",
    "optimiser, average": r"multi_tensor_apply",
    "torch's other kernels": r"at::|at_cuda|Memset|Memcpy|cub::",
    "our kernels": r"_kernel$|^_[a-z]+$",
}
"""Parts of a step by what is in the names of their kernels; the first that fits counts."""


def profile_step(setting: Setting, technique: Technique, device: torch.device, iterations: int = 3) -> dict[str, Any]:
    """Profile iterations of one setting, after those that warm up.

    Args:
        setting: what is computed.
        technique: how.
        device: where. On a CPU, operators take the place of kernels.
        iterations: number of profiled iterations.

    Returns:
        `milliseconds` of an iteration, of them `host_milliseconds` until all was launched, and `kernels`: milliseconds
        and number per iteration of each, the longest first.
    """
    on_gpu = device.type == "cuda"
    activities = [ProfilerActivity.CPU, *[ProfilerActivity.CUDA] * on_gpu]
    with running(setting, technique, device) as iterate:
        for number in range(technique.warm_up):
            iterate(number)
        if on_gpu:
            torch.cuda.synchronize(device)
        with profile(activities=activities) as profiler:
            began = time.perf_counter()
            for number in range(technique.warm_up, technique.warm_up + iterations):
                iterate(number)
            launched = time.perf_counter() - began
            if on_gpu:
                torch.cuda.synchronize(device)
            took = time.perf_counter() - began
    kernels = {}
    for event in profiler.key_averages():
        microseconds = event.self_device_time_total if on_gpu else event.self_cpu_time_total
        ran_there = not on_gpu or event.device_type == DeviceType.CUDA
        if ran_there and microseconds > 0 and not event.is_user_annotation:
            kernels[event.key] = (microseconds * 1e-3 / iterations, event.count / iterations)
    return {
        "milliseconds": took * 1e3 / iterations,
        "host_milliseconds": launched * 1e3 / iterations,
        "kernels": dict(sorted(kernels.items(), key=lambda item: -item[1][0])),
    }


def sum_parts(kernels: dict[str, Sequence[float]]) -> dict[str, tuple[float, float]]:
    """Sum milliseconds and numbers of kernels by part of the step, in the order of PARTS."""
    sums = dict.fromkeys([*PARTS, "other"], (0.0, 0.0))
    for name, (milliseconds, count) in kernels.items():
        part = next((part for part, pattern in PARTS.items() if re.search(pattern, name)), "other")
        sums[part] = (sums[part][0] + milliseconds, sums[part][1] + count)
    return {part: values for part, values in sums.items() if values[1]}


def tabulate_profiles(records: list[dict[str, dict[str, Any]]]) -> str:
    """Return the table of parts, a column per profile."""
    profiles = [content for cases in records for content in cases.values()]
    sums = [sum_parts(content["kernels"]) for content in profiles]
    rows = []
    for part in [*PARTS, "other"]:
        if any(part in one for one in sums):
            rows.append(
                [part, *(f"{one[part][0]:.1f} ms ({one[part][1]:.0f})" if part in one else "-" for one in sums)]
            )
    total = (sum(milliseconds for milliseconds, _ in one.values()) for one in sums)
    rows.append(["**kernels together**", *(f"**{value:.1f} ms**" for value in total)])
    rows.append(["an iteration", *(f"{content['milliseconds']:.1f} ms" for content in profiles)])
    return table(["part", *(content["title"] for content in profiles)], rows, right=len(profiles))


def main(arguments: Sequence[str]) -> None:
    """Profile the setting given on the command line, and print the parts and the longest kernels."""
    _, setting, technique = read_options(arguments, "python -m bench.profile", __doc__)
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    found = profile_step(setting, technique, device)
    print(f"{found['milliseconds']:.1f} ms, the host launched for {found['host_milliseconds']:.1f} ms of them")
    for part, (milliseconds, count) in sum_parts(found["kernels"]).items():
        print(f"{milliseconds:9.3f} ms {count:7.1f} x {part}")
    for name, (milliseconds, count) in list(found["kernels"].items())[:40]:
        print(f"{milliseconds:9.3f} ms {count:7.1f} x   {name[:100]}")
    title = f"{setting.preset}, batch {setting.batch}"
    record(
        f"profile {title}",
        device,
        {"title": title, "setting": asdict(setting), "technique": asdict(technique), **found},
    )


if __name__ == "__main__":
    main(sys.argv[1:])
