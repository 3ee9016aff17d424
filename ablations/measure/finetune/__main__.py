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
from torch import nn

from ablations.measure.finetune.cache import Finetuned, Machine, identity, train_or_load
from ablations.records.files import atomic, user_path
from ablations.streams import standard_streams
from ablations.system import cores
from ablations.trial.labels import with_nested
from ablations.trial.recipe import Recipe, RecipeError, parse_recipe, parse_settings
from ablations.workloads import LoadedModel, Reading, Workload, default_models, open_model, open_workload
from ablations.workloads.training import TrainingAccess
from reducers import Placement, reduce_tokens

log = logging.getLogger("ablations.measure.finetune")

OK, BAD_INPUT, INTERRUPTED = 0, 2, 130

_EPILOG = """\
examples:
  python -m ablations.measure.finetune --out out/ats --at 3-11 --reducer '{"name": "ats", "budget": {"count": 20}}'
  python -m ablations.measure.finetune --out out/dense --set epochs=3 seed=1
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
    workload, name = arguments.workload, arguments.model or default_models(arguments.workload)[0]
    recipe = parse_recipe({**parse_settings(arguments.set), "stages": _stages(arguments)}, workload=workload)
    out = user_path(arguments.out)
    (out / "cache").mkdir(parents=True, exist_ok=True)
    evaluated = open_workload(
        workload, data=arguments.data, model=name, limit=arguments.limit, strict=False, cache=out / "cache",
        weights=arguments.weights, reading=_reading(arguments),
    )  # fmt: skip
    loaded = open_model(name, weights=arguments.weights, workload_name=workload, classes=evaluated.classes)
    device = torch.device(arguments.device or ("cuda" if torch.cuda.is_available() else "cpu"))
    loaded.model.to(device)
    before = None if arguments.no_evaluation else _measured(loaded.model, recipe, evaluated, device)
    done = _train(recipe, name, loaded, evaluated, out, device, arguments)
    after = None if arguments.no_evaluation else _measured(done.model, recipe, evaluated, device, done=done)
    _write(out, recipe, name, loaded, done, {"before": before, "after": after})
    for moment, found in (("before", before), ("after", after)):
        for what, (top1, gmacs) in (found or {}).items():
            print(f"{moment:6s} {what:7s} top-1 {100 * top1:6.2f} %  {gmacs:.4f} GMACs  {len(evaluated)} images")


def _train(
    recipe: Recipe,
    name: str,
    loaded: LoadedModel,
    evaluated: Workload,
    out: Path,
    device: torch.device,
    arguments: argparse.Namespace,
) -> Finetuned:
    access = TrainingAccess(
        workload=arguments.workload,
        model=name,
        cache=out / "cache",
        classes=evaluated.classes,
        data=arguments.data,
        train_data=arguments.train_data,
        reading=_reading(arguments),
    )
    images = access.open(augment=recipe.augment, holdout=recipe.holdout, seed=recipe.seed, evaluated=evaluated)
    log.info("%d training images, %d evaluated", len(images), len(evaluated))
    return train_or_load(
        recipe,
        loaded.model,
        images,
        identity=identity(recipe, model=name, weights_digest=loaded.digest, images=images),
        folder=out / "cache" / "finetuned",
        machine=Machine(device, workers=_workers(arguments), every=arguments.checkpoint_every),
    )


def _reading(arguments: argparse.Namespace) -> Reading:
    return Reading(arguments.labels, not arguments.no_links)


def _workers(arguments: argparse.Namespace) -> int:
    """Processes that load images: photographs take long to decode, scenes come ready from a map."""
    if arguments.workers is not None:
        workers: int = arguments.workers
        return workers
    return 0 if arguments.workload == "embedded" else max(1, min(16, cores() - 1))


@torch.inference_mode()
def _measured(
    model: nn.Module,
    recipe: Recipe,
    workload: Workload,
    device: torch.device,
    *,
    done: Finetuned | None = None,
) -> dict[str, tuple[float, float]]:
    """Top-1 and mean GMACs an image, of the model as it is and with the recipe's reducers.

    Methods that must be trained are left out before they are.
    """
    blocks: Any = model.blocks
    placements = {"dense": Placement()}
    if recipe.stages:
        placement = recipe.placement(len(blocks))
        if done is not None:
            placements["reduced"] = done.load_reducers(placement)
        elif not any(part.trained for reducer in placement.blocks.values() for part in with_nested(reducer)):
            placements["reduced"] = placement
    found = {}
    for what, placement in placements.items():
        fast = reduce_tokens(model, placement).to(device).eval()
        correct, macs = 0, 0.0
        for start in range(0, len(workload), 64):
            stop = min(start + 64, len(workload))
            logits, trace = fast.trace(workload.batch(start, stop).to(device))
            correct += int((logits.argmax(1).cpu() == torch.from_numpy(workload.labels[start:stop].copy())).sum())
            macs += float(trace.macs.sum())
        found[what] = correct / len(workload), macs / len(workload) / 1e9
    return found


def _write(
    out: Path, recipe: Recipe, name: str, loaded: LoadedModel, done: Finetuned, evaluation: dict[str, Any]
) -> None:
    done.save(out)
    content = {
        "model": name,
        "initial_weights": {"kind": loaded.weights, "digest": loaded.digest},
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
    parser.add_argument("--workload", choices=("embedded", "imagefolder"), default="embedded")
    parser.add_argument("--data", help="image folder with train and val, for imagefolder")
    parser.add_argument("--train-data", help="folder of the images to train on, where it is not DATA/train")
    parser.add_argument("--labels", help="a file of labels of DATA's images, or order, or index: as of `run --help`")
    parser.add_argument("--no-links", action="store_true", help="do not follow links to folders or out of the folder")
    parser.add_argument("--model", help="a timm name (default: the workload's)")
    parser.add_argument("--weights", help="a .safetensors file, or random (default: the model's own)")
    parser.add_argument("--at", help="blocks at which tokens are reduced: 3, 3-11, all or 3,6,9")
    parser.add_argument("--reducer", action="append", help="JSON; several times for a stack (default: the dense model)")
    parser.add_argument("--stages", help="the whole placement as JSON, in place of --at and --reducer")
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
