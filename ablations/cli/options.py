"""What the command line understands: every command, every option, and the help that teaches them."""

from __future__ import annotations

import argparse
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from ablations.records.files import user_path

Command = Callable[[argparse.Namespace], int]

_EPILOG = """\
examples:
  python -m ablations list                        the specs and how many trials each has
  python -m ablations list --reducers             every method with its properties
  python -m ablations validate my_question.yaml   check a spec; nothing is run
  python -m ablations run                         all specs on the embedded workload, into results/
  python -m ablations run --specs k_values class_token --limit 200 --out out/quick
  python -m ablations run --workload imagefolder --data IMAGES --model deit_small_patch16_224 --out out/imagenet
  python -m ablations run --serial --specs k_values     in this process: the way to debug a trial
  python -m ablations run --specs model_scaling --workload imagefolder --data IMAGES \
      --model "deit_tiny_patch16_224 deit_small_patch16_224"   several models, for specs that compare them
  python -m ablations run --profile               and where the time went
  python -m ablations status results              how far a run is; --watch: from another terminal, until it is over
  python -m ablations log results 3f9c            what was said while a trial was computed, by its key
  python -m ablations reproduce 3f9c --out results   run that trial again and compare, bit for bit
  python -m ablations train dynamicvit            train a method and put it beside random drop (train --help)
  RAY_ADDRESS=HOST:6379 python -m ablations run   on an existing Ray cluster (--out on a disk that all
                                                  nodes share, or s3://BUCKET/FOLDER)

A run may be stopped at any time; the same command goes on where it stopped, and computes nothing twice.
exit status: 0 all is well, 1 some trials failed (run again to repeat them), 2 bad input, 130 interrupted
"""

_SPEC_HELP = """\
a spec is a short YAML file:
  name: my_question
  title: What I want to know
  base:                                # defaults for every arm
    x: budget
    vary: {K: [24, 48, 96]}            # of the 196 patches of a DeiT; other models keep the same share
  arms:                                # one curve each
    - variant: ATS
      stages: [{at: [3], stack: [{name: ats, budget: {ratio: $K/196, of: initial, rounding: nearest}}]}]
    - variant: top-K
      stages: [{at: [3], stack: [{name: topk, budget: {ratio: $K/196, of: initial, rounding: nearest}}]}]
"""


_DOCS_HELP = """\
examples:
  python -m ablations docs            write docs/methods: a page for each registered method, and an index
  python -m ablations docs --check    say which pages are not current
"""

_TRAIN_HELP = """\
examples:
  python -m ablations train                       the methods that can be trained
  python -m ablations train dynamicvit            on the embedded workload, minutes on two cores
  python -m ablations train dynamicvit tps        one after the other, one table
  python -m ablations train all
  python -m ablations train avit --set epochs=1 images=512          a shorter training
  python -m ablations train dynamicvit --at 3,6,9 --settings '{"budget": {"ratio": 0.5}}'     at another budget
  python -m ablations train dynamicvit --workload imagefolder --data imagenette --weights deit_tiny.safetensors \
      --set epochs=5 lr=1e-4

Trains the method as ablations/specs/trained_methods.yaml says, evaluates it, brings random drop at three blocks to the
same cost, evaluates that off the shelf and after a training on as many images, and prints one table with a verdict.

written below OUT:
  train/METHOD/finetuned.safetensors   the model's weights
  train/METHOD/reducers.safetensors    the method's own, where it has any
  train/METHOD/train.json              settings and results
  cache/finetuned                      finished trainings, which no command repeats, and checkpoints

A training may be stopped at any time; the same command goes on where it stopped. One placement without comparison:
python -m ablations.measure.finetune --help. exit status: 0 all is well, 2 bad input, 130 interrupted
"""

