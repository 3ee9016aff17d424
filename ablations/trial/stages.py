"""Stages and trainings as values: hashable, read only, with the canonical JSON that records hold and digests cover.

In memory these are passed on; JSON is written and read where records are. A value is its text: what it says is read
when it is first asked for, and once.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property
from types import MappingProxyType
from typing import TYPE_CHECKING, Any, Self

if TYPE_CHECKING:
    from reducers import Placement


def canonical_json(value: object) -> str:
    """One text for one content: sorted keys, no spaces, no NaN."""
    return json.dumps(value, sort_keys=True, separators=(",", ":"), ensure_ascii=True, allow_nan=False)


@dataclass(frozen=True)
class Canonical:
    """Plain data that cannot be changed. Two are equal where their texts are.

    Raises:
        TypeError: ``text`` is no text.
    """

    text: str  # as a record holds it

    def __post_init__(self) -> None:
        if not isinstance(self.text, str):
            raise TypeError(f"{type(self).__name__} are written as text; got {self.text!r:.80}")

    @classmethod
    def of(cls, data: object) -> Self:
        """The value of plain data, or of data that was read from another."""
        return cls(canonical_json(plain(data)))

    @cached_property
    def data(self) -> Any:
        """What the text says, read only: tuples for lists."""
        return _read_only(json.loads(self.text))

    def plain(self) -> Any:
        """What the text says as lists and dictionaries of one's own."""
        return plain(self.data)

    def __reduce__(self) -> tuple[type[Self], tuple[str]]:
        return type(self), (self.text,)  # what was read of it does not travel

    def __str__(self) -> str:
        return self.text


@dataclass(frozen=True)
class Stages(Canonical):
    """Where which reducers act: ``[{"at": [3], "stack": [{"name": "ats", "budget": {"count": 108}}]}]``.

    False where nothing acts: the model as it is.
    """

    @classmethod
    def of_placement(cls, placement: Placement) -> Stages:
        """A placement as it describes itself, so that no spelling of blocks, defaults or fractions can change a key."""
        return cls.of(placement.spec())

    def placement(self, depth: int) -> Placement:
        """The stages as ``reducers`` carries them out; nothing may be ``auto`` any more."""
        from reducers import placement_from  # and with it torch: to know of stages needs neither

        return placement_from(self.plain(), depth=depth)

    def __bool__(self) -> bool:
        return bool(self.data)


@dataclass(frozen=True)
class Training(Canonical):
    """How weights are finetuned: a whole recipe (``recipe.Recipe``). False off the shelf."""

    @cached_property
    def stages(self) -> Stages:
        """The placement that is active in training."""
        return Stages.of(self.data.get("stages", ()))

    def __bool__(self) -> bool:
        return bool(self.text)


@dataclass(frozen=True)
class HostOptions(Canonical):
    """How a model is driven, where that is not its default: ``{"fill": "zero"}``. False where it is."""

    @classmethod
    def of(cls, data: object) -> Self:
        """The value of plain data; nothing says nothing."""
        return super().of(data) if data else cls("")

    @cached_property
    def data(self) -> Any:
        """What the text says, read only."""
        return super().data if self.text else MappingProxyType({})

    def __bool__(self) -> bool:
        return bool(self.text)


DENSE = Stages("[]")
OFF_THE_SHELF = Training("")
AS_USUAL = HostOptions("")


def plain(data: Any) -> Any:
    """Data that may be read only as lists and dictionaries of one's own."""
    if isinstance(data, Mapping):
        return {key: plain(part) for key, part in data.items()}
    return [plain(part) for part in data] if isinstance(data, list | tuple) else data


def _read_only(data: Any) -> Any:
    if isinstance(data, dict):
        return MappingProxyType({key: _read_only(part) for key, part in data.items()})
    return tuple(map(_read_only, data)) if isinstance(data, list) else data
