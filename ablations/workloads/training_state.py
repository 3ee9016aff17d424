"""Where the training of a small model stands, in a file, so that one that was stopped goes on to the same bits."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor, nn

from ablations.records.files import atomic

Curve = list[dict[str, float]]


def keep(path: Path, trained: nn.Module, optimizer: Any, step: int, curve: Curve) -> None:
    """Write where a training stands after so many steps."""
    tensors = {f"model.{name}": value for name, value in trained.state_dict().items()}
    for number, slots in optimizer.state_dict()["state"].items():
        tensors |= {f"optimizer.{number}.{name}": torch.as_tensor(value) for name, value in slots.items()}
    tensors = {name: value.contiguous() for name, value in tensors.items()}
    with atomic(path) as temporary:
        save_file(tensors, temporary, metadata={"at": json.dumps({"step": step, "curve": curve})})


def restore(path: Path, trained: nn.Module, optimizer: Any) -> tuple[int, Curve]:
    """Go on from what ``keep`` wrote; the steps that are done, and the curve so far."""
    slots: dict[int, dict[str, Any]] = {}
    weights: dict[str, Tensor] = {}
    with safe_open(path, framework="pt") as file:
        at = json.loads(file.metadata()["at"])
        for key in file.keys():  # noqa: SIM118 (no mapping)
            owner, _, name = key.partition(".")
            value = file.get_tensor(key)
            if owner == "model":
                weights[name] = value
            else:
                number, _, slot = name.partition(".")
                slots.setdefault(int(number), {})[slot] = bool(value) if value.dtype == torch.bool else value
    trained.load_state_dict(weights)
    optimizer.load_state_dict({**optimizer.state_dict(), "state": slots})
    return int(at["step"]), at["curve"]
