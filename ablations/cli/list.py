"""``sievit list``: the specs that ship, or the reducers."""

from __future__ import annotations

import argparse

from ablations.cli.options import OK, SPEC_HELP, Command
from ablations.words import table

_ALWAYS, _NAMED = "always", "if named"

_EPILOG = f"""\
examples:
  sievit list                every shipped spec and what it asks; `{_NAMED}`: a run leaves it out unless --specs has it
  sievit list --trials       and how many trials each has on the embedded model (some seconds)
  sievit list --reducers     every method with its properties
  sievit run --specs finetuning          how a spec is named

{SPEC_HELP}
exit status: 0 all is well, 2 bad input
"""


def _add_options(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--trials", action="store_true", help="count the trials of each spec as well")
    parser.add_argument("--reducers", action="store_true", help="list the reducers and their settings instead")


def _list(arguments: argparse.Namespace) -> int:
    if arguments.reducers:
        return _list_reducers()
    from ablations.spec.model import find_specs

    specs = [file.spec for file in find_specs(only_default=False)]
    header = ["spec", "runs", "title", "question"]
    rows = [[spec.name, _ALWAYS if spec.default else _NAMED, spec.title, " ".join(spec.question.split())]
            for spec in specs]  # fmt: skip
    named = sum(not spec.default for spec in specs)
    closing = f"{len(specs)} specs; {named} of them run only where --specs names them"
    if arguments.trials:
        counts = _trials([spec.name for spec in specs])
        header.insert(1, "trials")
        for row, spec in zip(rows, specs, strict=True):
            row.insert(1, str(counts[spec.name]))
        always = sum(counts[spec.name] for spec in specs if spec.default)
        closing += f"\n{always} trials where no spec is named, {sum(counts.values()) - always} in the others"
    print(f"{table(header, rows)}\n{closing}")
    return OK


def _trials(names: list[str]) -> dict[str, int]:
    """How many trials each spec has, with the embedded models."""
    from ablations.run.session import Settings, preview

    return {name: len(trials) for name, trials in preview(Settings(specs=tuple(names))).trials.items()}


def _list_reducers() -> int:
    from ablations.catalogue.methods import REDUCER_COLUMNS, reducer_rows

    rows = reducer_rows()
    print(table(REDUCER_COLUMNS, rows))
    print(f"{len(rows)} methods; a page on each: docs/methods")
    return OK


COMMAND = Command(
    summary="the specs and what each asks, or the reducers",
    description="The specs that ship: when each runs, its title and its question. Or the reducers, with --reducers.",
    epilog=_EPILOG,
    add_options=_add_options,
    carry_out=_list,
)
