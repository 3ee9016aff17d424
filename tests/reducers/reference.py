"""Slow references, written from the specification: a ViT one token at a time, and reducers that list their groups.

Nothing here comes from ``reducers``: weights are read off the timm model, everything is float64 NumPy and Python loops,
and an image is always alone, so that no batch, layout or packed row can make the two agree by the same mistake. What
the specification leaves open is said where it is decided.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from fractions import Fraction
from typing import Any

import numpy as np
import torch
from timm.models.vision_transformer import VisionTransformer
from torch import nn

Vector = np.ndarray


@dataclass
class Token:
    """One token of one image, and what travels with it."""

    x: Vector
    prefix: bool
    size: float = 1.0  # how many original tokens it stands for
    bias: float | None = None  # added to every attention logit on it; None: no reducer has weighed this image's keys
    patch: int = -1  # the original patch it still is
    carries: frozenset[int] = frozenset()  # the original patches it stands for in the account of who went where


@dataclass
class Seen:
    """What a block's attention says of one token: to a later reducer of the block, what the earlier ones left of it."""

    from_class: Vector  # (H,) the class token's attention to it
    key: Vector  # (H, d)
    value: Vector  # (H, d)
    itself: Vector | None = None  # (H,) its attention to itself; known before anything has been decided in the block
    received: Vector | None = None  # (H,) the attention to it, summed over queries


@dataclass
class Group:
    """One new token: (old token, its weight in the features, how much of it counts) of each member."""

    members: list[tuple[int, float, float]]
    lives_on: int | None  # the old token that it continues; None: nobody's continuation


@dataclass
class Choice:
    """What a reducer makes of the tokens; ``by_size``: later attention is weighed by size."""

    groups: list[Group]
    by_size: bool = False
    carried: dict[int, int] = field(default_factory=dict)  # old token -> new one, where it is not the group's own


Reducer = Callable[[list[Token], list[Seen]], "Choice | None"]


def alone(index: int) -> Group:
    return Group([(index, 1.0, 1.0)], index)


# The network


def numbers(parameter: Any) -> Vector:
    return parameter.detach().double().numpy()


def linear(layer: nn.Module, x: Vector) -> Vector:
    out = numbers(layer.weight) @ x
    return out if layer.bias is None else out + numbers(layer.bias)


def layer_norm(layer: nn.Module, x: Vector) -> Vector:
    if isinstance(layer, nn.Identity):
        return x
    spread = math.sqrt(float(np.mean((x - np.mean(x)) ** 2)) + layer.eps)
    return (x - np.mean(x)) / spread * numbers(layer.weight) + numbers(layer.bias)


def layer_scale(layer: nn.Module, x: Vector) -> Vector:
    return x if isinstance(layer, nn.Identity) else x * numbers(layer.gamma)


def gelu(x: Vector) -> Vector:
    return np.array([0.5 * v * (1 + math.erf(v / math.sqrt(2))) for v in x])


def softmax(logits: Sequence[float]) -> Vector:
    powers = [math.exp(logit - max(logits)) for logit in logits]
    return np.array([power / sum(powers) for power in powers])


def attend(block: Any, tokens: list[Token]) -> tuple[list[Vector], list[Seen]]:
    """The features after the attention residual, and what the attention says of each token."""
    attn = block.attn
    heads, width = attn.num_heads, attn.head_dim
    queries, keys, values = [], [], []
    for token in tokens:
        q, k, v = linear(attn.qkv, layer_norm(block.norm1, token.x)).reshape(3, heads, width)
        queries.append([layer_norm(attn.q_norm, head) for head in q])
        keys.append([layer_norm(attn.k_norm, head) for head in k])
        values.append(v)
    rows = []  # [query][head] -> (keys,)
    for query in queries:
        rows.append([])
        for h in range(heads):
            logits = [float(query[h] @ key[h]) / math.sqrt(width) for key in keys]
            rows[-1].append(softmax([logit + (t.bias or 0.0) for logit, t in zip(logits, tokens, strict=True)]))
    out = []
    for token, row in zip(tokens, rows, strict=True):
        mixed = [sum(share * value[h] for share, value in zip(row[h], values, strict=True)) for h in range(heads)]
        added = linear(attn.proj, layer_norm(attn.norm, np.concatenate(mixed)))
        out.append(token.x + layer_scale(block.ls1, added))
    seen = [
        Seen(
            np.array([rows[0][h][j] for h in range(heads)]), np.array(keys[j]), values[j],
            np.array([rows[j][h][j] for h in range(heads)]),
            np.array([sum(row[h][j] for row in rows) for h in range(heads)]),
        )
        for j in range(len(tokens))
    ]  # fmt: skip
    return out, seen


