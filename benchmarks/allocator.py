"""The memory allocator that a measurement runs on; nothing here imports torch, which would have to be loaded twice."""

from __future__ import annotations

import os
import sys

# With glibc's defaults a forward pass gives its large buffers back to the system and takes them again as fresh pages.
# How often is a matter of luck: of three processes with the same code, DeiT-Ti's dense model took 28,000, 52,000 and
# 106,000 page faults a pass of 32 images, the reduced ones 0 to 18,000, and every efficiency moved by up to 15 %. So
# several processes are measured (``pooled.py``). These settings keep the memory instead, for all variants alike, as the
# allocators made for servers do.
STEADY = {"MALLOC_MMAP_MAX_": "0", "MALLOC_TRIM_THRESHOLD_": str(2**40), "MALLOC_TOP_PAD_": str(256 * 2**20)}
ALLOCATORS = {
    "steady": "memory kept between calls (glibc: no mmap, no trim)",
    "system": "the C library's defaults",
}
USUAL = "system"
_MARK = "SIEVIT_BENCH_ALLOCATOR"


def in_use() -> str:
    """The allocator this process started with."""
    return ALLOCATORS[os.environ.get(_MARK, "system")]


def suffix() -> str:
    """What a result's file name says of it: nothing of the usual one."""
    mark = os.environ.get(_MARK, USUAL)
    return "" if mark == USUAL else f"-{mark}"


def settle(allocator: str) -> None:
    """Start this program again in the environment it is to be measured in; the C library reads it only at the start."""
    if os.environ.get(_MARK) == allocator:
        return
    # the profiler's own log lines would stand between those of the benchmark
    settings = {_MARK: allocator, "KINETO_LOG_LEVEL": "99"}
    if allocator == "steady":
        settings |= STEADY
    sys.stdout.flush()
    os.execve(sys.executable, [sys.executable, "-m", "benchmarks", *sys.argv[1:]], {**os.environ, **settings})
