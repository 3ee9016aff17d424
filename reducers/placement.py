"""Where reducers act: a placement maps block indices to reducers, and placements join with ``|``."""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from fractions import Fraction
from typing import Any

from reducers.budget import exact_fraction
from reducers.checks import finite_number, whole_number
from reducers.errors import ReducerError
from reducers.lazy import cached_property
from reducers.reducer import TokenReducer
from reducers.registry import build
from reducers.schedule import Listed, Schedule, Scheduled, parse_schedule
from reducers.stack import Stack

_FORMS = 'blocks are written 3, [3, 6, 9], "3-11", "all", "every 2 from 1", {last: 0.75}, {thirds: true} or {from: 3}'
_LATER = re.compile(r"\s*every\s+(\d{1,4})(?:\s+from\s+(\d{1,4}))?\s*")
_RANGE = re.compile(r"\s*(\d{1,4})\s*(?:-\s*(\d{1,4})\s*)?")  # no network has as many, and a range is written out


@dataclass(frozen=True)
class Onwards:
    """Every ``step``-th block from ``start`` to the last one of a network that is not known yet."""

    step: int
    start: int = 0

    def within(self, depth: int, first: int = 0) -> tuple[int, ...]:
        """The blocks of a network of ``depth``, counted from ``start`` wherever reducers may act: of those, the ones
        from block ``first`` on.
        """
        if not self.start < depth:
            raise _outside(self.start, depth)
        blocks = tuple(block for block in range(self.start, depth, self.step) if block >= first)
        if not blocks:
            raise _nowhere(self.spec(), depth, first)
        return blocks

    def spec(self) -> str:
        """As a spec has it."""
        if self == Onwards(1):
            return "all"
        return f"every {self.step}{f' from {self.start}' if self.start else ''}"


@dataclass(frozen=True)
class Last:
    """The last ``share`` of the blocks where reducers may act, rounded to the nearest number of blocks, half up, and
    at least one: 0.75 of 12 blocks are 3 to 11, of 24 blocks 6 to 23.
    """

    share: Fraction

    def within(self, depth: int, first: int = 0) -> tuple[int, ...]:
        """The blocks of a network of ``depth`` whose reducers may act from block ``first`` on."""
        blocks = depth - first
        if blocks < 1:
            raise _nowhere(self.spec(), depth, first)
        count = max(1, int(self.share * blocks + Fraction(1, 2)))
        return tuple(range(depth - count, depth))

    def spec(self) -> dict[str, Any]:
        """As a spec has it."""
        exact = float(self.share)
        return {"last": exact if Fraction(str(exact)) == self.share else str(self.share)}


