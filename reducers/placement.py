"""Where reducers act: a placement maps block indices to reducers, and placements join with ``|``."""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any

from reducers.base import TokenReducer
from reducers.errors import ReducerError
from reducers.registry import build
from reducers.stack import Stack


@dataclass(frozen=True)
class Placement:
    """Block index -> reducer. Blocks count from 0."""

    blocks: Mapping[int, TokenReducer] = field(default_factory=dict)

    def __or__(self, other: Placement) -> Placement:
        """Both placements; where they share a block, this one's reducer acts first and the other's on what it
        leaves.
        """
        joined = dict(self.blocks)
        for block, reducer in other.blocks.items():
            joined[block] = Stack(joined[block], reducer) if block in joined else reducer
        return Placement(joined)

    def check(self, depth: int) -> None:
        """Refuse blocks outside a network of ``depth`` blocks."""
        for block in self.blocks:
            if not 0 <= block < depth:
                raise ReducerError(
                    f"block {block} is outside the network: its {depth} blocks count from 0 to {depth - 1}"
                )

    def spec(self) -> list[dict[str, Any]]:
        """The placement as plain data: blocks that share a reducer are written together."""
        stages: list[dict[str, Any]] = []
        for block in sorted(self.blocks):
            reducer = self.blocks[block].spec()
            stack = reducer["stack"] if reducer["name"] == "stack" else [reducer]
            same = [stage for stage in stages if stage["stack"] == stack]
            if same:
                same[0]["at"].append(block)
            else:
                stages.append({"at": [block], "stack": stack})
        return stages


def at(blocks: int | Iterable[int], reducer: TokenReducer) -> Placement:
    """``at([3, 6, 9], EViT(Ratio(0.7)))``: the reducer acts in these blocks."""
    if not isinstance(reducer, TokenReducer):
        raise ReducerError(f"at() places a reducer such as ATS(Count(108)); got {reducer!r}")
    if isinstance(blocks, str) or not isinstance(blocks, (int, Iterable)):  # type: ignore[unreachable]
        raise ReducerError(f"at() takes block indices such as 3, [3, 6, 9] or range(3, 12); got {blocks!r}")
    listed = [blocks] if isinstance(blocks, int) else list(blocks)
    if any(isinstance(block, bool) or not isinstance(block, int) for block in listed):
        raise ReducerError(f"block indices are whole numbers; got {listed!r}")
    if len(set(listed)) != len(listed):
        raise ReducerError(f"block named twice in {listed}; to act twice in one block, use Stack(first, second)")
    return Placement(dict.fromkeys(listed, reducer))


def every(step: int, reducer: TokenReducer, *, start: int = 0, depth: int = 12) -> Placement:
    """The reducer in every ``step``-th block from ``start`` on; ``every(1, ToMe(Drop(13)))`` is ToMe's own
    placement.
    """
    if step < 1:
        raise ReducerError(f"every({step}) must be a step of at least 1 block")
    return at(range(start, depth, step), reducer)


def parse_blocks(where: Any, depth: int) -> list[int]:
    """Blocks as written in a spec: 3, [3, 6, 9], "3-11", "3, 6, 9" or "all"."""
    if where == "all":
        return list(range(depth))
    if isinstance(where, str):
        blocks: list[int] = []
        for part in where.split(","):
            match = re.fullmatch(r"\s*(\d+)\s*(?:-\s*(\d+)\s*)?", part)
            if not match:
                raise ReducerError(f'blocks are written 3, [3, 6, 9], "3-11" or "all"; got {where!r}')
            first, last = int(match[1]), int(match[2] or match[1])
            if last < first:
                raise ReducerError(f"blocks {where!r} run backwards; write the smaller one first")
            blocks.extend(range(first, last + 1))
        return blocks
    if isinstance(where, int) and not isinstance(where, bool):
        return [where]
    if isinstance(where, (list, tuple)) and all(isinstance(b, int) and not isinstance(b, bool) for b in where):
        return list(where)
    raise ReducerError(f'blocks are written 3, [3, 6, 9], "3-11" or "all"; got {where!r}')


def placement_from(stages: list[dict[str, Any]], depth: int = 12) -> Placement:
    """A placement from plain data, e.g. ``[{"at": [3, 6, 9], "stack": [{"name": "evit", "budget": {"ratio":
    0.7}}]}]``.
    """
    placement = Placement()
    for stage in stages:
        if not isinstance(stage, dict) or "at" not in stage or ("stack" in stage) == ("reducer" in stage):
            raise ReducerError(f'a stage is written {{"at": [3], "stack": [{{"name": "ats", …}}]}}; got {stage!r}')
        unknown = set(stage) - {"at", "stack", "reducer"}
        if unknown:
            raise ReducerError(f"unknown key {sorted(unknown)[0]!r} in stage {stage!r}; it has at, stack or reducer")
        parts = [build(part) for part in (stage["stack"] if "stack" in stage else [stage["reducer"]])]
        if not parts:
            raise ReducerError(f"the stack of stage {stage!r} is empty; leave the stage out instead")
        reducer = parts[0] if len(parts) == 1 else Stack(*parts)
        if stage["at"] == []:
            raise ReducerError(f"stage {stage!r} names no block; leave the stage out instead")
        placement = placement | at(parse_blocks(stage["at"], depth), reducer)
    placement.check(depth)
    return placement
