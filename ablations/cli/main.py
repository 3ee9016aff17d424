"""``sievit``: which commands there are, how their words are understood, and how every one of them ends."""

from __future__ import annotations

import argparse
import importlib
import logging
import signal
import sys
import traceback
from collections.abc import Sequence
from typing import Any

from ablations.cli.options import BAD_INPUT, INTERRUPTED, OK, Command
from ablations.records.streams import silence
from ablations.streams import standard_streams
from ablations.version import own_version

COMMANDS = ("run", "list", "validate", "status", "log", "reproduce", "train", "report", "docs", "recommend")
"""In the order of ``sievit --help``; each is the ``COMMAND`` of the file of its name."""

_DESCRIPTION = """\
Comparative ablations of token reduction in vision transformers: plan, run, look.

A question is a spec, a short YAML file; a run computes the trials of its specs and keeps each as it ends; the report
draws them. `sievit COMMAND --help` has the options and more examples.
"""

_EPILOG = """\
examples:
  sievit list                                     the specs that ship, and what each asks
  sievit run --specs k_values --out out/quick     run one of them
  sievit status --out out/quick --watch           how far it is, from another terminal
  sievit report --out out/quick                   draw figures, tables and report.html
  sievit validate my_question.yaml                check a spec of your own; nothing is run
  sievit list --reducers                          every method with its properties

A run may be stopped at any time; the same command goes on where it stopped, and computes nothing twice.
`python -m ablations` is the same as `sievit`.

exit status: 0 all is well, 1 what was asked for failed in part or is not so, 2 bad input, 130 interrupted
"""


def main(argv: Sequence[str] | None = None) -> int:
    """Run a command; the exit status. User errors are one message on standard error, without a traceback."""
    words = list(sys.argv[1:] if argv is None else argv)
    arguments = make_parser().parse_args(words)
    arguments.words = words
    with standard_streams(lasting=arguments.command.lasting):
        return _carry_out(arguments)


def make_parser() -> argparse.ArgumentParser:
    """What the command line understands: every command with its options and its help."""
    raw = argparse.RawDescriptionHelpFormatter
    parser = argparse.ArgumentParser(prog="sievit", formatter_class=raw, description=_DESCRIPTION, epilog=_EPILOG)
    parser.add_argument("--version", action=_Version, nargs=0, help="show the version and stop")
    parser.add_argument("-v", "--verbose", action="store_true", help="say more, and show tracebacks of errors")
    subparsers = parser.add_subparsers(required=True, metavar="COMMAND")
    for name in COMMANDS:
        command: Command = importlib.import_module(f"ablations.cli.{name}").COMMAND
        one = subparsers.add_parser(
            name, help=command.summary, formatter_class=raw, description=command.description, epilog=command.epilog
        )
        one.add_argument(
            "-v", "--verbose", action="store_true", default=argparse.SUPPRESS, help="say more, with tracebacks"
        )
        command.add_options(one)
        one.set_defaults(command=command)
    return parser


class _Version(argparse.Action):
    """Looks the version up only when it is asked for."""

    def __call__(self, parser: argparse.ArgumentParser, *_: Any, **__: Any) -> None:
        print(f"sievit {own_version()}")
        parser.exit(OK)


def _carry_out(arguments: argparse.Namespace) -> int:
    logging.basicConfig(
        level=logging.DEBUG if arguments.verbose else logging.INFO, format="%(message)s", stream=sys.stderr
    )
    for noisy in ("PIL", "urllib3", "matplotlib", "asyncio", "filelock"):
        logging.getLogger(noisy).setLevel(logging.WARNING)
    signal.signal(signal.SIGTERM, _interrupt)
    try:
        status: int = arguments.command.carry_out(arguments)
        sys.stdout.flush()  # here, and not as the interpreter ends: the reader of a pipe may have gone
        return status
    except KeyboardInterrupt:
        print("\ninterrupted; nothing that is finished is lost, and the same command goes on", file=sys.stderr)
        return INTERRUPTED
    except BrokenPipeError:  # the reader of a pipe has gone, e.g. `sievit list | head`
        silence(sys.stdout)
        return OK
    except ModuleNotFoundError as error:
        package = (error.name or "").partition(".")[0]
        if package in _OWN:
            raise  # a mistake of ours
        print(f"error: {_lacks(arguments, package)}", file=sys.stderr)
        return BAD_INPUT
    except (ValueError, OSError) as error:
        if arguments.verbose:
            traceback.print_exc()
        print(f"error: {error}", file=sys.stderr)
        return BAD_INPUT


_OWN = {"", "ablations", "analysis", "reducers"}
_SOLD_AS = {"yaml": "pyyaml", "sklearn": "scikit-learn", "PIL": "pillow", "ray": "'ray[tune]'"}  # where names differ


def _lacks(arguments: argparse.Namespace, package: str) -> str:
    """What is not installed, and what can be done without it."""
    what = f"this command needs {package}, which is not installed: `pip install {_SOLD_AS.get(package, package)}`"
    return f"{what}, or run with --serial" if package == "ray" and "serial" in arguments else what


def _interrupt(number: int, frame: object) -> None:
    raise KeyboardInterrupt
