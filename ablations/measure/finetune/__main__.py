"""Finetune one placement on its own: ``python -m ablations.measure.finetune --help``.

Needs torch, timm and safetensors.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import logging
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

from ablations.measure.context import TrialContext
from ablations.measure.evaluate import run_trial
from ablations.measure.finetune.cache import Finetuned, Machine, trained_from
from ablations.measure.opening import Subject, choose_device, open_context, open_subject, target_of
from ablations.models.model_names import chosen_name
from ablations.records.files import atomic, user_path
from ablations.streams import standard_streams
from ablations.system import cores
from ablations.trial.labels import with_nested
from ablations.trial.recipe import Recipe, RecipeError, parse_recipe, parse_settings
from ablations.trial.stages import OFF_THE_SHELF, Stages
from ablations.workloads import ImageSource, Reading, default_models
from ablations.workloads.training import TrainingAccess
from reducers import Placement
from reducers.placement_file import read_placement_file

log = logging.getLogger("ablations.measure.finetune")

OK, BAD_INPUT, INTERRUPTED = 0, 2, 130
_AT_ONCE = 64  # images that are evaluated at once

_EPILOG = """\
examples:
  python -m ablations.measure.finetune --out out/ats --at 3-11 --reducer '{"name": "ats", "budget": {"count": 20}}'
  python -m ablations.measure.finetune --out out/dense --set epochs=3 seed=1
  python -m ablations.measure.finetune --out out/found --stages results/embedded/recommended/0.50.yaml
  python -m ablations.measure.finetune --workload imagefolder --data imagenette --weights deit_tiny.safetensors \\
      --at 3-11 --reducer '{"name": "topk", "budget": {"ratio": 0.865}}' --set epochs=10 lr=1e-4 --out out/topk

written below OUT:
  finetuned.safetensors   the model's weights: WEIGHTS=OUT/finetuned.safetensors of any later run
  reducers.safetensors    the reducers' own trained weights, where they have any
  finetune.json           the recipe, every epoch, and what the evaluated images say before and after
  cache/                  scenes, checkpoints, finished trainings

A training may be stopped at any time; the same command goes on where it stopped and gives the same weights, bit for
bit on a CPU. The weights after the last epoch are the result: none is chosen by the evaluated images. DATA holds train
and val, or --train-data names the images to train on. exit status: 0 all is well, 2 bad input, 130 interrupted
"""


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command; the exit status. User errors are one message on standard error."""
    arguments = _parser().parse_args(argv)
    with standard_streams(lasting=True):
        return _carry_out(arguments)


def _carry_out(arguments: argparse.Namespace) -> int:
    logging.basicConfig(level=logging.INFO, format="%(asctime)s %(message)s", datefmt="%H:%M:%S", stream=sys.stderr)
    try:
        _run(arguments)
    except KeyboardInterrupt:
        print("\ninterrupted; the same command goes on from the last checkpoint", file=sys.stderr)
        return INTERRUPTED
    except (ValueError, OSError) as error:
        print(f"error: {error}", file=sys.stderr)
        return BAD_INPUT
    return OK


def _run(arguments: argparse.Namespace) -> None:
    workload = arguments.workload
    name = chosen_name(arguments.model or default_models(workload)[0], arguments.img_size)
    recipe = parse_recipe({**parse_settings(arguments.set), "stages": _stages(arguments)}, workload=workload)
    out = user_path(arguments.out)
    cache = out / "cache"
    source = ImageSource(
        workload, arguments.data, arguments.train_data, limit=arguments.limit,
        reading=Reading(arguments.labels, not arguments.no_links),
    )  # fmt: skip
    subject = open_subject(source, name, weights=arguments.weights, cache=cache, batch=_AT_ONCE, calibrated=False)
    recipe.placement(subject.facts.depth)  # a budget that is not known is refused before anything is evaluated
    device = torch.device(arguments.device) if arguments.device else choose_device()
    context = None if arguments.no_evaluation else open_context(subject, device, cache=cache)
    before = None if context is None else _evaluated(recipe, context, trained=False)
    done = trained_from(
        subject.loaded.model,
        subject.facts,
        recipe,
        TrainingAccess(source, name, cache, classes=subject.workload.classes),
        evaluated=subject.workload,
        machine=Machine(device, workers=_workers(arguments), every=arguments.checkpoint_every),
    )
    after = None if context is None else _evaluated(recipe, context, trained=True)
    _write(out, recipe, subject, done, {"before": before, "after": after})
    for moment, found in (("before", before), ("after", after)):
        for what, (top1, gmacs) in (found or {}).items():
            print(f"{moment:6s} {what:7s} top-1 {100 * top1:6.2f} %  {gmacs:.4f} GMACs  {len(subject.workload)} images")


def _workers(arguments: argparse.Namespace) -> int:
    """Processes that load images: photographs take long to decode, scenes come ready from a map."""
    if arguments.workers is not None:
        workers: int = arguments.workers
        return workers
    return 0 if arguments.workload.startswith("embedded") else max(1, min(16, cores() - 1))


