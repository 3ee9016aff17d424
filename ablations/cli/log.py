"""``sievit log``: what was said while a trial was computed."""

from __future__ import annotations

import argparse

from ablations.cli.options import OK, Command, add_old_out, add_out, store_of
from ablations.records.names import TRIALS

_EPILOG = """\
examples:
  sievit log 3f9c1b                        by the trial's key, or how it begins (four digits or more)
  sievit log 3f9c1b --out s3://bucket/runs/a
  sievit status --out OUT                  lists the keys of failed trials; results.parquet has all

exit status: 0 all is well, 2 bad input, such as a key that no trial has
"""


def _add_options(parser: argparse.ArgumentParser) -> None:
    add_old_out(parser)
    parser.add_argument("key", metavar="KEY", help="the trial's key, or how it begins")
    add_out(parser)


def _log(arguments: argparse.Namespace) -> int:
    from ablations.store.status import find_key, log_lines

    store = store_of(arguments)
    print("\n".join(log_lines(store, find_key(store, arguments.key, folders=(TRIALS, "logs")))))
    return OK


COMMAND = Command(
    summary="the log of a trial",
    description="What is known of one trial, and what was said while it was computed, on whichever node that was.",
    epilog=_EPILOG,
    add_options=_add_options,
    carry_out=_log,
)
