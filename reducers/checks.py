"""Settings as a method takes them: what a person gave, or an error that names the setting and what it may be.

``setting`` is how the message names it, with an ellipsis where the value goes: ``"GTP(theta=…)"``.
"""

from __future__ import annotations

import math
from typing import get_args

from reducers.errors import ReducerError


def _named(setting: str, value: object) -> str:
    return setting.replace("…", repr(value))


def _is_number(value: object) -> bool:
    """A finite number; True and False are none."""
    return isinstance(value, (int, float)) and not isinstance(value, bool) and math.isfinite(value)


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
    if isinstance(value, bool) or not isinstance(value, int) or value < least:
        raise ReducerError(f"{_named(setting, value)} must be a whole number, {least} or more")
    return value


def checked_number(value: object, setting: str, *, hint: str = "") -> float:
    """A finite number; the message ends in ``hint``."""
    if not isinstance(value, (int, float)) or not _is_number(value):
        raise ReducerError(f"{_named(setting, value)} must be a finite number{hint}")
    return value


def checked_share(value: object, setting: str, *, above: bool = False, of: str = "") -> float:
    """A number from 0 to 1, or above 0 and at most 1; ``of`` tells in the message what it is a share of."""
    if not isinstance(value, (int, float)) or not _is_number(value) or not 0 <= value <= 1 or (above and value == 0):
        bound = "above 0 and at most 1" if above else "from 0 to 1"
        raise ReducerError(f"{_named(setting, value)} must be a {f'share of {of},' if of else 'number'} {bound}")
    return value


def checked_weight(value: object, setting: str, *, above: bool = False) -> float:
    """A finite number, 0 or more, as of a part of a loss; or above 0."""
    if not isinstance(value, (int, float)) or not _is_number(value) or value < 0 or (above and value == 0):
        raise ReducerError(f"{_named(setting, value)} must be a finite number, {'above 0' if above else '0 or more'}")
    return value


def checked_seed(value: object) -> int:
    """A whole number."""
    if isinstance(value, bool) or not isinstance(value, int):
        raise ReducerError(f"seed must be a whole number; got {value!r}")
    return value