_STATUS_HELP = """\
examples:
  python -m ablations status results              how far each spec is, what failed, what is stale and why
  python -m ablations status results --watch      the same every 5 seconds, from any terminal or machine
  python -m ablations status s3://bucket/runs/a    results kept in an object store
  python -m ablations log results 3f9c1b          one trial, by its key or how it begins

waiting: not begun, running, or lost; stale: on disk, but of another model, other images, other code, or no spec.
exit status: 0 all is well, 2 bad input
"""

_REPRODUCE_HELP = """\
examples:
  python -m ablations reproduce 3f9c1b --out results
  python -m ablations reproduce 3f9c1b --out s3://bucket/runs/a --data /mnt/imagenet/val

Nothing of the run is used but its record: images are decoded, settings sought and weights finetuned once more. Every
column but times, memory, device and versions is compared, and every image, to the last bit.
exit status: 0 the same, 1 not the same, 2 bad input
"""


def make_parser(commands: Mapping[str, Command]) -> argparse.ArgumentParser:
    """The options of every command; ``commands`` are the functions that carry them out."""
    raw = argparse.RawDescriptionHelpFormatter
    parser = argparse.ArgumentParser(
        prog="python -m ablations",
        formatter_class=raw,
        epilog=_EPILOG,
        description="Comparative ablations of token reduction in vision transformers: plan, run, look.",
    )
    parser.add_argument("-v", "--verbose", action="store_true", help="say more, and show tracebacks of errors")
    subparsers = parser.add_subparsers(required=True, metavar="COMMAND")

    listing = subparsers.add_parser("list", help="the specs, or the reducers", formatter_class=raw, epilog=_SPEC_HELP)
    listing.add_argument("--reducers", action="store_true", help="list the reducers and their settings instead")
    listing.set_defaults(command=commands["list"])

    checking = subparsers.add_parser(
        "validate", help="check specs and show the plan; runs nothing", formatter_class=raw, epilog=_SPEC_HELP
    )
    checking.add_argument("specs", nargs="*", metavar="SPEC", help="name of a shipped spec, or a .yaml file (all)")
    _model_options(checking)
    checking.set_defaults(command=commands["validate"])

    running = subparsers.add_parser("run", help="run what is not finished yet", formatter_class=raw, epilog=_EPILOG)
    running.add_argument(
        "--out",
        type=_place,
        default=Path("results"),
        metavar="OUT",
        help="folder of the results, or s3://BUCKET/FOLDER (results)",
    )
    running.add_argument("--specs", nargs="+", default=[], metavar="SPEC", help="names of specs or .yaml files (all)")
    _model_options(running)
    _data_options(running)
    running.add_argument("--batch", type=int, metavar="N", help="images in a batch (by image size)")
    running.add_argument("--strict", action="store_true", help="refuse images that cannot be used, instead of skipping")
    running.add_argument(
        "--download", action="store_true", help="let torchvision and timm fetch a data set into --data"
    )
    running.add_argument("--workers", type=int, metavar="N", help="trials at once (one a core, or four a GPU)")
    running.add_argument(
        "--time-limit", type=float, default=3600.0, metavar="SECONDS",
        help="a trial that makes no progress for that long is ended and tried again (3600; 0: never)",
    )  # fmt: skip
    running.add_argument("--serial", action="store_true", help="run in this process, one after the other, without Ray")
    running.add_argument("--profile", action="store_true", help="show where the time went (always in OUT/profile.json)")
    running.add_argument("--dry-run", action="store_true", help="open everything, show the plan and stop")
    running.set_defaults(command=commands["run"])

    training = subparsers.add_parser(
        "train", help="train a method and compare it with random drop", formatter_class=raw, epilog=_TRAIN_HELP
    )
    training.add_argument("methods", nargs="*", metavar="METHOD", help="registered names, or all (none: list them)")
    training.add_argument("--out", type=user_path, default=Path("results/embedded"), help="folder (results/embedded)")
    _model_options(training)
    _data_options(training)
    training.add_argument("--at", metavar="BLOCKS", help="place the method here: 3, 3-11, all or 3,6,9 (as the spec)")
    training.add_argument("--settings", metavar="JSON", help="the method's settings (as the spec)")
    training.add_argument(
        "--set", nargs="+", action="extend", default=[], metavar="NAME=VALUE", help="settings of the recipe: epochs=1"
    )
    training.set_defaults(command=commands["train"])

    documenting = subparsers.add_parser(
        "docs", help="make docs/methods from the docstrings and the registry", formatter_class=raw, epilog=_DOCS_HELP
    )
    documenting.add_argument("--check", action="store_true", help="change nothing; exit status 1 if pages are stale")
    documenting.set_defaults(command=commands["docs"])

    _looking(subparsers, commands)
    return parser


