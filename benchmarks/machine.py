"""The machine a measurement was made on."""

from __future__ import annotations

import os
import platform
from pathlib import Path
from typing import Any

import timm
import torch

from benchmarks import allocator


def facts(device: torch.device) -> dict[str, Any]:
    """What a reader must know to place the numbers."""
    known: dict[str, Any] = {
        "cpu": processor(),
        "cpus": os.cpu_count(),
        "threads": torch.get_num_threads(),
        "system": f"{platform.system()} {platform.machine()}",
        "python": platform.python_version(),
        "torch": torch.__version__,
        "timm": timm.__version__,
        "device": device.type,
    }
    if device.type == "cuda":
        known["gpu"] = torch.cuda.get_device_name(device)
        known["cuda"] = torch.version.cuda
    else:
        known["allocator"] = allocator.in_use()
    return known


def sentence(known: dict[str, Any]) -> str:
    """The same in one line."""
    versions = f"torch {known['torch']}, timm {known['timm']}"
    if "gpu" in known:
        return f"{known['gpu']}, CUDA {known['cuda']}, {versions}"
    return f"{known['cpu']}, {known['threads']} threads, {versions}; {known['allocator']}"


def processor() -> str:
    """The CPU by its name, where the system tells it."""
    listed = Path("/proc/cpuinfo")
    for line in listed.read_text(encoding="utf-8").splitlines() if listed.exists() else []:
        if line.startswith("model name"):
            return line.split(":", 1)[1].strip()
    return platform.processor() or platform.machine()
