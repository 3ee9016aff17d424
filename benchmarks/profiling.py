"""Where the time goes, op by op."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch.profiler import ProfilerActivity, profile

from benchmarks.report import table
from benchmarks.timing import seconds


def profile_ops(run: Callable[[], Any], device: torch.device, *, passes: int = 3, top: int = 14) -> dict[str, Any]:
    """The ops that take longest: own time in the least disturbed of some passes, on the device for CUDA. Kernels count
    for the op that launched them.

    ``pass_ms`` is the quickest pass without the profiler, ``busy_ms`` the sum over all ops: on CUDA what lies between
    the two is the device waiting for its host.
    """
    cuda = device.type == "cuda"
    run()
    quickest = min(seconds(run, device) for _ in range(passes))
    activities = [ProfilerActivity.CPU, *([ProfilerActivity.CUDA] if cuda else [])]
    profiled = []
    for _ in range(passes):
        with profile(activities=activities) as recorded:
            seconds(run, device)
        profiled.append(_own_times(recorded, cuda=cuda))
    ops = min(profiled, key=_total)
    return {"pass_ms": 1e3 * quickest, "busy_ms": _total(ops), "ops": ops[:top]}


def _own_times(recorded: profile, *, cuda: bool) -> list[dict[str, Any]]:
    ops = []
    for event in recorded.key_averages():
        own = event.self_device_time_total if cuda else event.self_cpu_time_total
        if event.device_type.name == "CPU" and own > 0:  # the kernels of a device have lines of their own
            ops.append({"op": event.key, "ms": own / 1e3, "calls": event.count})
    return sorted(ops, key=lambda op: -op["ms"])


def _total(ops: list[dict[str, Any]]) -> float:
    return sum(op["ms"] for op in ops)


def profile_table(profiles: dict[str, dict[str, Any]]) -> str:
    """The variants side by side: milliseconds and calls of each op."""
    names = list(profiles)
    ops: dict[str, float] = {}
    for known in profiles.values():
        for op in known["ops"]:
            ops[op["op"]] = max(ops.get(op["op"], 0.0), op["ms"])
    lines = [
        ["**one pass**", *(f"{profiles[name]['pass_ms']:.1f}" for name in names)],
        ["**all ops**", *(f"{profiles[name]['busy_ms']:.1f}" for name in names)],
    ]
    for op in sorted(ops, key=lambda op: -ops[op]):
        cells = []
        for name in names:
            own = [entry for entry in profiles[name]["ops"] if entry["op"] == op]
            cells.append(f"{own[0]['ms']:.2f} ({own[0]['calls']})" if own else "")
        lines.append([f"`{op}`", *cells])
    return table(["own ms a pass (calls)", *names], lines)