def _looking(subparsers: Any, commands: Mapping[str, Command]) -> None:
    """Commands that look at what a run left."""
    raw = argparse.RawDescriptionHelpFormatter
    state = subparsers.add_parser(
        "status", help="how far each spec of a run is", formatter_class=raw, epilog=_STATUS_HELP
    )
    state.add_argument("out", type=_place, metavar="OUT", help="folder or URI of the results")
    state.add_argument(
        "--watch", type=float, nargs="?", const=5.0, metavar="SECONDS",
        help="look again every so many seconds, until the run is over (5)",
    )  # fmt: skip
    state.set_defaults(command=commands["status"])

    logs = subparsers.add_parser("log", help="the log of a trial", formatter_class=raw, epilog=_STATUS_HELP)
    logs.add_argument("out", type=_place, metavar="OUT", help="folder or URI of the results")
    logs.add_argument("key", metavar="KEY", help="the trial's key, or how it begins")
    logs.set_defaults(command=commands["log"])

    again = subparsers.add_parser(
        "reproduce", help="run one trial again and compare", formatter_class=raw, epilog=_REPRODUCE_HELP
    )
    again.add_argument("key", metavar="KEY", help="the trial's key, or how it begins")
    again.add_argument("--out", type=_place, default=Path("results"), metavar="OUT", help="where it is on record")
    again.add_argument("--data", metavar="DIR", help="where the images are by now (as the run had them)")
    again.add_argument("--train-data", metavar="DIR", help="where the training images are by now")
    again.add_argument("--labels", metavar="FILE", help="where the file of labels is by now")
    again.add_argument("--weights", metavar="FILE", help="where the model's weights are by now")
    again.add_argument(
        "--scratch", type=user_path, metavar="DIR", help="a folder to work in and to keep (a temporary one)"
    )
    again.set_defaults(command=commands["reproduce"])


def _place(text: str) -> Path | str:
    """A folder, or a URI as it stands: a path would lose one of its slashes."""
    return text if "//" in text and ":" in text.partition("//")[0] else Path(text)


def _data_options(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--data", help="folder of the images, for workloads that read one")
    parser.add_argument(
        "--train-data", metavar="DIR", help="folder of the training images, for finetuning (DATA/train beside DATA/val)"
    )
    parser.add_argument(
        "--weights", metavar="FILE",
        help="a .safetensors file, or 'random' (default: the model's own); one for each of several models",
    )  # fmt: skip
    parser.add_argument(
        "--labels", metavar="LABELS",
        help="for --data: a file of labels (val.txt, LOC_val_solution.csv), 'order' (sorted folders are the head's "
        "classes) or 'index' (folders are named by index); default: WordNet ids, else found out",
    )  # fmt: skip
    parser.add_argument("--no-links", action="store_true", help="do not follow links to folders or out of the folder")
    parser.add_argument("--limit", type=int, metavar="N", help="evaluate at most N images")


def _model_options(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--workload", default="embedded", help="embedded, imagefolder, timm:…, torchvision:… or hub:… (embedded)"
    )
    parser.add_argument(
        "--model", metavar="NAME",
        help="timm name of the model (digits_vit_small, else deit_tiny_patch16_224); of several, 'A B', the first is "
        "the run's own and the others are for specs that say `models: all`",
    )  # fmt: skip
