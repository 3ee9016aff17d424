"""Checkpoints: one safetensors file, tensors beside JSON, written whole or not at all, read without running anything.

A checkpoint names what it belongs to (recipe, initial weights, training images, version of the code) and is refused
by any other training.
"""

from __future__ import annotations

import json
import logging
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from ablations.measure.finetune.training_state import joined, separate
from ablations.records.files import atomic
from reducers.digest import tensors_digest

log = logging.getLogger(__name__)

_KEY = "sievit"


class CheckpointError(ValueError):
    """A checkpoint that cannot be gone on from; the message says why."""


class OtherTraining(CheckpointError):
    """A whole checkpoint, but of another training."""


def save(path: Path, *, identity: Mapping[str, Any], state: Mapping[str, Any]) -> None:
    """Write a checkpoint atomically: whoever reads the path sees the one before or this one."""
    tensors: dict[str, Tensor] = {}
    plain = separate(dict(state), tensors, name="state")
    text = json.dumps({"identity": dict(identity), "plain": plain, "sha256": _digest(tensors)})
    path.parent.mkdir(parents=True, exist_ok=True)
    with atomic(path) as temporary:
        save_file(tensors, temporary, metadata={_KEY: text})


def load(path: Path, *, identity: Mapping[str, Any]) -> dict[str, Any] | None:
    """The state in a checkpoint, on the CPU; None where there is none.

    Raises:
        OtherTraining: it belongs to another recipe, other weights or other images.
        CheckpointError: it is damaged.
    """
    try:
        with safe_open(path, framework="pt") as file:
            saved = json.loads((file.metadata() or {})[_KEY])
            tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 (no mapping)
        found, plain = saved["identity"], saved["plain"]
        if saved["sha256"] != _digest(tensors):
            raise ValueError("its tensors are not those that were written")
    except FileNotFoundError:
        return None
    except (SafetensorError, OSError, KeyError, TypeError, ValueError, RecursionError) as error:
        raise CheckpointError(f"{path} is no whole checkpoint ({type(error).__name__}: {error})") from error
    wanted = json.loads(json.dumps(dict(identity)))
    if found != wanted:
        raise OtherTraining(
            f"{path} belongs to another training ({_differences(found, wanted)}); "
            "write to another place, or remove it to begin afresh"
        )
    try:
        state: dict[str, Any] = joined(plain, tensors)
    except (KeyError, TypeError, ValueError) as error:
        raise CheckpointError(f"{path} is no whole checkpoint ({type(error).__name__}: {error})") from error
    return state


def _digest(tensors: Mapping[str, Tensor]) -> str:
    return tensors_digest(dict(sorted(tensors.items())))


def load_or_start_afresh(path: Path, *, identity: Mapping[str, Any]) -> dict[str, Any] | None:
    """As ``load``, but a damaged file is reported and passed over; another training's is still refused."""
    try:
        return load(path, identity=identity)
    except OtherTraining:
        raise
    except CheckpointError as error:
        log.warning("%s: the training starts afresh", error)
        return None


def _differences(found: Any, wanted: Any) -> str:
    """``recipe.lr 0.001 instead of 0.0001; weights …``"""
    flat_found, flat_wanted = _flat(found), _flat(wanted)
    names = [name for name in {**flat_wanted, **flat_found} if flat_found.get(name) != flat_wanted.get(name)]
    shown = [f"{name} {_short(flat_found.get(name))} instead of {_short(flat_wanted.get(name))}" for name in names[:4]]
    return "; ".join(shown + ([f"and {len(names) - 4} more"] if len(names) > 4 else []))


def _flat(tree: Any, name: str = "") -> dict[str, Any]:
    if not isinstance(tree, dict):
        return {name: tree}
    parts = (_flat(value, f"{name}.{key}" if name else key) for key, value in tree.items())
    return {key: value for part in parts for key, value in part.items()}


def _short(value: Any) -> str:
    text = json.dumps(value)
    return text if len(text) <= 40 else f"{text[:37]}..."