def _evaluated(recipe: Recipe, context: TrialContext, *, trained: bool) -> dict[str, tuple[float, float]]:
    """Top-1 and mean GMACs an image, of the model as it is and with the recipe's reducers, before or after training.

    Methods that must be trained are left out before they are.
    """
    placements = {"dense": Placement()}
    if recipe.stages:
        reduced = recipe.placement(context.facts.depth)
        parts = [part for reducer in reduced.blocks.values() for part in with_nested(reducer)]
        if trained or not any(part.traits.trained for part in parts):
            placements["reduced"] = reduced
    target = target_of(context.facts, context.workload, None, batch=_AT_ONCE)
    found = {}
    for what, placement in placements.items():
        trial = target.trial(
            spec="finetune", variant=what, x=None, stages=Stages.of_placement(placement), seed=recipe.seed,
            training=recipe.training() if trained else OFF_THE_SHELF, calibrated=False,
        )  # fmt: skip
        row = run_trial(trial, context).row
        found[what] = row["top1"], row["gmacs_mean"]
    return found


def _write(out: Path, recipe: Recipe, subject: Subject, done: Finetuned, evaluation: dict[str, Any]) -> None:
    done.save(out)
    content = {
        "model": subject.facts.name,
        "initial_weights": {"kind": subject.facts.weights, "digest": subject.facts.weights_digest},
        "recipe": recipe.spec(),
        "training": dict(done.record),
        "evaluation": evaluation,
    }
    with atomic(out / "finetune.json") as temporary:
        temporary.write_text(json.dumps(content, indent=1) + "\n", encoding="utf-8")
    log.info("wrote %s", out / "finetuned.safetensors")


def _stages(arguments: argparse.Namespace) -> list[Any]:
    """The placement, from --stages or from --at with --reducer; [] is the dense model."""
    if arguments.stages is not None:
        if arguments.at or arguments.reducer:
            raise RecipeError("give --stages, or --at with --reducer, not both")
        if arguments.stages.endswith((".yaml", ".yml")):
            return read_placement_file(user_path(arguments.stages)).placement.spec()
        stages: list[Any] = _json(arguments.stages, "--stages")
        return stages
    if bool(arguments.at) != bool(arguments.reducer):
        raise RecipeError("--at and --reducer belong together: where, and what")
    return (
        [{"at": arguments.at, "stack": [_json(text, "--reducer") for text in arguments.reducer]}]
        if arguments.at
        else []
    )


def _json(text: str, option: str) -> Any:
    try:
        return json.loads(text)
    except ValueError as error:
        raise RecipeError(
            f'{option} is JSON, such as \'{{"name": "ats", "budget": {{"count": 108}}}}\'; {error}'
        ) from error


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="python -m ablations.measure.finetune",
        description="Finetune a vision transformer with token reduction active in training, or without any.",
        epilog=_EPILOG,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--out", required=True, help="folder of the results")
    parser.add_argument("--workload", choices=("embedded", "embedded:v1", "imagefolder"), default="embedded")
    parser.add_argument("--data", help="image folder with train and val, for imagefolder")
    parser.add_argument("--train-data", help="folder of the images to train on, where it is not DATA/train")
    parser.add_argument("--labels", help="a file of labels of DATA's images, or order, or index: as of `run --help`")
    parser.add_argument("--no-links", action="store_true", help="do not follow links to folders or out of the folder")
    parser.add_argument("--model", help="a timm name (default: the workload's), or as `sievit run` takes it")
    parser.add_argument("--img-size", metavar="PIXELS", help="384 or 384,320: another size than the model's own")
    parser.add_argument("--weights", help="a .safetensors file, or random (default: the model's own)")
    parser.add_argument("--at", help="blocks at which tokens are reduced: 3, 3-11, all or 3,6,9")
    parser.add_argument("--reducer", action="append", help="JSON; several times for a stack (default: the dense model)")
    parser.add_argument("--stages", help="the whole placement, as JSON or a placement file of `sievit recommend`")
    settings = ", ".join(field.name for field in dataclasses.fields(Recipe) if field.name != "stages")
    parser.add_argument(
        "--set",
        nargs="+",
        action="extend",
        default=[],
        metavar="NAME=VALUE",
        help=f"settings of the recipe: {settings}",
    )
    parser.add_argument("--limit", type=int, help="evaluate at most that many images")
    parser.add_argument("--no-evaluation", action="store_true", help="train only")
    parser.add_argument("--device", help="such as cpu or cuda:0 (default: a GPU where there is one)")
    parser.add_argument(
        "--workers", type=int, help="processes that load images (default: by the workload and the cores)"
    )
    parser.add_argument("--checkpoint-every", type=float, default=60.0, metavar="SECONDS", help="(default: 60)")
    return parser


if __name__ == "__main__":
    sys.exit(main())
