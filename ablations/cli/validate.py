"""``sievit validate``: check specs and show the plan."""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from typing import TYPE_CHECKING

from ablations.cli.options import OK, SPEC_HELP, Command, add_model_options
from ablations.words import table

if TYPE_CHECKING:
    from ablations.trial.trial import Trial

_EPILOG = f"""\
examples:
  sievit validate                          every shipped spec that runs where none is named
  sievit validate my_question.yaml         a spec of your own, on the embedded model
  sievit validate my_question.yaml --workload imagefolder --model deit_small_patch16_224

{SPEC_HELP}
exit status: 0 the specs are valid, 2 one is not, with the file, the line and the remedy
"""


def _add_options(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("specs", nargs="*", metavar="SPEC", help="name of a shipped spec, or a .yaml file (all)")
    add_model_options(parser)


def _validate(arguments: argparse.Namespace) -> int:
    from ablations.run.session import Settings, preview

    settings = Settings(
        workload=arguments.workload,
        model=arguments.model or None,
        img_size=arguments.img_size or None,
        frames=arguments.frames or None,
        specs=tuple(arguments.specs),
    )
    plan = preview(settings)
    for file in plan.specs:
        trials = plan.trials[file.spec.name]
        print(f"{file.spec.name}: {file.spec.title} ({len(trials)} trials)")
        rows = _trial_rows(trials, plan.facts.patches)
        print(table(["variant", "x", "placement", "budget", "seed"], rows, indent="  "))
    print(f"valid for {settings.model_name}; nothing was run")
    return OK


def _trial_rows(trials: Sequence[Trial], patches: int) -> list[list[str]]:
    """Variant, x, placement, budget and seed of each trial; ``patches`` is what the model starts with."""
    from ablations.trial.labels import blocks_of, placement_label

    return [
        [
            trial.variant,
            "" if trial.x is None else f"{trial.x:g}",
            placement_label(blocks_of(trial.stages.data)),
            _budget(trial, patches),
            str(trial.seed),
        ]
        for trial in trials
    ]


def _budget(trial: Trial, patches: int) -> str:
    """``K = 48``, ``0.50 of dense: K = auto``, and what else is done with the trial."""
    from ablations.trial.labels import labels_of, target_label

    budget = labels_of(trial.stages.data, patches)["budget"] or ""
    parts = [budget if trial.target is None else f"{target_label(trial.target)}: {budget}"]
    parts += [f"{name}: {value}" for name, value in trial.host.data.items()]
    if trial.training:
        parts.append("finetuned")
    if trial.measure:
        parts.append(f"{trial.measure} at batch {trial.batch}")
    return ", ".join(part for part in parts if part)


COMMAND = Command(
    summary="check specs and show the plan; runs nothing",
    description="Check specs against a model, build every reducer once, and show each trial. Nothing is run.",
    epilog=_EPILOG,
    add_options=_add_options,
    carry_out=_validate,
)
