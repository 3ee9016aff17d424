"""What a training reads, drawn by another process while the model computes."""

from __future__ import annotations

import multiprocessing
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ProcessPoolExecutor
from itertools import islice
from typing import TypeVar

_AHEAD = 4  # batches

T = TypeVar("T")


def drawn_ahead(calls: Iterable[Callable[[], T]]) -> Iterator[T]:
    """What each call returns, in order, a few of them ahead of who asks; calls have to pickle."""
    left = iter(calls)
    with ProcessPoolExecutor(1, mp_context=multiprocessing.get_context("spawn")) as pool:
        ahead = [pool.submit(call) for call in islice(left, _AHEAD)]
        while ahead:
            found = ahead.pop(0).result()
            ahead += [pool.submit(call) for call in islice(left, 1)]
            yield found
