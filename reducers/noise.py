"""Random numbers that belong to an image, not to a batch.

A generator would give the same image other numbers in another batch. Here every number is a hash of (seed, the image's
own pixels, block, token, draw): the same alone and in any batch, on any device, in any order of evaluation.
"""

from __future__ import annotations

import torch
from torch import Tensor

from reducers.tokens import Units

_SAMPLED_PIXELS = 1024  # enough to tell any two images apart that a user would call different


def _wrap(value: int) -> int:
    """An unsigned 64-bit constant as the signed one torch holds."""
    value &= 2**64 - 1
    return value - 2**64 if value >= 2**63 else value


_GOLDEN = _wrap(0x9E3779B97F4A7C15)
_MIX_1 = _wrap(0xBF58476D1CE4E5B9)
_MIX_2 = _wrap(0x94D049BB133111EB)


def _shift_right(value: Tensor, bits: int) -> Tensor:
    return (value >> bits) & (2 ** (64 - bits) - 1)  # logical: torch's shift keeps the sign


def _mix(value: Tensor) -> Tensor:
    """The finaliser of SplitMix64 (Steele, Lea and Flood, 2014)."""
    value = (value ^ _shift_right(value, 30)) * _MIX_1
    value = (value ^ _shift_right(value, 27)) * _MIX_2
    return value ^ _shift_right(value, 31)


def image_keys(images: Tensor) -> Tensor:
    """(B, C, H, W), or clips (B, F, C, H, W) -> (B,) int64, a hash of each one's pixels."""
    flat = images.detach().flatten(1)
    step = max(1, flat.shape[1] // _SAMPLED_PIXELS)
    pixels = flat[:, ::step].float().contiguous()
    tracing = torch.jit.is_tracing()  # type: ignore[attr-defined]  # torch documents it
    # the graphs of torch.jit.trace hold no view as another type, those of the exporters no copy
    bits = torch.view_copy(pixels, dtype=torch.int32) if tracing else pixels.view(torch.int32)
    bits = bits.long()
    place = torch.arange(bits.shape[1], device=bits.device)
    hashed = _mix((bits + 1) * _mix((place + 1) * _GOLDEN))
    # one sum modulo 2^64, by halves: not every runtime that runs an exported model adds large integers exactly
    return (hashed >> 32).sum(1) * 2**32 + (hashed & (2**32 - 1)).sum(1)


def unit_keys(keys: Tensor, units: Units | None) -> Tensor:
    """The keys of images (B,) -> those of their units (U,), each with numbers of its own."""
    if units is None:
        return keys
    return _mix(keys[units.sample] + (units.number + 1) * _GOLDEN)


def stream(block: int, draw: int, *, kind: int = 0) -> int:
    """A stream of its own for each block, each reducer of a stack that draws, and each kind of use."""
    return (block * 64 + draw) * 4 + kind


def uniform(keys: Tensor, counter: Tensor, *, seed: int, stream: int) -> Tensor:
    """Numbers in (0, 1), float64: one for each pair of ``keys`` and ``counter``
    (broadcast); ``stream`` tells uses apart.
    """
    state = _mix(keys + _wrap((seed + 1) * 0x9E3779B97F4A7C15)) + _wrap((stream + 1) * 0xD1B54A32D192ED03)
    bits = _shift_right(_mix(_mix(state) + (counter + 1) * _GOLDEN), 11)
    return (bits.double() + 0.5) / 2.0**53
