"""Budgets: how many patch tokens a reducing block may keep.

Counts are worked out in exact integer arithmetic (0.7 is seven tenths, not 0.69999…), so that a rounding rule
means what it says.
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from fractions import Fraction
from typing import Any, Literal, TypeVar, get_args

import torch
from torch import Tensor

from reducers.checks import checked_flag, whole_number
from reducers.errors import ReducerError

Rounding = Literal["floor", "ceil", "nearest"]
Base = Literal["current", "initial"]
N = TypeVar("N", Tensor, int)  # a count of each image, or of one on the host

_LONGEST = 100  # characters of a number
_EXPONENT_DIGITS = 3  # as a float has: 1e-308
_EXPONENT = re.compile(r"[eE][+-]?([\d_]+)")


@dataclass(frozen=True)
class Budget:
    """How many patch tokens may stay. Use ``Ratio``, ``Count`` or ``Drop``."""

    def resolve(self, current: Tensor, *, initial: int, prefix: Tensor, rounding: Rounding) -> Tensor:
        """Patch tokens to keep of each image, (B,) int64: at least 1 where there is one, at most ``current``.

        ``initial``: patch tokens entering block 0. ``prefix`` (B,): prefix tokens, for budgets that count them.
        ``rounding``: the reducer's own default, used where the budget names none.
        """
        return torch.minimum(self.points(current, initial=initial, prefix=prefix, rounding=rounding), current)

    def count(self, current: int, *, initial: int, prefix: int, rounding: Rounding) -> int:
        """``resolve`` for one image, in plain integers."""
        return min(self.point_count(current, initial=initial, prefix=prefix, rounding=rounding), current)

    def point_count(self, current: int, *, initial: int, prefix: int, rounding: Rounding) -> int:
        """``points`` for one image, in plain integers."""
        return max(self._wanted(current, initial, prefix, rounding), 1)

    def points(self, current: Tensor, *, initial: int, prefix: Tensor, rounding: Rounding) -> Tensor:
        """As ``resolve``, but not bounded by ``current``: sample points, which may outnumber the tokens."""
        return (torch.zeros_like(current) + self._wanted(current, initial, prefix, rounding)).clamp(min=1)

    def _wanted(self, current: N, initial: int, prefix: N, rounding: Rounding) -> N | int:
        raise NotImplementedError(f"{type(self).__name__} does not say how many tokens it keeps")

    def spec(self) -> dict[str, Any]:
        """The budget as plain data, defaults left out; ``parse_budget`` reads it back."""
        raise NotImplementedError(f"{type(self).__name__} cannot be written as data")


def rounded_share(whole: Any, numerator: int, denominator: int, rounding: Rounding) -> Any:
    """whole x numerator / denominator of one count or a tensor of them, in integers; "nearest" takes halves upwards."""
    share = whole * numerator
    match rounding:
        case "floor":
            return share // denominator
        case "ceil":
            return -((-share) // denominator)
        case _:
            return (2 * share + denominator) // (2 * denominator)


def exact_fraction(text: str) -> Fraction:
    """The exact value of a number as text; of one so long that its digits alone would fill the memory, ValueError."""
    exponent = _EXPONENT.search(text)
    if len(text) > _LONGEST or (exponent and len(exponent[1]) > _EXPONENT_DIGITS):
        raise ValueError(f"{text:.20}… has too many digits")
    return Fraction(text)


@dataclass(frozen=True, init=False)
class Ratio(Budget):
    """A share of the tokens: ``Ratio(0.7)`` of those entering the block,
    ``Ratio(0.5, of="initial")`` of those entering block 0.

    The value lies in (0, 1] and may be a float, a ``Fraction`` or a string such as ``"48/196"``. ``count_prefix``:
    the share is of all tokens, prefix included, and so is the number kept (the prefix always stays).
    """

    value: Fraction
    of: Base
    rounding: Rounding | None
    count_prefix: bool

    def __init__(
        self,
        value: float | str | Fraction,
        of: Base = "current",
        rounding: Rounding | None = None,
        count_prefix: bool = False,
    ) -> None:
        try:
            exact = exact_fraction(str(value)).limit_denominator(10**6)
        except (ValueError, ZeroDivisionError) as error:
            raise ReducerError(f"Ratio({value!r}) is no number; give a share of the tokens in (0, 1]") from error
        if isinstance(value, bool) or not 0 < exact <= 1:
            raise ReducerError(f"Ratio({value}) must lie in (0, 1]: it is the share of tokens that stay")
        if of not in get_args(Base):
            raise ReducerError(f"Ratio(of={of!r}): choose one of {', '.join(get_args(Base))}")
        if rounding is not None and rounding not in get_args(Rounding):
            raise ReducerError(f"Ratio(rounding={rounding!r}): choose one of {', '.join(get_args(Rounding))}")
        object.__setattr__(self, "value", exact)
        object.__setattr__(self, "of", of)
        object.__setattr__(self, "rounding", rounding)
        object.__setattr__(self, "count_prefix", checked_flag(count_prefix, "Ratio(count_prefix=…)"))

    def _wanted(self, current: N, initial: int, prefix: N, rounding: Rounding) -> N | int:
        whole = current if self.of == "current" else initial
        if self.count_prefix:
            whole = whole + prefix
        kept: N | int = rounded_share(whole, self.value.numerator, self.value.denominator, self.rounding or rounding)
        return kept - prefix if self.count_prefix else kept

    def spec(self) -> dict[str, Any]:
        exact = float(self.value)
        text: float | str = exact if Fraction(str(exact)) == self.value else str(self.value)
        data: dict[str, Any] = {"ratio": text}
        if self.of != "current":
            data["of"] = self.of
        if self.rounding is not None:
            data["rounding"] = self.rounding
        if self.count_prefix:
            data["count_prefix"] = True
        return data


@dataclass(frozen=True)
class Count(Budget):
    """A number of patch tokens, the same whatever enters the block: ``Count(108)``."""

    value: int

    def __post_init__(self) -> None:
        value = whole_number(self.value)
        if value is None or value < 1:
            raise ReducerError(f"Count({self.value!r}) must be a whole number of patch tokens, at least 1")
        object.__setattr__(self, "value", value)

    def _wanted(self, current: N, initial: int, prefix: N, rounding: Rounding) -> N | int:
        return self.value

    def spec(self) -> dict[str, Any]:
        return {"count": self.value}


@dataclass(frozen=True)
class Drop(Budget):
    """A number of tokens removed at each block: ``Drop(13)`` is ToMe's r = 13; ``Drop(0)`` removes none."""

    value: int

    def __post_init__(self) -> None:
        value = whole_number(self.value)
        if value is None or value < 0:
            raise ReducerError(f"Drop({self.value!r}) must be a whole number of tokens to remove, 0 or more")
        object.__setattr__(self, "value", value)

    def _wanted(self, current: N, initial: int, prefix: N, rounding: Rounding) -> N | int:
        return current - self.value

    def spec(self) -> dict[str, Any]:
        return {"drop": self.value}


