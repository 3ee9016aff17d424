"""What commands share: what a command is, how one ends, where OUT is, and the options on models and data."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from ablations.records.names import RESULTS, RUN, TRIALS

if TYPE_CHECKING:
    from ablations.run.session import Settings
    from ablations.store.store import Store

OK, FAILED, BAD_INPUT, INTERRUPTED = 0, 1, 2, 130

DEFAULT_OUT = Path("results")  # where a run writes, and so where the others look

SPEC_HELP = """\
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


@dataclass(frozen=True)
class Command:
    """One command: what its help says, what it understands, and what it does."""

    summary: str  # its line in `sievit --help`
    description: str
    epilog: str  # examples and exit statuses
    add_options: Callable[[argparse.ArgumentParser], None]
    carry_out: Callable[[argparse.Namespace], int]  # the exit status
    lasting: bool = False  # it computes, and goes on where nobody reads what it prints any more


# --- OUT --------------------------------------------------------------------------------------------------------------


def add_out(parser: argparse.ArgumentParser, what: str = "folder of the results, or s3://BUCKET/FOLDER") -> None:
    """``--out``, as every command has it."""
    parser.add_argument("--out", type=place, metavar="OUT", help=f"{what} ({DEFAULT_OUT})")


def add_old_out(parser: argparse.ArgumentParser) -> None:
    """OUT as the first word, as versions before ``--out`` had it: understood, and in no help."""
    parser.add_argument("old_out", nargs="?", type=place, help=argparse.SUPPRESS)


def out_of(arguments: argparse.Namespace) -> Path | str:
    """OUT as it was given, or the default. The old form is answered with a note.

    Raises:
        ValueError: both forms were given.
    """
    old = getattr(arguments, "old_out", None)
    if old is None:
        return DEFAULT_OUT if arguments.out is None else arguments.out
    if arguments.out is not None:
        raise ValueError(f"two folders of results, {old} and --out {arguments.out}; give --out alone")
    print(f"note: OUT as a word of its own is the old form; write --out {old}", file=sys.stderr)
    return old


def run_place(arguments: argparse.Namespace) -> Path | str:
    """OUT of a command that looks at what a run left there.

    Raises:
        ValueError: there is nothing of a run, but in folders below it there is.
    """
    out = out_of(arguments)
    if isinstance(out, Path) and not any((out / name).exists() for name in (RUN, RESULTS, TRIALS)):
        runs = [f"--out {path.parent}" for path in sorted(out.glob(f"*/{RUN}"))]
        if runs:
            raise ValueError(f"{out} holds no {RUN}, but folders in it do; give one of them: {', '.join(runs[:4])}")
    return out


def store_of(arguments: argparse.Namespace) -> Store:
    """What a run left in OUT; raises as ``run_place`` does."""
    from ablations.store.store import Store

    return Store(run_place(arguments))


def place(text: str) -> Path | str:
    """OUT: a folder, or a URI as it stands: a path would lose one of its slashes."""
    return text if "//" in text and ":" in text.partition("//")[0] else Path(text)


# --- models and data --------------------------------------------------------------------------------------------------


def add_data_options(parser: argparse.ArgumentParser) -> None:
    """Where images, labels and weights are."""
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
    parser.add_argument(
        "--stride", type=int, metavar="N", help="of clips: frames of the video from one frame of a view to the next "
        "(default: spread over the whole video)",
    )  # fmt: skip
    parser.add_argument(
        "--views", metavar="VIEWS", help="of clips: crops of each frame, 3, or views in time x crops, 4x3; their "
        "answers are averaged (1: the middle)",
    )  # fmt: skip
    parser.add_argument("--no-links", action="store_true", help="do not follow links to folders or out of the folder")
    parser.add_argument("--limit", type=int, metavar="N", help="evaluate at most N images")


def add_model_options(parser: argparse.ArgumentParser) -> None:
    """The workload and the model."""
    parser.add_argument(
        "--workload", default="embedded",
        help="embedded, embedded:v1, moving_digits, imagefolder, clips, timm:…, torchvision:… or hub:… (embedded)",
    )  # fmt: skip
    parser.add_argument(
        "--model", metavar="NAME",
        help="timm name of the model (pairs_vit_tiny, else deit_tiny_patch16_224), hf-hub:OWNER/NAME or "
        "local-dir:FOLDER, or of transformers hf:FOLDER or hf:OWNER/NAME; of several, 'A B', the first is the run's "
        "own and the others are for specs that say `models: all`",
    )  # fmt: skip
    parser.add_argument(
        "--img-size", metavar="PIXELS", help="read images of this size, 384 or 384,320 (height, width); positions are "
        "resampled (the model's own)",
    )  # fmt: skip
    parser.add_argument("--frames", metavar="N", help="read clips of so many frames (the model's own number)")


def settings_of(arguments: argparse.Namespace, *, specs: tuple[str, ...] = (), ray: bool) -> Settings:
    """What a person chose of models, data and OUT. ``ray``: it will be carried out on Ray, which must have an address
    and a folder: found out now, and not when it starts. An empty text, as make passes it on, means none.
    """
    from ablations.run.session import Settings

    if ray:
        from ablations.run.ray.address import check_address
        from ablations.run.ray.folder import check_ray_folder

        check_address()
        check_ray_folder()
    return Settings(
        out=out_of(arguments),
        workload=arguments.workload or "embedded",
        data=arguments.data or None,
        train_data=arguments.train_data or None,
        model=arguments.model or None,
        img_size=arguments.img_size or None,
        frames=arguments.frames or None,
        stride=arguments.stride,
        views=arguments.views or None,
        weights=arguments.weights or None,
        specs=specs,
        limit=arguments.limit,
        batch=arguments.batch,
        strict=arguments.strict,
        download=arguments.download,
        labels=arguments.labels or None,
        links=not arguments.no_links,
        task=arguments.task or "classify",
    )
