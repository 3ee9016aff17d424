"""``sievit recommend``: which token reduction a model should use, at a cost or at a speed."""

from __future__ import annotations

import argparse
import re
import sys
import time
from typing import TYPE_CHECKING, Any

from ablations.cli.options import FAILED, OK, Command, add_data_options, add_model_options, add_out, out_of, settings_of
from ablations.words import table

if TYPE_CHECKING:
    from ablations.run.recommend.begin import Ended
    from ablations.run.recommend.call import Goal

_EPILOG = """\
examples:
  sievit recommend --cost 0.5                       the embedded workload, minutes on two cores
  sievit recommend --cost "0.5 0.7" --workload imagefolder --data IMAGES --model deit_small_patch16_224
  sievit recommend --speed 1.5 --workload imagefolder --data IMAGES     half as fast again, on this machine
  sievit recommend --cost 0.6 --task embed --data IMAGES --workload imagefolder --model MODEL
                                                    without labels: how near features stay to the dense model's
  sievit recommend --cost 0.5 --trained results/embedded/train/dynamicvit     trained weights are tried as well
  RAY_ADDRESS=HOST:6379 sievit recommend --cost 0.5 on an existing Ray cluster

Searches over methods, blocks, schedules, settings and pairs of methods, each brought to the cost that is asked; then
tests the best against the best single published method on images that the search never saw. The answer may be that
nothing found is shown to be better.

written below OUT:
  recommended/0.50.yaml   what to use: reducers.load(FILE) in Python, --specs FILE in a run
  recommend.html          the verdict, the front that was found, kept patches, how to use it
  recommend/              every candidate as an ordinary trial: `sievit status --out OUT/recommend`

A search may be stopped at any time; the same command goes on where it stopped.
exit status: 0 all is well, 1 the page could not be drawn, 2 bad input, 130 interrupted
"""


def _add_options(parser: argparse.ArgumentParser) -> None:
    add_out(parser)
    parser.add_argument(
        "--cost",
        nargs="+",
        default=[],
        metavar="SHARE",
        help="shares of the dense model's multiply-adds: 0.5, or several",
    )
    parser.add_argument(
        "--speed", nargs="+", default=[], metavar="TIMES", help="times as fast as the dense model, on this machine: 1.5"
    )
    add_model_options(parser)
    parser.add_argument("--task", default="classify", help="what is asked of the model: classify, or embed (no labels)")
    add_data_options(parser)
    parser.add_argument(
        "--trained", dest="folders", nargs="+", default=[], metavar="FOLDER",
        help="trainings whose weights are tried as well: folders that `sievit train` (OUT/train/METHOD) or `python -m "
        "ablations.measure.finetune` (its OUT) wrote",
    )  # fmt: skip
    parser.add_argument(
        "--host", nargs="+", default=[], metavar="NAME=VALUE",
        help="how the model is driven, where it lets one choose: fill=zero (docs/models.md)",
    )  # fmt: skip
    parser.add_argument("--candidates", type=int, default=96, metavar="N", help="placements to try for each cost (96)")
    parser.add_argument("--seed", type=int, default=0, metavar="N", help="of the search: one seed, one search (0)")
    parser.add_argument("--batch", type=int, metavar="N", help="images in a batch (by image size)")
    parser.add_argument("--strict", action="store_true", help="refuse images that cannot be used, instead of skipping")
    parser.add_argument("--download", action="store_true", help="let torchvision and timm fetch a data set into --data")
    parser.add_argument("--workers", type=int, metavar="N", help="candidates at once (one a core, or four a GPU)")
    parser.add_argument("--serial", action="store_true", help="run in this process, one after the other, without Ray")
    parser.add_argument("--profile", action="store_true", help="show where the time went")


