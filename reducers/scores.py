"""Scores: how much a token matters, as pure functions of what the block computes.

All return one non-negative number a token, (T,) packed, prefix rows included; who selects normalises over the
candidates it has.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from reducers import noise
from reducers.errors import ReducerError
from reducers.reducer import State
from reducers.signals import Signals

Heads = Literal["concat", "per_head"]


def class_attention(attention: Tensor) -> Tensor:
    """Attention received from the class token, mean over heads. attention: (T, H) -> (T,)"""
    return attention.mean(dim=1)


def class_attention_value_norm(attention: Tensor, values: Tensor, *, heads: Heads = "concat") -> Tensor:
    """Class attention times the norm of the value: ATS's significance score, not yet normalised.

    attention: (T, H), values: (T, H, d) -> (T,). ``concat``: head-summed attention times the norm of the
    concatenated value, as the authors' code does; ``per_head``: the sum over heads of the per-head products, the
    literal reading of the formula.
    """
    if heads == "per_head":
        return (attention * torch.linalg.vector_norm(values, dim=2)).sum(dim=1)
    return attention.sum(dim=1) * torch.linalg.vector_norm(values.flatten(1), dim=1)


def value_norm(values: Tensor, *, heads: Heads = "concat") -> Tensor:
    """Norm of the value vector. values: (T, H, d) -> (T,)"""
    if heads == "per_head":
        return torch.linalg.vector_norm(values, dim=2).sum(dim=1)
    return torch.linalg.vector_norm(values.flatten(1), dim=1)


def random(signals: Signals, state: State, *, seed: int) -> Tensor:
    """Uniform numbers that belong to (seed, image, block, token): the same alone and in any batch. (T,)"""
    if state.image_keys is None:
        raise ReducerError("this reducer draws random numbers: set uses_random so that the runtime supplies image keys")
    layout = signals.layout
    keys = state.image_keys[layout.row_image]
    return noise.uniform(keys, layout.row_index, seed=seed, stream=noise.stream(state.block, state.draw))


@dataclass(frozen=True)
class Score:
    """A named score: how to compute it and what it needs."""

    compute: Callable[[Signals, State, Heads, int], Tensor]
    summary: str
    needs_class_token: bool = True
    uses_random: bool = False


def _class_attention(signals: Signals, state: State, heads: Heads, seed: int) -> Tensor:
    return class_attention(signals.class_attention())


def _class_attention_value_norm(signals: Signals, state: State, heads: Heads, seed: int) -> Tensor:
    _spend_norms(signals)
    return class_attention_value_norm(signals.class_attention(), signals.values(), heads=heads)


def _value_norm(signals: Signals, state: State, heads: Heads, seed: int) -> Tensor:
    _spend_norms(signals)
    return value_norm(signals.values(), heads=heads)


def _attention_received(signals: Signals, state: State, heads: Heads, seed: int) -> Tensor:
    return signals.attention_received()


def _random(signals: Signals, state: State, heads: Heads, seed: int) -> Tensor:
    return random(signals, state, seed=seed)


def _spend_norms(signals: Signals) -> None:
    if signals.counting:
        signals.spend(signals.layout.lengths * signals.values().shape[1:].numel())


SCORES: dict[str, Score] = {
    "class_attention_value_norm": Score(_class_attention_value_norm, "class attention x value norm (ATS)"),
    "class_attention": Score(_class_attention, "attention received from the class token, mean over heads"),
    "value_norm": Score(_value_norm, "norm of the value vector", needs_class_token=False),
    "attention_received": Score(
        _attention_received, "attention received from all tokens, mean over heads", needs_class_token=False
    ),
    "random": Score(_random, "uniform random numbers", needs_class_token=False, uses_random=True),
}


def find_score(name: str) -> Score:
    """The score of that name; an unknown one is refused with the list of those there are."""
    if not isinstance(name, str) or name not in SCORES:
        raise ReducerError(f"unknown score {name!r}; choose one of {', '.join(SCORES)}")
    return SCORES[name]
