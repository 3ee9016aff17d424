"""What a failure calls for: the same once more, fewer images at once, another process, or only a record.

A failure that the trial's own content decides (a setting, an image, weights) comes again however often it is tried, and
is recorded at once. What may be the machine's moment is tried once more. Nothing is tried without end.
"""

from __future__ import annotations

import logging
import traceback
from collections.abc import Callable
from typing import TypeVar

import torch

log = logging.getLogger(__name__)

T = TypeVar("T")

ATTEMPTS = 2  # times that a failing trial is begun in one process, halved batches aside
_NO_MEMORY = ("DefaultCPUAllocator", "Unable to allocate")  # torch, numpy: a RuntimeError, a MemoryError of its own
_DECIDED = (ValueError, TypeError, LookupError, AttributeError, AssertionError, NotImplementedError)


class DeviceError(OSError):
    """The GPU takes no more work from this process; another process may still use it."""


def out_of_gpu_memory(error: BaseException) -> bool:
    """The accelerator's memory ran out, and fewer images at once need less."""
    return isinstance(error, torch.OutOfMemoryError)


def out_of_memory(error: BaseException) -> bool:
    """Any memory ran out, of the GPU or of the machine."""
    if isinstance(error, (MemoryError, torch.OutOfMemoryError)):
        return True
    return isinstance(error, RuntimeError) and any(words in str(error) for words in _NO_MEMORY)


def device_lost(error: BaseException) -> bool:
    """A kernel failed so that CUDA refuses everything that this process will ask of it from now on."""
    return isinstance(error, RuntimeError) and "CUDA error" in str(error) and not out_of_memory(error)


def again(error: BaseException, *, alone: bool, attempts: int, at_once: int) -> int | None:
    """How many images at once to begin the trial again with, or None where that would end the same way.

    ``alone``: it was not evaluated together with others; ``attempts``: how often it was begun; ``at_once``: with how
    many images in a batch.
    """
    if out_of_memory(error) and not alone:
        return at_once  # alone it needs less
    if out_of_gpu_memory(error):
        return at_once // 2 if at_once > 1 else None
    if out_of_memory(error) or isinstance(error, _DECIDED) or attempts >= ATTEMPTS:
        return None
    return at_once


def halving(work: Callable[[int], T], *, at_once: int, what: str) -> T:
    """``work(at_once)``, begun again with half as many images at once where the GPU's memory runs out, down to one."""
    while True:
        try:
            return work(at_once)
        except torch.OutOfMemoryError as error:
            if at_once == 1:
                raise
            traceback.clear_frames(error.__traceback__)  # they hold tensors, and memory is what is short
        at_once //= 2
        log.warning("the GPU's memory ran out: %s with %d images at once", what, at_once)
        if torch.cuda.is_available():
            torch.cuda.empty_cache()


def in_words(error: BaseException, *, at_once: int | None) -> str:
    """The reason for the record of a trial that failed in batches of ``at_once`` images (None: while its weights were
    trained): what happened, and where it is not plain, what to do.
    """
    words = f"{type(error).__name__}: {error}"
    if not out_of_memory(error):
        return words
    whose = "the GPU's" if out_of_gpu_memory(error) else "the machine's"
    if at_once is None:
        return (
            f"{whose} memory ran out while its weights were trained; give its training a smaller `batch`, or fewer "
            f"--workers ({words})"
        )
    images = "1 image" if at_once == 1 else f"{at_once} images"
    remedy = "share it among" if out_of_gpu_memory(error) else "give a smaller --batch, or"
    return f"{whose} memory ran out with {images} at a time; {remedy} fewer --workers ({words})"


__all__ = [
    "ATTEMPTS",
    "DeviceError",
    "again",
    "device_lost",
    "halving",
    "in_words",
    "out_of_gpu_memory",
    "out_of_memory",
]
