"""A cached property that ``torch.compile`` can look through.

``functools.cached_property`` holds a lock on Python 3.11, at which a compiler's trace ends. This one holds none: two
threads that ask at once compute the same value twice, which is harmless for the pure values cached here.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, Generic, TypeVar, overload

T = TypeVar("T")


class cached_property(Generic[T]):  # noqa: N801  # named as the one it stands for
    """Computed when first read, then kept in the instance; frozen dataclasses may have it."""

    def __init__(self, compute: Callable[[Any], T]) -> None:
        self.compute = compute
        self.__doc__ = compute.__doc__

    def __set_name__(self, owner: type, name: str) -> None:
        self.name = name

    @overload
    def __get__(self, instance: None, owner: type) -> cached_property[T]: ...

    @overload
    def __get__(self, instance: object, owner: type) -> T: ...

    def __get__(self, instance: object | None, owner: type) -> cached_property[T] | T:
        if instance is None:
            return self
        value = self.compute(instance)
        object.__setattr__(instance, self.name, value)  # found before this descriptor from now on
        return value