@dataclass(frozen=True)
class Thirds:
    """Three blocks, after a quarter, a half and three quarters of those where reducers may act: 3, 6 and 9 of 12,
    6, 12 and 18 of 24, each rounded down. The reductions of most publications: three stages after some whole blocks.
    """

    def within(self, depth: int, first: int = 0) -> tuple[int, ...]:
        """The blocks of a network of ``depth`` whose reducers may act from block ``first`` on."""
        blocks = depth - first
        if blocks < 3:
            raise _nowhere(self.spec(), depth, first, "three blocks")
        return tuple(first + blocks * part // 4 for part in (1, 2, 3))

    def spec(self) -> dict[str, Any]:
        """As a spec has it."""
        return {"thirds": True}


@dataclass(frozen=True)
class Earliest:
    """One block: this one, or where it takes no reducer the first one that does."""

    block: int

    def within(self, depth: int, first: int = 0) -> tuple[int, ...]:
        """The block in a network of ``depth`` whose reducers may act from block ``first`` on."""
        block = max(self.block, first)
        if not block < depth:
            raise _outside(self.block, depth)
        return (block,)

    def spec(self) -> dict[str, Any]:
        """As a spec has it."""
        return {"from": self.block}


Later = Onwards | Last | Thirds | Earliest  # blocks that are known once the network is
Where = tuple[int, ...] | Later
Part = tuple[Where, TokenReducer | Scheduled]


@dataclass(frozen=True, init=False)
class Placement:
    """Block index -> reducer. Blocks count from 0.

    Where some depend on a network that is still to come (``every`` without ``depth=``, shares of the blocks, the counts
    of a schedule), ``blocks`` cannot be told before ``resolve``; ``reduce_tokens`` does that.
    """

    parts: tuple[Part, ...]  # as placed, first to last

    def __init__(self, blocks: Mapping[int, TokenReducer] | None = None, *, parts: Iterable[Part] = ()) -> None:
        placed = [((block,), reducer) for block, reducer in (blocks or {}).items()]
        object.__setattr__(self, "parts", (*placed, *parts))
        if self.is_resolved:
            _ = self.blocks  # what cannot be stacked is refused where it is written

    @property
    def is_resolved(self) -> bool:
        """Whether the blocks are known, and what acts there."""
        return not (any(isinstance(where, Later) for where, _ in self.parts) or self.is_scheduled)

    @property
    def is_scheduled(self) -> bool:
        """Whether a schedule waits for the number of patches."""
        return any(isinstance(what, Scheduled) for _, what in self.parts)

    @cached_property
    def blocks(self) -> Mapping[int, TokenReducer]:
        """Which reducer acts at which block."""
        joined: dict[int, TokenReducer] = {}
        for where, reducer in self.parts:
            if isinstance(where, Later):
                raise ReducerError(
                    f"which blocks {where.spec()!r} means depends on the network: ask placement.resolve(depth), give "
                    "every() or placement_from() its depth=…, or ask a reduced model, fast.placement.blocks"
                )
            if isinstance(reducer, Scheduled):
                raise ReducerError(
                    f"what the schedule {reducer.schedule.spec()!r} leaves at a block depends on the number of patches:"
                    " ask placement.resolve(depth, patches=…), give placement_from() its depth=… and patches=…, or ask "
                    "a reduced model, fast.placement.blocks"
                )
            for block in where:
                joined[block] = Stack(joined[block], reducer) if block in joined else reducer
        return joined

    def __or__(self, other: Placement) -> Placement:
        """Both placements; where they share a block,
        this one's reducer acts first and the other's on what it leaves.
        """
        return Placement(parts=self.parts + other.parts)

    def resolve(self, depth: int, first: int = 0, *, patches: int | None = None) -> Placement:
        """The same in a network of ``depth`` blocks, all of them known; blocks outside it are refused.

        ``first``: the first block where the network lets a reducer act; shares are of the blocks from there on.
        ``patches``: patch tokens that enter block 0; without it schedules still wait, over blocks that are known.
        """
        placement = self
        if not self.is_resolved:
            known = [(w.within(depth, first) if isinstance(w, Later) else w, what) for w, what in self.parts]
            placement = Placement(parts=known if patches is None else _acting(known, patches))
        check_blocks((block for where, _ in placement.parts if isinstance(where, tuple) for block in where), depth)
        return placement

    def spec(self) -> list[dict[str, Any]]:
        """The placement as plain data: blocks that share a reducer are written together, unless one part of it waits
        for the network; then each part is written as it was placed.
        """
        if not self.is_resolved:
            return [
                {"at": where.spec() if isinstance(where, Later) else list(where), "stack": _stack_of(reducer)}
                for where, reducer in self.parts
            ]
        stages: list[dict[str, Any]] = []
        for block in sorted(self.blocks):
            stack = _stack_of(self.blocks[block])
            same = [stage for stage in stages if stage["stack"] == stack]
            if same:
                same[0]["at"].append(block)
            else:
                stages.append({"at": [block], "stack": stack})
        return stages


def _acting(parts: Iterable[tuple[tuple[int, ...], TokenReducer | Scheduled]], patches: int) -> list[Part]:
    """The parts with the reducers of single blocks in place of schedules."""
    found: list[Part] = []
    for where, what in parts:
        found += what.acting(where, patches) if isinstance(what, Scheduled) else [(where, what)]
    return found


def _stack_of(reducer: TokenReducer | Scheduled) -> list[dict[str, Any]]:
    data = reducer.spec()
    stack: list[dict[str, Any]] = data["stack"] if data["name"] == "stack" else [data]
    return stack


def check_blocks(blocks: Iterable[int], depth: int) -> None:
    """Refuse blocks outside a network of ``depth``."""
    for block in blocks:
        if not 0 <= block < depth:
            raise _outside(block, depth)


def _outside(block: int, depth: int) -> ReducerError:
    return ReducerError(f"block {block} is outside the network: its {depth} blocks count from 0 to {depth - 1}")


def _nowhere(where: object, depth: int, first: int, needed: str = "a block") -> ReducerError:
    there = f"it has {depth}" + (f", and the first {first} take no reducer" if first else "")
    return ReducerError(f"{where!r} needs {needed} of the network where reducers may act: {there}; name blocks instead")


def at(
    blocks: int | Iterable[int] | Mapping[str, Any], reducer: TokenReducer, *, schedule: Schedule | None = None
) -> Placement:
    """``at([3, 6, 9], EViT(Ratio(0.7)))``: the reducer acts in these blocks.

    ``at({"last": 0.75}, …)`` and ``at({"thirds": True}, …)`` are resolved over the blocks where the model lets
    reducers act, and fit any depth: see ``Last`` and ``Thirds``.

    ``schedule``: ``at(range(12), ToMe(Drop(96)), schedule=Late(2))`` removes 96 tokens in all, shared out over the
    blocks; each has a reducer with a count of its own once the number of patches is known.
    """
    _check_reducer(reducer, "at")
    what = _with_schedule(reducer, schedule, "at")
    if isinstance(blocks, Mapping):
        return Placement(parts=[(_portion(blocks), what)])
    given: list[object]
    if whole_number(blocks) is not None:
        given = [blocks]
    elif isinstance(blocks, Iterable) and not isinstance(blocks, str):  # type: ignore[unreachable]
        given = list(blocks)
    else:
        raise ReducerError(
            "at() takes block indices such as 3, [3, 6, 9] or range(3, 12), or {'last': 0.75} or {'thirds': True}; "
            f"got {blocks!r}"
        )
    listed = [whole_number(block) for block in given]
    known = tuple(block for block in listed if block is not None)
    if len(known) < len(listed):
        raise ReducerError(f"block indices are whole numbers; got {given!r}")
    _check_named_once(known)
    return Placement(parts=[(known, what)])


def _check_named_once(blocks: tuple[int, ...]) -> None:
    if len(set(blocks)) != len(blocks):
        raise ReducerError(f"block named twice in {list(blocks)}; to act twice in one block, use Stack(first, second)")


def every(
    step: int, reducer: TokenReducer, *, start: int = 0, depth: int | None = None, schedule: Schedule | None = None
) -> Placement:
    """The reducer in every ``step``-th block from ``start`` to the last one; ``every(1, ToMe(Drop(13)))`` is ToMe's
    own placement. The network's depth is the model's, once there is one, or ``depth``. ``schedule``: as of ``at``.
    """
    _check_reducer(reducer, "every")
    steps, first = whole_number(step), whole_number(start)
    if steps is None or steps < 1:
        raise ReducerError(f"every({step!r}) must be a step of at least 1 block")
    if first is None or first < 0:
        raise ReducerError(f"every(start={start!r}) must be a block's index, 0 or more")
    placement = Placement(parts=[(Onwards(steps, first), _with_schedule(reducer, schedule, "every"))])
    return placement if depth is None else placement.resolve(depth)


def _check_reducer(reducer: object, function: str) -> None:
    if not isinstance(reducer, TokenReducer):
        raise ReducerError(f"{function}() places a reducer such as ATS(Count(108)); got {reducer!r}")


def _with_schedule(reducer: TokenReducer, schedule: object, function: str) -> TokenReducer | Scheduled:
    if schedule is None:
        return reducer
    if not isinstance(schedule, Schedule):
        raise ReducerError(f"{function}(schedule=…) takes a schedule such as Late(2) or Flat(); got {schedule!r}")
    return Scheduled(reducer, schedule)


def parse_blocks(where: Any, depth: int, first: int = 0) -> list[int]:
    """Blocks as written in a spec: 3, [3, 6, 9], "3-11", "3, 6, 9", "all", "every 2 from 1", {"last": 0.75},
    {"thirds": True} or {"from": 3}. ``first``: the first block where the network lets a reducer act.
    """
    read = _read_blocks(where)
    return list(read.within(depth, first) if isinstance(read, Later) else read)


def _portion(where: Mapping[str, Any]) -> Last | Thirds | Earliest:
    """``{"last": 0.75}``, ``{"thirds": True}`` or ``{"from": 3}``"""
    if set(where) == {"thirds"}:
        if where["thirds"] is not True:
            raise ReducerError(f"{dict(where)!r} says nothing; write {{thirds: true}}, or name blocks")
        return Thirds()
    if set(where) == {"from"}:
        block = whole_number(where["from"])
        if block is None or block < 0:
            raise ReducerError(f"{{from: {where['from']!r}}} is no block; write {{from: 3}}")
        return Earliest(block)
    if set(where) != {"last"}:
        raise ReducerError(f"{_FORMS}; got {dict(where)!r}")
    return Last(_share_of_blocks(where["last"]))


def _share_of_blocks(given: object) -> Fraction:
    number = finite_number(given)
    try:
        share = exact_fraction(str(given)) if isinstance(given, str | Fraction) or number is not None else None
    except (ValueError, ZeroDivisionError):
        share = None
    if share is None or not 0 < share <= 1:
        raise ReducerError(f"{{last: {given!r}}} must be a share of the blocks above 0 and at most 1, such as 0.75")
    return share


def _read_blocks(where: Any) -> Where:
    """As ``parse_blocks``, for a network that is not known yet."""
    if isinstance(where, Mapping):
        return _portion(where)
    if isinstance(where, str):
        if where == "all":
            return Onwards(1)
        later = _LATER.fullmatch(where)
        if later and int(later[1]):
            return Onwards(int(later[1]), int(later[2] or 0))
        return _ranges(where)
    single = whole_number(where)
    if single is not None:
        return (single,)
    listed = [whole_number(block) for block in where] if isinstance(where, (list, tuple)) else [None]
    known = tuple(block for block in listed if block is not None)
    if len(known) < len(listed):
        raise ReducerError(f"{_FORMS}; got {where!r}")
    return known


def _ranges(where: str) -> tuple[int, ...]:
    """``"3-5, 9"``"""
    blocks: list[int] = []
    for part in where.split(","):
        match = _RANGE.fullmatch(part)
        if not match:
            raise ReducerError(f"{_FORMS}; got {where!r}")
        first, last = int(match[1]), int(match[2] or match[1])
        if last < first:
            raise ReducerError(f"blocks {where!r} run backwards; write the smaller one first")
        blocks.extend(range(first, last + 1))
    return tuple(blocks)


def placement_from(
    stages: list[dict[str, Any]], depth: int | None = None, first: int = 0, *, patches: int | None = None
) -> Placement:
    """A placement from plain data, e.g. ``[{"at": [3, 6, 9], "stack": [{"name": "evit", "budget": {"ratio":
    0.7}}]}]``. What ``"all"`` blocks are is decided by ``depth``, or by the model where none is given; ``first`` is the
    first block where it lets a reducer act.

    A reducer may have a schedule, ``{"name": "tome", "budget": {"drop": 104}, "schedule": {"late": 2}}``: 104 is then
    the total over the stage's blocks. What it comes to at each is decided by ``patches`` (with ``depth``), the patch
    tokens that enter block 0, or by the model.
    """
    parts: list[Part] = []
    for stage in stages:
        if not isinstance(stage, dict) or "at" not in stage or ("stack" in stage) == ("reducer" in stage):
            raise ReducerError(f'a stage is written {{"at": [3], "stack": [{{"name": "ats", …}}]}}; got {stage!r}')
        unknown = set(stage) - {"at", "stack", "reducer"}
        if unknown:
            raise ReducerError(f"unknown key {sorted(unknown)[0]!r} in stage {stage!r}; it has at, stack or reducer")
        written = stage["stack"] if "stack" in stage else [stage["reducer"]]
        if not written:
            raise ReducerError(f"the stack of stage {stage!r} is empty; leave the stage out instead")
        if stage["at"] == []:
            raise ReducerError(f"stage {stage!r} names no block; leave the stage out instead")
        where = _read_blocks(stage["at"])
        if isinstance(where, tuple):
            _check_named_once(where)
        read = [_read_reducer(part) for part in written]
        plain = [what.reducer if isinstance(what, Scheduled) else what for what in read]
        stack = plain[0] if len(plain) == 1 else Stack(*plain)  # refused here, where it is written, if it cannot be one
        scheduled = any(isinstance(what, Scheduled) for what in read)
        parts += [(where, what) for what in read] if scheduled else [(where, stack)]
    placement = Placement(parts=parts)
    return placement if depth is None else placement.resolve(depth, first, patches=patches)


def _read_reducer(data: Any) -> TokenReducer | Scheduled:
    """A reducer as a stage has it, with or without a schedule."""
    if not isinstance(data, dict) or "schedule" not in data:
        return build(data)
    schedule = parse_schedule(data["schedule"])
    plain = {key: value for key, value in data.items() if key != "schedule"}
    if isinstance(schedule, Listed) and "budget" not in plain:
        plain["budget"] = {"drop": sum(schedule.numbers)}
    return Scheduled(build(plain), schedule)
