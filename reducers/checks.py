"""Settings as a method takes them: what a person gave, or an error that names the setting and what it may be.

``setting`` is how the message names it, with an ellipsis where the value goes: ``"GTP(theta=…)"``.
"""

from __future__ import annotations

import math
import operator
from typing import SupportsFloat, get_args

from torch import Tensor

from reducers.errors import ReducerError


def _named(setting: str, value: object) -> str:
    return setting.replace("…", repr(value))


def _is_logical(value: object) -> bool:
    """True, False, and what another package has for them."""
    return isinstance(value, bool) or "bool" in str(getattr(value, "dtype", ""))


def whole_number(value: object) -> int | None:
    """A whole number of any package (``numpy.int64``) as a plain one; None of anything else, tensors included."""
    if isinstance(value, Tensor) or _is_logical(value):
        return None
    try:
        return operator.index(value)  # type: ignore[arg-type]  # asked of anything
    except TypeError:
        return None


def finite_number(value: object) -> float | None:
    """A finite number of any package (``numpy.float32``) as a plain one, whole numbers as ``int``;
    None of anything else, tensors included.
    """
    whole = whole_number(value)
    if whole is not None:
        return whole
    if isinstance(value, (Tensor, str, bytes)) or _is_logical(value) or not isinstance(value, SupportsFloat):
        return None
    if getattr(value, "shape", ()) != ():  # an array of one entry is no number
        return None
    try:
        plain = float(value)
    except (TypeError, ValueError, OverflowError):  # an array of words
        return None
    return plain if math.isfinite(plain) else None


def checked_flag(value: object, setting: str) -> bool:
    """True or False and nothing else: a word such as "no" would count as true."""
    if not isinstance(value, bool):
        raise ReducerError(f"{setting} must be true or false; got {value!r}")
    return value


def checked_choice(value: object, choices: object, setting: str) -> str:
    """One of the words of a ``Literal``; another is refused with the list of those there are."""
    if not isinstance(value, str) or value not in get_args(choices):
        raise ReducerError(f"{_named(setting, value)}: choose one of {', '.join(get_args(choices))}")
    return value


def checked_whole(value: object, setting: str, *, least: int) -> int:
    """A whole number, ``least`` or more."""
    whole = whole_number(value)
    if whole is None or whole < least:
        raise ReducerError(f"{_named(setting, value)} must be a whole number, {least} or more")
    return whole


def checked_number(value: object, setting: str, *, hint: str = "") -> float:
    """A finite number; the message ends in ``hint``."""
    number = finite_number(value)
    if number is None:
        raise ReducerError(f"{_named(setting, value)} must be a finite number{hint}")
    return number


def checked_share(value: object, setting: str, *, above: bool = False, of: str = "") -> float:
    """A number from 0 to 1, or above 0 and at most 1; ``of`` tells in the message what it is a share of."""
    number = finite_number(value)
    if number is None or not 0 <= number <= 1 or (above and number == 0):
        bound = "above 0 and at most 1" if above else "from 0 to 1"
        raise ReducerError(f"{_named(setting, value)} must be a {f'share of {of},' if of else 'number'} {bound}")
    return number


def checked_weight(value: object, setting: str, *, above: bool = False) -> float:
    """A finite number, 0 or more, as of a part of a loss; or above 0."""
    number = finite_number(value)
    if number is None or number < 0 or (above and number == 0):
        raise ReducerError(f"{_named(setting, value)} must be a finite number, {'above 0' if above else '0 or more'}")
    return number


def checked_within(value: object, setting: str, *, low: float, high: float = math.inf, above: bool = False) -> float:
    """A finite number in [low, high], or in (low, high] where it must lie ``above``."""
    number = finite_number(value)
    if number is None or not low <= number <= high or (above and number == low):
        bound = f"above {low:g}" if above else f"{low:g} or more"
        most = f" and at most {high:g}" if high < math.inf else ""
        raise ReducerError(f"{setting} must be a number, {bound}{most}; got {value!r}")
    return number


def checked_seed(value: object) -> int:
    """A whole number."""
    seed = whole_number(value)
    if seed is None:
        raise ReducerError(f"seed must be a whole number; got {value!r}")
    return seed