def feed_forward(block: Any, x: Vector) -> Vector:
    hidden = gelu(linear(block.mlp.fc1, layer_norm(block.norm2, x)))
    return x + layer_scale(block.ls2, linear(block.mlp.fc2, hidden))


def carry_out(choice: Choice, tokens: list[Token], seen: list[Seen]) -> tuple[list[Token], list[Seen]]:
    """Features and values by weight, sizes and attention by how much of a member counts: both are sums over members,
    but keys and values, which are averages. Of a bias, exp(bias) is a number of tokens, and those add up.
    """
    new_tokens, new_seen = [], []
    for place, group in enumerate(choice.groups):
        carries = {p for i, token in enumerate(tokens) if choice.carried.get(i) == place for p in token.carries}
        x = key = value = from_class = received = 0.0
        size, keys_there, weights = 0.0, 0.0, 0.0
        rounded = float if choice.carried else np.float32  # sizes travel in single precision, and merge in it
        for i, weight, counts in group.members:
            x = x + weight * tokens[i].x
            size = float(rounded(size + counts * tokens[i].size))
            keys_there += counts * math.exp(tokens[i].bias or 0.0)
            from_class, received = from_class + counts * seen[i].from_class, received + counts * seen[i].received
            key, value, weights = key + weight * seen[i].key, value + weight * seen[i].value, weights + weight
            if i not in choice.carried:
                carries |= tokens[i].carries
        size = float(np.float32(size))
        bias = None if tokens[0].bias is None else math.log(keys_there)
        bias = math.log(size) if choice.by_size else bias
        lives = None if group.lives_on is None else tokens[group.lives_on]
        new_tokens.append(
            Token(
                x, lives is not None and lives.prefix, size, bias, -1 if lives is None else lives.patch,
                frozenset(carries),
            )
        )  # fmt: skip
        new_seen.append(Seen(from_class, key / weights, value / weights, received=received))
    return new_tokens, new_seen


@torch.no_grad()
def run(
    model: VisionTransformer, image: torch.Tensor, stages: dict[int, list[Reducer]]
) -> tuple[list[list[Token]], Vector]:
    """The tokens leaving every block, and the logits; image (3, H, W)."""
    embedded = numbers(model.norm_pre(model._pos_embed(model.patch_embed(image[None]))))[0]
    lead = model.num_prefix_tokens
    tokens = [Token(x, True) for x in embedded[:lead]]
    tokens += [Token(x, False, patch=p, carries=frozenset({p})) for p, x in enumerate(embedded[lead:])]
    left = []
    for index, block in enumerate(model.blocks):
        features, seen = attend(block, tokens)
        tokens = [replace(token, x=x) for token, x in zip(tokens, features, strict=True)]
        for reducer in stages.get(index, []):
            choice = reducer(tokens, seen)
            if choice is not None:
                tokens, seen = carry_out(choice, tokens, seen)
        tokens = [replace(token, x=feed_forward(block, token.x)) for token in tokens]
        left.append(tokens)
    return left, linear(model.head, layer_norm(model.norm, tokens[0].x))


# The reducers


def patches_of(tokens: list[Token]) -> list[int]:
    return [i for i, token in enumerate(tokens) if not token.prefix]


def share_of(ratio: str, count: int, rounding: Callable[[Any], int]) -> int:
    return max(rounding(Fraction(ratio) * count), 1)


def evit(ratio: str) -> Reducer:
    """The most attended patches stay, in the order of the image; the others become one token behind them, the sum of
    their features weighted by the raw class attention.
    """

    def choose(tokens: list[Token], seen: list[Seen]) -> Choice | None:
        patches = patches_of(tokens)
        count = share_of(ratio, len(patches), math.ceil)
        if count >= len(patches):
            return None
        score = {i: float(np.mean(seen[i].from_class)) for i in patches}
        best = sorted(patches, key=lambda i: -score[i])[:count]
        groups = [alone(i) for i in range(len(tokens)) if tokens[i].prefix or i in best]
        return Choice([*groups, Group([(i, score[i], 1.0) for i in patches if i not in best], None)])

    return choose


