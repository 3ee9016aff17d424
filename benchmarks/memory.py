"""Peak memory of one call, beyond what was there before it.

On CUDA the allocator knows. On a CPU nothing does, so torch.profiler writes down every allocation and every release of
tensor memory, and the largest running sum is the peak: what the tensors need, whatever the C library makes of it.
"""

from __future__ import annotations

import gc
import json
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch.profiler import ProfilerActivity, profile

HOW = {
    "cuda": "torch.cuda.max_memory_allocated during one forward pass, less what was allocated before it",
    "cpu": "largest sum of live tensor bytes during one forward pass, from torch.profiler's record of allocations",
}


def peak_bytes(run: Callable[[], Any], device: torch.device) -> int:
    """Most bytes that ``run`` held at one time; weights and inputs, which were there before, do not count."""
    gc.collect()
    if device.type == "cuda":
        torch.cuda.synchronize(device)
        before = torch.cuda.memory_allocated(device)
        torch.cuda.reset_peak_memory_stats(device)
        run()
        torch.cuda.synchronize(device)
        return torch.cuda.max_memory_allocated(device) - before
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as recorded:
        run()
    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder) / "trace.json"
        recorded.export_chrome_trace(str(file))
        events = json.loads(file.read_text(encoding="utf-8"))["traceEvents"]
    changes = sorted((event["ts"], event["args"]["Bytes"]) for event in events if event.get("name") == "[memory]")
    return _highest([change for _, change in changes])


def _highest(changes: list[int]) -> int:
    live = top = 0
    for change in changes:
        live += change
        top = max(top, live)
    return top
