"""The state of a training as data: nested plain values and tensors, apart and together again, and random generators."""

from __future__ import annotations

import random
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import numpy as np
import torch
from torch import Tensor

_TENSOR, _TUPLE, _MAPPING = "tensor", "tuple", "mapping"
_PLAIN = (str, int, float, bool, type(None))


def separate(tree: Any, tensors: dict[str, Tensor], *, name: str) -> Any:
    """Nested dicts, lists, tuples and numbers as JSON can hold them exactly, the tensors put into ``tensors``.

    Whatever is neither is refused: nothing is ever pickled.
    """
    if isinstance(tree, np.ndarray):
        tree = torch.from_numpy(tree.copy())
    if isinstance(tree, Tensor):
        tensors[name] = tree.detach().cpu().contiguous().clone()  # a clone: no two entries may share memory
        return {_TENSOR: name}
    if isinstance(tree, dict):
        pairs = [[separate_key(key), separate(value, tensors, name=f"{name}.{key}")] for key, value in tree.items()]
        return {_MAPPING: pairs}
    if isinstance(tree, list | tuple):
        items = [separate(value, tensors, name=f"{name}.{index}") for index, value in enumerate(tree)]
        return {_TUPLE: items} if isinstance(tree, tuple) else items
    if isinstance(tree, _PLAIN):
        return tree
    if isinstance(tree, np.generic):
        return tree.item()
    raise TypeError(f"{name} is a {type(tree).__name__}, which a checkpoint cannot hold")


def separate_key(key: object) -> str | int:
    """A key of a mapping: text or a whole number, both kept as they are."""
    if not isinstance(key, str | int):
        raise TypeError(f"a checkpoint cannot hold a mapping with the key {key!r}")
    return key


def joined(plain: Any, tensors: dict[str, Tensor]) -> Any:
    """The inverse of ``separate``."""
    if isinstance(plain, list):
        return [joined(value, tensors) for value in plain]
    if not isinstance(plain, dict):
        return plain
    ((kind, value),) = plain.items()
    if kind == _TENSOR:
        return tensors[value]
    if kind == _TUPLE:
        return tuple(joined(item, tensors) for item in value)
    return {key: joined(item, tensors) for key, item in value}


def random_state(device: torch.device) -> dict[str, Any]:
    """Every random generator that a training draws from: Python's, numpy's (timm's Mixup), torch's, the device's."""
    state: dict[str, Any] = {
        "python": random.getstate(),
        "numpy": np.random.get_state(),
        "torch": torch.get_rng_state(),
    }
    if device.type == "cuda":
        state["cuda"] = torch.cuda.get_rng_state(device)
    return state


def set_random_state(state: dict[str, Any], device: torch.device) -> None:
    """Put the generators back as ``random_state`` saw them."""
    random.setstate(state["python"])
    algorithm, keys, *rest = state["numpy"]
    np.random.set_state((algorithm, np.asarray(keys), *rest))
    torch.set_rng_state(state["torch"])
    if device.type == "cuda" and "cuda" in state:
        torch.cuda.set_rng_state(state["cuda"], device)


@contextmanager
def own_randomness(seed: int, device: torch.device) -> Iterator[None]:
    """Seed every generator, and leave the caller's as they were."""
    before = random_state(device)
    random.seed(seed)
    np.random.seed(seed % 2**32)
    torch.manual_seed(seed)
    try:
        yield
    finally:
        set_random_state(before, device)