def checked_budget(budget: object, owner: str) -> Budget:
    """The budget, or an error that shows how one is written."""
    if not isinstance(budget, Budget):
        raise ReducerError(f"{owner} takes a budget such as Ratio(0.7), Count(108) or Drop(13); got {budget!r}")
    return budget


_FORMS = '{"ratio": 0.7}, {"ratio": "48/196", "of": "initial"}, {"count": 108} or {"drop": 13}'


def parse_budget(data: Any) -> Budget:
    """Read a budget from plain data, e.g. ``{"ratio": 0.7, "of": "initial"}``."""
    if isinstance(data, Budget):
        return data
    if not isinstance(data, dict):
        raise ReducerError(f"a budget is written {_FORMS}; got {data!r}")
    kinds = {"ratio": Ratio, "count": Count, "drop": Drop}
    named = [kind for kind in kinds if kind in data]
    if len(named) != 1:
        raise ReducerError(f"a budget is written {_FORMS}; got {data!r}")
    options = {key: value for key, value in data.items() if key != named[0]}
    allowed = {"of", "rounding", "count_prefix"} if named[0] == "ratio" else set()
    unknown = set(options) - allowed
    if unknown:
        raise ReducerError(f"unknown key {min(unknown, key=str)!r} in budget {data!r}; a budget is written {_FORMS}")
    budget: Budget = kinds[named[0]](data[named[0]], **options)
    return budget
