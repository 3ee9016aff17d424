"""Schedules: how a number of tokens to remove is shared out over the blocks at which a method acts.

A schedule gives each block a weight; the total goes to the blocks by largest remainder, in exact arithmetic (Hamilton's
rule: floors first, then one more where the fractional part is largest, of equal ones to the later block). ``Late`` is
the rule of LaterIsBetter. ``Scheduled`` is a method whose blocks have such counts; a placement holds it until the
number of patches is known.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from fractions import Fraction
from typing import Any

from reducers.budget import Budget, Count, Drop
from reducers.checks import finite_number, whole_number
from reducers.errors import ReducerError
from reducers.reducer import TokenReducer

_STEEPEST = 64  # a gamma or beta beyond gives all to one block
_MOST = 10**6  # tokens; no model has as many

# --- schedules --------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Schedule:
    """How a total is shared out. Use ``Flat``, ``Linear``, ``Late``, ``Early``, ``Exponential`` or ``Listed``."""

    def weights(self, blocks: int) -> list[Fraction]:
        """A weight for each of ``blocks`` blocks, first to last; none negative, not all zero."""
        raise NotImplementedError(f"{type(self).__name__} does not say how it weighs the blocks")

    def drops(self, total: int, blocks: int) -> list[int]:
        """Tokens to remove at each of ``blocks`` blocks, first to last; they sum to ``total``.

        Raises:
            ReducerError: a list of another length or sum.
        """
        return share_out(total, self.weights(blocks))

    def spec(self) -> Any:
        """The schedule as plain data; ``parse_schedule`` reads it back."""
        raise NotImplementedError(f"{type(self).__name__} cannot be written as data")


@dataclass(frozen=True)
class Flat(Schedule):
    """The same at each block; what does not divide goes to the last ones."""

    def weights(self, blocks: int) -> list[Fraction]:
        return [Fraction(1)] * blocks

    def spec(self) -> str:
        return "flat"


@dataclass(frozen=True)
class Linear(Schedule):
    """In equal steps from the first block to the last; how the two ends relate to one another counts, and so
    ``Linear(4, 12)`` is ``Linear(1, 3)``.
    """

    first: float
    last: float

    def __post_init__(self) -> None:
        for name in ("first", "last"):
            object.__setattr__(self, name, _bounded(getattr(self, name), f"Linear({name}=…)", least=0, most=_MOST))
        if self.first == self.last == 0:
            raise ReducerError("Linear(0, 0) gives no block any token; leave the stage out instead")

    def weights(self, blocks: int) -> list[Fraction]:
        first, last = Fraction(str(self.first)), Fraction(str(self.last))
        if blocks == 1:
            return [(first + last) / 2]
        return [first + place * (last - first) / (blocks - 1) for place in range(blocks)]

    def spec(self) -> dict[str, Any]:
        return {"linear": [self.first, self.last]}


@dataclass(frozen=True)
class Late(Schedule):
    """More the later the block: weights ((l + 1) / L)^gamma at the l-th of L blocks, from 0 (LaterIsBetter's, 2)."""

    gamma: float = 2

    def __post_init__(self) -> None:
        gamma = _bounded(self.gamma, f"{type(self).__name__}(gamma=…)", least=0, most=_STEEPEST)
        object.__setattr__(self, "gamma", gamma)

    def weights(self, blocks: int) -> list[Fraction]:
        shares = [Fraction(place + 1, blocks) for place in range(blocks)]
        if self.gamma == int(self.gamma):
            return [share ** int(self.gamma) for share in shares]
        return [_twelve_digits(float(share) ** self.gamma) for share in shares]

    def spec(self) -> dict[str, Any]:
        return {"late": self.gamma}


@dataclass(frozen=True)
class Early(Late):
    """``Late`` with its list reversed: the control."""

    def weights(self, blocks: int) -> list[Fraction]:
        return super().weights(blocks)[::-1]

    def drops(self, total: int, blocks: int) -> list[int]:
        return Late(self.gamma).drops(total, blocks)[::-1]  # ties too

    def spec(self) -> dict[str, Any]:
        return {"early": self.gamma}


@dataclass(frozen=True)
class Exponential(Schedule):
    """Weights exp(beta l / (L - 1)) at the l-th of L blocks, from 0; below 0 they fall."""

    beta: float

    def __post_init__(self) -> None:
        object.__setattr__(self, "beta", _bounded(self.beta, "Exponential(beta=…)", least=-_STEEPEST, most=_STEEPEST))

    def weights(self, blocks: int) -> list[Fraction]:
        return [_twelve_digits(math.exp(self.beta * place / max(1, blocks - 1))) for place in range(blocks)]

    def spec(self) -> dict[str, Any]:
        return {"exponential": self.beta}


@dataclass(frozen=True)
class Listed(Schedule):
    """The numbers themselves, one for each block."""

    numbers: tuple[int, ...]

    def __post_init__(self) -> None:
        given: Sequence[Any] = self.numbers if isinstance(self.numbers, list | tuple) else (self.numbers,)
        listed = [whole_number(number) for number in given]
        known = tuple(number for number in listed if number is not None and 0 <= number <= _MOST)
        if len(known) < len(listed) or not any(known):
            raise ReducerError(
                f"a listed schedule has a whole number for each block, 0 or more and not all 0; got {self.numbers!r}"
            )
        object.__setattr__(self, "numbers", known)

    def weights(self, blocks: int) -> list[Fraction]:
        if len(self.numbers) != blocks:
            raise ReducerError(
                f"the schedule {list(self.numbers)} has {len(self.numbers)} numbers, and there are {blocks} blocks; "
                "give one for each"
            )
        return list(map(Fraction, self.numbers))

    def drops(self, total: int, blocks: int) -> list[int]:
        self.weights(blocks)
        if total != sum(self.numbers):
            raise ReducerError(
                f"the schedule {list(self.numbers)} sums to {sum(self.numbers)}, and the budget is {total}; leave the "
                "budget out"
            )
        return list(self.numbers)

    def spec(self) -> list[int]:
        return list(self.numbers)


_FORMS = "flat, {late: 2}, {early: 2}, {linear: [4, 12]}, {exponential: 1.5} or [0, 1, 3, 5]"


def parse_schedule(data: Any) -> Schedule:
    """Read a schedule from plain data: ``"flat"``, ``{"late": 2}``, ``{"early": 2}``, ``{"linear": [4, 12]}``,
    ``{"exponential": 1.5}`` or ``[0, 1, 3, 5]``.
    """
    if isinstance(data, Schedule):
        return data
    if data == "flat":
        return Flat()
    if isinstance(data, list | tuple):
        return Listed(tuple(data))
    if isinstance(data, Mapping) and len(data) == 1:
        ((name, value),) = data.items()
        ends = list(value) if isinstance(value, list | tuple) else []
        if name == "linear" and len(ends) == 2:
            return Linear(*ends)
        by_one: dict[Any, type[Late | Exponential]] = {"late": Late, "early": Early, "exponential": Exponential}
        if isinstance(name, str) and name in by_one:
            return by_one[name](value)
    raise ReducerError(f"a schedule is written {_FORMS}; got {data!r:.200}")


# --- sharing out ------------------------------------------------------------------------------------------------------


def share_out(total: int, weights: Sequence[Fraction]) -> list[int]:
    """``total`` in whole numbers by weight: the largest remainders get one more, of equal ones the later."""
    scale = math.lcm(*(weight.denominator for weight in weights))
    parts = [weight.numerator * (scale // weight.denominator) for weight in weights]
    whole = sum(parts)
    shares = [divmod(total * part, whole) for part in parts]
    left = total - sum(floor for floor, _ in shares)
    lucky = set(sorted(range(len(parts)), key=lambda place: (shares[place][1], place))[len(parts) - left :])
    return [floor + (place in lucky) for place, (floor, _) in enumerate(shares)]


def clipped(drops: Sequence[int], patches: int) -> list[int]:
    """What is removed of ``patches`` in truth: never more than half of what is left, which is what a round of pairwise
    merging can do; what a block does not spend is not passed on.
    """
    left, spent = patches, []
    for drop in drops:
        spent.append(min(drop, left // 2))
        left -= spent[-1]
    return spent


# --- a method with a schedule -----------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Scheduled:
    """A method whose ``Drop`` is the total over all its blocks. ``acting`` makes the reducers of the single blocks."""

    reducer: TokenReducer  # never acts itself: its budget is the total, its other settings are those of all blocks
    schedule: Schedule

    def __post_init__(self) -> None:
        name, budget = self.reducer.name or type(self.reducer).__name__, getattr(self.reducer, "budget", None)
        if self.reducer.name == "stack":
            raise ReducerError("a stack has no schedule; give one to each of its members that needs it")
        if self.reducer.scheduled_as is None or not any(p.name == "budget" for p in self.reducer.settings()):
            raise ReducerError(f"{name} takes no schedule: it has no count of its own at each block; leave it out")
        if not isinstance(budget, Drop):
            raise ReducerError(
                f"{name} has a schedule, which shares out a number of tokens: write budget: {{drop: 104}}, the total "
                f"over all blocks; got {budget.spec() if isinstance(budget, Budget) else budget!r}"
            )

    @property
    def total(self) -> int:
        """Tokens to remove over all blocks, before any are clipped."""
        budget: Any = self.reducer.budget
        return int(budget.value)

    def acting(self, blocks: Sequence[int], patches: int) -> list[tuple[tuple[int, ...], TokenReducer]]:
        """Which blocks share which reducer, for a network of ``patches`` patch tokens; one reducer for each count.

        A method that matches pairs gets ``Drop`` of what goes at its block, any other the ``Count`` that is left: of
        all patches without what has gone so far, as if nothing else removed any. A block where nothing goes is left
        out.
        """
        ordered = sorted(blocks)
        spent = clipped(self.schedule.drops(self.total, len(ordered)), patches)
        by_budget: dict[Budget, list[int]] = {}
        left = patches
        for block, drop in zip(ordered, spent, strict=True):
            left -= drop
            if drop:
                budget = Drop(drop) if self.reducer.scheduled_as == "drop" else Count(left)
                by_budget.setdefault(budget, []).append(block)
        return [(tuple(where), with_budget(self.reducer, budget)) for budget, where in by_budget.items()]

    def spec(self) -> dict[str, Any]:
        """As a spec has it."""
        return {**self.reducer.spec(), "schedule": self.schedule.spec()}


def with_budget(reducer: TokenReducer, budget: Budget) -> TokenReducer:
    """Another reducer of the same method and settings with this budget."""
    settings = {setting.name: getattr(reducer, setting.name) for setting in reducer.settings()}
    return type(reducer)(**{**settings, "budget": budget})


def _bounded(value: object, setting: str, *, least: float, most: float) -> float:
    number = finite_number(value)
    if number is None or not least <= number <= most:
        raise ReducerError(f"{setting.replace('…', repr(value))} must be a number from {least:g} to {most:g}")
    return int(number) if number == int(number) else number


def _twelve_digits(weight: float) -> Fraction:
    """What is left of a power or an exponential once the last digits, in which machines differ, are cut off."""
    return Fraction(f"{weight:.11e}")
