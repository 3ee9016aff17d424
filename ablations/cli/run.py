"""``sievit run``: what is not finished yet."""

from __future__ import annotations

import argparse
import sys
import time
from collections.abc import Sequence
from contextlib import nullcontext
from typing import TYPE_CHECKING

from ablations.cli.options import (
    FAILED,
    INTERRUPTED,
    OK,
    Command,
    add_data_options,
    add_model_options,
    add_out,
    settings_of,
)
from ablations.records.names import PROFILE
from ablations.words import table

if TYPE_CHECKING:
    from ablations.measure.profile import Profile
    from ablations.run.execution import Ended
    from ablations.run.session import Session, Settings

_EPILOG = """\
examples:
  sievit run                         all specs on the embedded workload, into results/
  sievit run --specs k_values class_token --limit 200 --out out/quick
  sievit run --workload imagefolder --data IMAGES --model deit_small_patch16_224 --out out/imagenet
  sievit run --task embed --workload imagefolder --data PICTURES --model vit_small_patch14_dinov2
                                     pictures without classes, a model without a classifier
  sievit run --specs finetuning      a spec that runs only where it is named (`sievit list` marks them)
  sievit run --specs model_scaling --workload imagefolder --data IMAGES \\
      --model "deit_tiny_patch16_224 deit_small_patch16_224"   several models, for specs that compare them
  sievit run --serial --specs k_values     in this process: the way to debug a trial
  sievit run --profile               and where the time went
  RAY_ADDRESS=HOST:6379 sievit run   on an existing Ray cluster (--out on a disk that all nodes share, or
                                     s3://BUCKET/FOLDER)

A run may be stopped at any time; the same command goes on where it stopped, and computes nothing twice. From another
terminal, `sievit status --out OUT --watch` follows it; `sievit report --out OUT` draws what there is.
exit status: 0 all is well, 1 some trials failed (run again to repeat them), 2 bad input, 130 interrupted
"""


def _add_options(parser: argparse.ArgumentParser) -> None:
    add_out(parser)
    parser.add_argument("--specs", nargs="+", default=[], metavar="SPEC", help="names of specs or .yaml files (all)")
    add_model_options(parser)
    add_data_options(parser)
    parser.add_argument(
        "--task", default="classify", metavar="TASK",
        help="what is asked of the model: classify (accuracy against labels), embed (cosine of its pooled features "
        "with the dense model's, which needs neither labels nor a classifier) or dense (patches against masks, which "
        "the embedded workloads have) (classify)",
    )  # fmt: skip
    parser.add_argument("--batch", type=int, metavar="N", help="images in a batch (by image size)")
    parser.add_argument("--strict", action="store_true", help="refuse images that cannot be used, instead of skipping")
    parser.add_argument("--download", action="store_true", help="let torchvision and timm fetch a data set into --data")
    parser.add_argument("--workers", type=int, metavar="N", help="trials at once (one a core, or four a GPU)")
    parser.add_argument(
        "--time-limit", type=float, default=3600.0, metavar="SECONDS",
        help="a trial that makes no progress for that long is ended and tried again (3600; 0: never)",
    )  # fmt: skip
    parser.add_argument("--serial", action="store_true", help="run in this process, one after the other, without Ray")
    parser.add_argument("--profile", action="store_true", help="show where the time went (always in OUT/profile.json)")
    parser.add_argument("--dry-run", action="store_true", help="open everything, show the plan and stop")


def _run(arguments: argparse.Namespace) -> int:
    from ablations.measure.profile import Profile

    profile, started = Profile(), time.perf_counter()
    with profile.measure("imports"):
        from ablations.records.names import LIVE
        from ablations.run.record import write_record, write_samples
        from ablations.run.session import open_session

    settings = _settings(arguments)
    with profile.measure("opening"):
        session = open_session(settings)
    with nullcontext() if arguments.dry_run else session.store.lock():
        with profile.measure("opening"):
            pending = session.pending()
            work = session.computations(pending)
        _announce(session, len(pending), len(work))
        if arguments.dry_run:
            return OK
        session.store.delete(LIVE)  # what an earlier run told of itself
        session.store.forget_spoilt()
        with profile.measure("records"):
            write_record(session, command=["sievit", *arguments.words])
            write_samples(session)
        ended = None
        if work:
            with profile.measure("imports"):
                from ablations.run.execution import execute
            ended = execute(session, work, profile, serial=arguments.serial, workers=arguments.workers,
                            time_limit=arguments.time_limit or None)  # fmt: skip
            _keep_profile(
                session, profile, shown=arguments.profile, workers=ended.workers, trials=len(pending),
                computations=len(work), wall=time.perf_counter() - started,
            )  # fmt: skip
        kept = _collect(session) if ended is None else ended.finished
    return _say_how_it_ended(session, ended, kept)


