"""``sievit status``: how far a run is."""

from __future__ import annotations

import argparse
import sys

from ablations.cli.options import OK, Command, add_old_out, add_out, out_of, place, store_of

_EVERY = 5.0  # seconds

_EPILOG = """\
examples:
  sievit status                                    how far each spec is, what failed, what is stale and why
  sievit status --out results/embedded --watch     the same every 5 seconds, from any terminal or machine
  sievit status --out s3://bucket/runs/a --watch 60     results kept in an object store
  sievit log 3f9c1b --out results                  one trial, by its key or how it begins

waiting: not begun, running, or lost; stale: on disk, but of another model, other images, other code, or no spec.
exit status: 0 all is well, 2 bad input
"""


def _add_options(parser: argparse.ArgumentParser) -> None:
    add_old_out(parser)
    add_out(parser)
    parser.add_argument(
        "--watch", type=_seconds_or_out, nargs="?", const=_EVERY, metavar="SECONDS",
        help="look again every so many seconds, until the run is over (5)",
    )  # fmt: skip


def _seconds_or_out(text: str) -> float | str:
    """Seconds; any other word is OUT, since documents have said ``status --watch OUT``."""
    try:
        return float(text)
    except ValueError:
        return text


def _status(arguments: argparse.Namespace) -> int:
    if isinstance(arguments.watch, str):
        _take_out(arguments)
    from ablations.store.status import lines, look, watch

    if arguments.watch is not None and not arguments.watch >= 1:
        raise ValueError(f"--watch {arguments.watch:g}: looking costs the storage something; give 1 second or more")
    store = store_of(arguments)
    if arguments.watch is None:
        print("\n".join(lines(look(store))))
        return OK
    clear = "\x1b[2J\x1b[H" if sys.stdout.isatty() else ""
    for shown in watch(store, every=arguments.watch):
        print(clear + "\n".join(shown), flush=True)
    return OK


def _take_out(arguments: argparse.Namespace) -> None:
    """``--watch OUT`` is ``--out OUT --watch``, unless there is an OUT already."""
    if arguments.old_out is not None or arguments.out is not None:
        raise ValueError(f"--watch {arguments.watch}: not a number of seconds, and OUT is {out_of(arguments)} already")
    arguments.old_out, arguments.watch = place(arguments.watch), _EVERY


COMMAND = Command(
    summary="how far each spec of a run is, and what is stale",
    description="How far a run is, seen from its files alone: from any terminal or machine, or long after it ended.",
    epilog=_EPILOG,
    add_options=_add_options,
    carry_out=_status,
)