def _recommend(arguments: argparse.Namespace) -> int:
    goals = goals_of(arguments.cost, arguments.speed)
    if arguments.candidates < 1 or not 0 <= arguments.seed < 2**31:
        raise ValueError("--candidates is 1 or more, --seed a whole number from 0 on")
    if arguments.workers is not None and arguments.workers < 1:
        raise ValueError(f"--workers {arguments.workers}: at least one candidate must be tried at a time")
    host = options_of(arguments.host)
    from ablations.records.storage import is_uri
    from ablations.run.given import folders_of
    from ablations.run.recommend.begin import begin

    settings = settings_of(arguments, ray=not arguments.serial)
    started = time.perf_counter()
    ended = begin(
        settings, goals, candidates=arguments.candidates, seed=arguments.seed, serial=arguments.serial,
        workers=arguments.workers, command=["sievit", *arguments.words], trained=folders_of(arguments.folders),
        host=host,
    )  # fmt: skip
    away = is_uri(out_of(arguments))
    for told, name in zip(ended.told, ended.files, strict=True):
        print()
        print(finalists_table(told))
        print()
        for sentence in told["sentences"]:
            print(sentence)
        print(
            f"written to {name}; "
            + ("copy it here for reducers.load" if away else f"in Python: reducers.load({name!r})")
        )
    if arguments.profile:
        print()
        print(_where_the_time_went(ended, time.perf_counter() - started))
    sys.stdout.flush()
    from ablations.cli.report import draw_recommendation

    return OK if draw_recommendation(out_of(arguments)) == OK else FAILED


def _where_the_time_went(ended: Ended, wall: float) -> str:
    from ablations.measure.profile import profile_rows, profile_words, summary

    tried = sum(told["candidates"] for told in ended.told)
    found = summary(ended.profile, wall=wall, workers=ended.workers, trials=tried, computations=tried)
    rows = table(["where the time went", "seconds", "share"], profile_rows(found))
    return f"{rows}\n{profile_words(found)}"


_NUMBER = re.compile(r"\d{1,3}(?:\.\d{1,4})?")


def goals_of(costs: list[str], speeds: list[str]) -> tuple[Goal, ...]:
    """The goals as they were written, each once.

    Raises:
        ValueError: none, one that is no number, or one that makes no sense.
    """
    from ablations.run.recommend.call import Goal

    goals: dict[str, Goal] = {}
    for what, texts in (("cost", costs), ("speed", speeds)):
        for text in " ".join(texts).split():
            if not _NUMBER.fullmatch(text):
                raise ValueError(f"--{what} {text!r} is no number such as {'0.5' if what == 'cost' else '1.5'}")
            number = float(text)
            if what == "cost" and not 0 < number < 1:
                raise ValueError(
                    f"--cost {text}: a share of the dense model's multiply-adds, above 0 and below 1 (0.5 is half)"
                )
            if what == "speed" and not 1 < number <= 20:
                raise ValueError(
                    f"--speed {text}: times as fast as the dense model, above 1, at most 20 (1.5: half as fast again)"
                )
            goal = Goal(share=number) if what == "cost" else Goal(speed=number)
            goals.setdefault(goal.name, goal)
    if not goals:
        raise ValueError("what may it cost? Give --cost 0.5 (a share of the dense model's cost), or --speed 1.5")
    return tuple(goals.values())


def options_of(words: list[str]) -> dict[str, str]:
    """``fill=zero spread=nearest`` as options of a model's host.

    Raises:
        ValueError: a word is none.
    """
    found = {}
    for word in " ".join(words).split():
        name, equals, value = word.partition("=")
        if not (name and equals and value):
            raise ValueError(f"--host {word!r} is no option such as fill=zero")
        found[name] = value
    return found


def finalists_table(told: dict[str, Any]) -> str:
    """Finalists and single methods on the confirmation images."""
    rows = []
    for kind, entries in (("found", told["finalists"]), ("single", [told["comparator"]]), ("single", told["others"])):
        for one in entries:
            difference = one.get("difference")
            rows.append(
                [
                    "control" if one["control"] else kind,
                    one["label"],
                    f"{100 * one['share']:.1f}",
                    f"{100 * one['search']:.1f}",
                    f"{100 * one['value']:.1f} [{100 * one['low']:.1f}, {100 * one['high']:.1f}]",
                    "" if difference is None else f"{100 * difference['mean']:+.1f} (p = {difference['adjusted']:.2g})",
                ]
            )
    return table(["", "placement", "cost (%)", "search (%)", "confirmed (%)", "against the best single"], rows)


COMMAND = Command(
    summary="which token reduction a model should use, at a cost or a speed",
    description="Search for the placement that loses least, and confirm it on images the search never saw.",
    epilog=_EPILOG,
    add_options=_add_options,
    carry_out=_recommend,
    lasting=True,
)
