"""``sievit report``: figures, tables and report.html of a run, by the analysis in a process of its own."""

from __future__ import annotations

import argparse
import os
import subprocess
import sys
from pathlib import Path

from ablations.cli.options import Command, add_out, run_place

_TOP = Path(__file__).parents[2]  # where the analysis lies beside this package

_EPILOG = """\
examples:
  sievit report                                    of results/, into results/
  sievit report --out /mnt/archive/run --to report     where OUT may only be read
  sievit report --out s3://bucket/runs/a

Drawn from what is on disk, also of a run that was stopped; no trial is computed. `python -m analysis OUT` does the
same, and its --help lists what is read and written.

exit status: 0 written; 1 written, but no trial had finished; 2 OUT cannot be read, or the report not written
"""


def _add_options(parser: argparse.ArgumentParser) -> None:
    add_out(parser)
    parser.add_argument("--to", metavar="DIR", help="write the report, figures and tables there, nothing to OUT")
    parser.add_argument(
        "--opening", metavar="FILE.png", help="draw that one figure instead: what survives beside what it costs"
    )
    parser.add_argument("-q", "--quiet", action="store_true", help="say nothing but warnings and errors")


def _report(arguments: argparse.Namespace) -> int:
    options = ["--quiet"] if arguments.quiet else []
    options += ["--opening", arguments.opening] if arguments.opening else []
    options += ["--to", arguments.to] if arguments.to else []  # `--to ""`, as make passes it on, means none
    return _analysis(*options, "--", str(run_place(arguments)))


def draw_recommendation(out: Path | str) -> int:
    """``recommend.html`` from ``recommend.json`` in OUT; the exit status."""
    return _analysis("--recommendation", "--", str(out))


def _analysis(*words: str) -> int:
    """``python -m analysis``; a process, since experiments know nothing of how they are drawn; and of the analysis that
    came with them: a folder of that name where somebody stands is something else (-P).
    """
    paths = [str(_TOP), *filter(None, [os.environ.get("PYTHONPATH")])]
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(paths)}
    command = [sys.executable, "-P", "-m", "analysis", *words]
    status = subprocess.run(command, env=environment, check=False).returncode
    return status if status >= 0 else 128 - status  # ended by a signal: as a shell says it


COMMAND = Command(
    summary="draw figures, tables and report.html",
    description="Draw the figures, tables and report of a run again, from its results.",
    epilog=_EPILOG,
    add_options=_add_options,
    carry_out=_report,
)
