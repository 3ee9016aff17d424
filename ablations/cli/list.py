"""``sievit list``: the specs that ship, or the reducers."""

from __future__ import annotations

import argparse
from typing import TYPE_CHECKING

from ablations.cli.options import OK, SPEC_HELP, Command
from ablations.words import table

if TYPE_CHECKING:
    from ablations.spec.model import AblationSpec

_ALWAYS, _CLIPS, _NAMED = "always", "on clips", "if named"
_ORDER = (_ALWAYS, _CLIPS, _NAMED)

_EPILOG = f"""\
examples:
  sievit list                every shipped spec and what it asks; `{_NAMED}`: a run leaves it out unless --specs has it;
                             `{_CLIPS}`: these and no others are run where none is named on --workload moving_digits
                             or clips
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
    rows = [[spec.name, _when(spec), spec.title, " ".join(spec.question.split())] for spec in specs]
    named = sum(_when(spec) == _NAMED for spec in specs)
    closing = f"{len(specs)} specs; {named} of them run only where --specs names them"
    if arguments.trials:
        from ablations.models.digits import MOVING

        clips = [spec.name for spec in specs if _when(spec) == _CLIPS]
        counts = _trials([spec.name for spec in specs if spec.name not in clips]) | _trials(clips, MOVING)
        header.insert(1, "trials")
        for row, spec in zip(rows, specs, strict=True):
            row.insert(1, str(counts[spec.name]))
        of = {when: sum(counts[spec.name] for spec in specs if _when(spec) == when) for when in _ORDER}
        closing += f"\n{of[_ALWAYS]} trials where no spec is named ({of[_CLIPS]} on clips), {of[_NAMED]} in the others"
    print(f"{table(header, rows)}\n{closing}")
    return OK


def _when(spec: AblationSpec) -> str:
    """When a spec is run that nobody names."""
    from ablations.spec.model import runs_by_default

    if runs_by_default(spec, clips=True):
        return _CLIPS
    return _ALWAYS if runs_by_default(spec, clips=False) else _NAMED


def _trials(names: list[str], workload: str = "embedded") -> dict[str, int]:
    """How many trials each spec has, with the main model of an embedded workload."""
    from ablations.models.loading import default_models
    from ablations.run.session import Settings, preview

    main, *_ = default_models(workload)
    asked = Settings(specs=tuple(names), workload=workload, model=main)
    return {name: len(trials) for name, trials in preview(asked).trials.items()} if names else {}


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