def _settings(arguments: argparse.Namespace) -> Settings:
    """What a person chose, checked as far as it can be before anything is opened."""
    if arguments.workers is not None and arguments.workers < 1:
        raise ValueError(f"--workers {arguments.workers}: at least one trial must run at a time")
    if arguments.time_limit < 0:
        raise ValueError(f"--time-limit {arguments.time_limit:g}: give seconds, or 0 for none")
    specs = tuple(" ".join(arguments.specs).split())  # one argument or several
    return settings_of(arguments, specs=specs, ray=not (arguments.serial or arguments.dry_run))


def _keep_profile(
    session: Session, profile: Profile, *, shown: bool, workers: int, trials: int, computations: int, wall: float
) -> None:
    """Keep where the time went, and show it if asked to."""
    from ablations.measure.profile import profile_rows, profile_words, summary

    found = summary(profile, wall=wall, workers=workers, trials=trials, computations=computations)
    session.store.write_json(PROFILE, found)
    if shown:
        print(table(["where the time went", "seconds", "share"], profile_rows(found)))
        print(profile_words(found))


def _collect(session: Session) -> int:
    from ablations.run.execution import compact

    return compact(session)


def _say_how_it_ended(session: Session, ended: Ended | None, kept: int) -> int:
    """Tell the person; the exit status."""
    store, asked = session.store, len(session.all_trials)
    if ended is not None and ended.interrupted:
        print(
            f"\ninterrupted: {kept} of {asked} trials are finished and kept in {store.location}; "
            "the same command goes on from there",
            file=sys.stderr,
        )
        return INTERRUPTED
    status = OK if ended is None else _summarise_failures(ended.failures, missing=ended.missing)
    done = f"{store.results}: {kept} of the {asked} trials asked for are finished"
    print(done + ("" if ended else "; nothing was left to compute"))
    return status


def _summarise_failures(failures: Sequence[tuple[str, str]], *, missing: int) -> int:
    if not failures and not missing:
        return OK
    print(f"\n{len(failures) + missing} trials failed; the others are kept, and the same command repeats these:",
          file=sys.stderr)  # fmt: skip
    for name, reason in failures[:20]:
        print(f"  {name}\n    {reason}", file=sys.stderr)
    if len(failures) > 20:
        print(f"  ... and {len(failures) - 20} more (results.parquet has all)", file=sys.stderr)
    if missing:
        print(f"  {missing} trials were given up without a reason; `--serial` may show more", file=sys.stderr)
    return FAILED


# --- words ------------------------------------------------------------------------------------------------------------


def _announce(session: Session, pending: int, computations: int) -> None:
    facts, target = session.facts, session.target
    print(
        f"{facts.name} ({facts.weights} weights) on {target.images} images of {target.workload}: "
        f"{len(session.all_trials)} trials in {len(session.trials)} specs"
    )
    for name, trials in session.trials.items():
        print(f"  {name}: {len(trials)}")
    shared = f" ({computations} computations; the others ask the same)" if computations < pending else ""
    others = [name for name in session.subjects if name != facts.name]
    if others:
        print(f"  (with {', '.join(others)} as well, for specs that say `models: all`)")
    print(f"{pending} to compute{shared}" if pending else "all of them are finished: nothing to compute")
    sys.stdout.flush()


COMMAND = Command(
    summary="run what is not finished yet",
    description="Compute the trials of specs that have no result in OUT yet, and keep each as it ends.",
    epilog=_EPILOG,
    add_options=_add_options,
    carry_out=_run,
    lasting=True,
)