def ats(ratio: str, *, lookup: str = "inverse") -> Reducer:
    """Points (2k - 1) / 2K on the cumulative share, in token order, of summed attention times the value's norm."""

    def choose(tokens: list[Token], seen: list[Seen]) -> Choice:
        patches = patches_of(tokens)
        points = share_of(ratio, len(patches), math.floor)
        score = [float(np.sum(seen[i].from_class)) * math.sqrt(float(np.sum(seen[i].value ** 2))) for i in patches]
        cumulative = [sum(score[: n + 1]) / sum(score) for n in range(len(score))]
        chosen = set()
        for k in range(1, points + 1):
            point = (2 * k - 1) / (2 * points)
            if lookup == "inverse":
                chosen.add(next(i for i, share in zip(patches, cumulative, strict=True) if share >= point))
            else:
                chosen.add(min(zip(patches, cumulative, strict=True), key=lambda pair: abs(pair[1] - point))[0])
        return Choice([alone(i) for i in range(len(tokens)) if tokens[i].prefix or i in chosen])

    return choose


def tome(*, drop: int | None = None, keep: int | None = None) -> Reducer:
    """The ``drop`` most similar pairs of an even and an odd place merge, a mean weighted by size, as far as halves
    allow; the heavier member lives on, of equal ones the first in the sequence (the specification names the heaviest).
    """

    def choose(tokens: list[Token], seen: list[Seen]) -> Choice | None:
        patches = patches_of(tokens)
        wanted = drop if keep is None else max(len(patches) - keep, 0)
        count = min(wanted or 0, len(patches) // 2)
        if count == 0:
            return None
        metric = [np.mean(s.key, axis=0) for s in seen]
        metric = [m / math.sqrt(float(m @ m)) for m in metric]
        pairs = []
        for a in patches:
            if a % 2 == 0:
                b = max((b for b in patches if b % 2), key=lambda b: float(metric[a] @ metric[b]))
                pairs.append((float(metric[a] @ metric[b]), a, b))
        into = {a: b for _, a, b in sorted(pairs, key=lambda pair: -pair[0])[:count]}
        order = [i for i in range(len(tokens)) if tokens[i].prefix]
        order += [i for i in patches if i % 2 == 0 and i not in into] + [i for i in patches if i % 2]
        groups = []
        for place in order:
            members = sorted([place, *(a for a, b in into.items() if b == place)])
            whole = sum(tokens[i].size for i in members)
            heaviest = max(members, key=lambda i: tokens[i].size)
            groups.append(Group([(i, tokens[i].size / whole, 1.0) for i in members], heaviest))
        return Choice(groups, by_size=True)

    return choose


def gtp(drop: int, alpha: float, grid: tuple[int, int]) -> Reducer:
    """The ``drop`` patches of lowest rank go, and give ``alpha`` G of themselves to their neighbours on the grid."""

    def near(p: int, q: int) -> bool:
        down, right = abs(p // grid[1] - q // grid[1]), abs(p % grid[1] - q % grid[1])
        return p >= 0 and q >= 0 and p != q and max(down, right) <= 1

    def degree(p: int) -> int:
        return sum(near(p, q) for q in range(grid[0] * grid[1]))

    def passed(p: int, q: int) -> float:  # the graph travels in single precision, as sizes do
        if not near(p, q):
            return 0.0
        return float(np.float32(alpha) * (np.float32(1) / np.sqrt(np.float32(degree(p) * degree(q)))))

    def choose(tokens: list[Token], seen: list[Seen]) -> Choice:
        patches = patches_of(tokens)
        rank = {i: float(max(seen[i].itself)) * float(max(seen[i].received)) for i in patches}
        stays = sorted(patches, key=lambda i: -rank[i])[: len(patches) - drop]
        gone = [i for i in patches if i not in stays]
        kept = [i for i in range(len(tokens)) if i not in gone]
        groups = []
        for i in kept:
            given = [(j, passed(tokens[i].patch, tokens[j].patch)) for j in gone]
            groups.append(Group([(i, 1.0, 1.0), *((j, w, w) for j, w in given if w > 0)], i))
        carried = {i: place for place, i in enumerate(kept)}
        for j in gone:  # the account follows the largest share, of equal ones the first
            shares = [passed(tokens[i].patch, tokens[j].patch) for i in kept]
            carried[j] = shares.index(max(shares)) if max(shares) > 0 else -1
        return Choice(groups, by_size=True, carried=carried)

    return choose
