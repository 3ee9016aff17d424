"""Whether a device has units for bfloat16, asked before anything is computed in it.

With them it is several times as fast as float32; a CPU without converts every number there and back, and takes up to
seven times as long. A bench and every training ask here, and say what they were told.
"""

from __future__ import annotations

import contextlib
import functools
import platform
from collections.abc import Iterator
from contextlib import AbstractContextManager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import torch

from reducers.runtime.fold import Attention

Precision = Literal["float32", "bfloat16", "float16"]

_UNITS = frozenset({"avx512_bf16", "amx_bf16", "bf16", "arm_bf16"})  # x86 (two), Arm as Linux and as torch says it
_LISTED = Path("/proc/cpuinfo")


@dataclass(frozen=True)
class Arithmetic:
    """What a training computes in, beside its recipe: the same recipe gives other roundings with another one."""

    precision: Precision = "float32"  # of matrix products, under autocast; weights and sums stay in float32
    attention: Attention = "mask"  # how the sizes of tokens come in, in half precision on a GPU


def has_bfloat16(device: torch.device) -> bool:
    """Whether the device multiplies bfloat16 itself: ``avx512_bf16`` or ``amx_bf16`` of a CPU (``bf16`` of an Arm),
    Ampere or newer of Nvidia's GPUs; a device that does not tell has none.
    """
    if device.type == "cuda":
        return bool(torch.cuda.is_bf16_supported(including_emulation=False))
    return device.type == "cpu" and not _UNITS.isdisjoint(_cpu_features())


@functools.cache
def _cpu_features() -> frozenset[str]:
    """What the CPU says it can do, by Linux's words, or by torch's where the system has no such list."""
    if _LISTED.is_file():
        return features_in(_LISTED.read_text(encoding="utf-8", errors="replace"))
    tell = getattr(torch.cpu, "get_capabilities", None)  # not in the oldest torch
    known: dict[str, Any] = {} if tell is None else dict(tell())
    return frozenset(name for name, there in known.items() if there is True)


def features_in(listed: str) -> frozenset[str]:
    """The words of the first list of features in the text of ``/proc/cpuinfo``."""
    for line in listed.splitlines():
        name, _, words = line.partition(":")
        if name.strip() in ("flags", "Features"):
            return frozenset(words.split())
    return frozenset()


def precision_on(device: torch.device, wanted: Precision) -> Precision:
    """What is wanted, and float32 in place of bfloat16 where the device has no units for it."""
    return "float32" if wanted == "bfloat16" and not has_bfloat16(device) else wanted


def half_of(device: torch.device) -> Precision:
    """The half precision that a device is quick in: bfloat16, float16 of older GPUs; float32 where there is none."""
    if has_bfloat16(device):
        return "bfloat16"
    return "float16" if device.type == "cuda" else "float32"


def autocast(device: torch.device, precision: Precision) -> AbstractContextManager[Any]:
    """Matrix products in that precision."""
    half = torch.float16 if precision == "float16" else torch.bfloat16
    return torch.autocast(device.type, dtype=half, enabled=precision != "float32")


def in_words(device: torch.device, precision: Precision, *, wanted: Precision) -> str:
    """For a log: in what is computed, and why it is not what was wanted."""
    if precision == wanted:
        return f"computed in {precision}"
    name = f"this {platform.machine()} processor" if device.type == "cpu" else f"the device {device}"
    return f"computed in {precision}: {name} has no units for {wanted}, which would only be slower"


@contextlib.contextmanager
def float32_muon() -> Iterator[None]:
    """timm's Muon orthogonalises in bfloat16, which on a CPU without units for it takes longer than the model does."""
    from timm.optim import muon

    plain = muon.zeropower_via_newtonschulz
    muon.zeropower_via_newtonschulz = functools.partial(plain, dtype=torch.float32)
    try:
        yield
    finally:
        muon.zeropower_via_newtonschulz = plain
