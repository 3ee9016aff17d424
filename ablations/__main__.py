"""The command line: ``python -m ablations list | validate | run | status``."""

from __future__ import annotations

import argparse
import logging
import os
import signal
import sys
import traceback
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from ablations.listing import reducer_rows, table, trial_rows

if TYPE_CHECKING:
    from ablations.plan import Job
    from ablations.session import Session

log = logging.getLogger("ablations")

OK, FAILED, BAD_INPUT, INTERRUPTED = 0, 1, 2, 130

_EPILOG = """\
examples:
  python -m ablations list                        the specs and how many trials each has
  python -m ablations list --reducers             every reducer with its settings
  python -m ablations validate my_question.yaml   check a spec; nothing is run
  python -m ablations run                         all specs on the embedded workload, into results/
  python -m ablations run --specs "k_values class_token" --limit 200 --out out/quick
  python -m ablations run --workload imagefolder --data IMAGES --model deit_small_patch16_224 --out out/imagenet
  python -m ablations run --serial --specs k_values     in this process: the way to debug a trial
  python -m ablations status results              how far a run is
  RAY_ADDRESS=HOST:6379 python -m ablations run   on an existing Ray cluster (OUT on a disk that all nodes share)

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


def main(argv: Sequence[str] | None = None) -> int:
    """Run a command; the exit status. User errors are one message on standard error, without a traceback."""
    words = list(sys.argv[1:] if argv is None else argv)
    arguments = _parser().parse_args(words)
    arguments.words = words
    logging.basicConfig(
        level=logging.DEBUG if arguments.verbose else logging.INFO, format="%(message)s", stream=sys.stderr
    )
    for noisy in ("PIL", "urllib3", "matplotlib", "asyncio", "filelock"):
        logging.getLogger(noisy).setLevel(logging.WARNING)
    signal.signal(signal.SIGTERM, _interrupt)
    try:
        status: int = arguments.command(arguments)
        return status
    except KeyboardInterrupt:
        print("\ninterrupted before any trial began; nothing is lost", file=sys.stderr)
        return INTERRUPTED
    except BrokenPipeError:  # the reader of a pipe has gone, e.g. `list | head`
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return OK
    except (ValueError, OSError) as error:
        if arguments.verbose:
            traceback.print_exc()
        print(f"error: {error}", file=sys.stderr)
        return BAD_INPUT


def _interrupt(number: int, frame: object) -> None:
    raise KeyboardInterrupt


def _parser() -> argparse.ArgumentParser:
    raw = argparse.RawDescriptionHelpFormatter
    parser = argparse.ArgumentParser(
        prog="python -m ablations",
        formatter_class=raw,
        epilog=_EPILOG,
        description="Comparative ablations of token reduction in vision transformers: plan, run, look.",
    )
    parser.add_argument("-v", "--verbose", action="store_true", help="say more, and show tracebacks of errors")
    commands = parser.add_subparsers(required=True, metavar="COMMAND")

    listing = commands.add_parser("list", help="the specs, or the reducers", formatter_class=raw, epilog=_SPEC_HELP)
    listing.add_argument("--reducers", action="store_true", help="list the reducers and their settings instead")
    listing.set_defaults(command=_list)

    checking = commands.add_parser(
        "validate", help="check specs and show the plan; runs nothing", formatter_class=raw, epilog=_SPEC_HELP
    )
    checking.add_argument("specs", nargs="*", metavar="SPEC", help="name of a shipped spec, or a .yaml file (all)")
    _model_options(checking)
    checking.set_defaults(command=_validate)

    running = commands.add_parser("run", help="run what is not finished yet", formatter_class=raw, epilog=_EPILOG)
    running.add_argument("--out", type=Path, default=Path("results"), help="folder of the results (results)")
    running.add_argument("--specs", default="", metavar='"A B"', help="names of specs or .yaml files (all)")
    _model_options(running)
    running.add_argument("--data", help="folder of the images, for workloads that read one")
    running.add_argument("--weights", help="a .safetensors file, or 'random' (default: the model's own)")
    running.add_argument("--limit", type=int, metavar="N", help="evaluate at most N images")
    running.add_argument("--batch", type=int, metavar="N", help="images in a batch (by image size)")
    running.add_argument("--strict", action="store_true", help="refuse images that cannot be read, instead of skipping")
    running.add_argument(
        "--download", action="store_true", help="let torchvision and timm fetch a data set into --data"
    )
    running.add_argument("--workers", type=int, metavar="N", help="trials at once (one a core, or four a GPU)")
    running.add_argument("--serial", action="store_true", help="run in this process, one after the other, without Ray")
    running.add_argument("--dry-run", action="store_true", help="open everything, show the plan and stop")
    running.set_defaults(command=_run)

    state = commands.add_parser("status", help="how far each spec of a run is")
    state.add_argument("out", type=Path, metavar="OUT", help="folder of the results")
    state.set_defaults(command=_status)
    return parser


def _model_options(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--workload", default="embedded", help="embedded, imagefolder, timm:…, torchvision:… or hub:… (embedded)"
    )
    parser.add_argument("--model", help="timm name of the model (digits_vit_small, else deit_tiny_patch16_224)")


# --- commands ---------------------------------------------------------------------------------------------------------


def _list(arguments: argparse.Namespace) -> int:
    if arguments.reducers:
        print(table(["name", "settings", "adaptive", "what it does", "source"], reducer_rows()))
        return OK
    from ablations.session import Settings, preview

    plan = preview(Settings())
    rows = [[file.spec.name, str(len(plan.trials[file.spec.name])), file.spec.title] for file in plan.specs]
    print(table(["spec", "trials", "title"], [*rows, ["all", str(sum(int(row[1]) for row in rows)), ""]]))
    return OK


def _validate(arguments: argparse.Namespace) -> int:
    from ablations.session import Settings, preview

    settings = Settings(workload=arguments.workload, model=arguments.model or None, specs=tuple(arguments.specs))
    plan = preview(settings)
    for file in plan.specs:
        trials = plan.trials[file.spec.name]
        print(f"{file.spec.name}: {file.spec.title} ({len(trials)} trials)")
        rows = trial_rows(trials, plan.facts.patches)
        print(table(["variant", "x", "placement", "budget", "seed"], rows, indent="  "))
    print(f"valid for {settings.model_name}; nothing was run")
    return OK


def _run(arguments: argparse.Namespace) -> int:
    from ablations.record import write_record, write_samples
    from ablations.session import Settings, open_session

    if arguments.workers is not None and arguments.workers < 1:
        raise ValueError(f"--workers {arguments.workers}: at least one trial must run at a time")
    settings = Settings(
        out=arguments.out,
        workload=arguments.workload,
        data=arguments.data or None,  # `--data ""`, as make passes it on, means none
        model=arguments.model or None,
        weights=arguments.weights or None,
        specs=tuple(arguments.specs.split()),
        limit=arguments.limit,
        batch=arguments.batch,
        strict=arguments.strict,
        download=arguments.download,
    )
    session = open_session(settings)
    pending = session.pending()
    jobs = session.jobs(pending)
    _announce(session, len(pending), len(jobs))
    if arguments.dry_run:
        return OK
    with session.store.lock():
        write_record(session, command=["python", "-m", "ablations", *arguments.words])
        write_samples(session)
        status = OK
        if jobs:
            status = _execute(session, jobs, serial=arguments.serial, workers=arguments.workers)
        kept = _compact(session)
    if status != INTERRUPTED:
        done = f"{session.store.results}: {kept} of the {len(session.all_trials)} trials asked for are finished"
        print(done + ("" if jobs else "; nothing was left to compute"))
    return status


def _status(arguments: argparse.Namespace) -> int:
    from ablations.record import planned_keys
    from ablations.store import Store, read_json

    run = read_json(arguments.out / "run.json")
    if not planned_keys(run):
        raise ValueError(f"{arguments.out} holds no run.json; give the OUT of a run, or start one with `run --out`")
    states = Store(arguments.out).status(planned_keys(run))
    print(f"{run.get('model')} ({run.get('weights')} weights) on {run.get('images')} images of {run.get('workload')}")
    rows = [[s.spec, *(str(n) for n in (s.planned, s.finished, s.failed, s.stale))] for s in states]
    sums = [str(sum(int(row[column]) for row in rows)) for column in range(1, 5)]
    print(table(["spec", "planned", "finished", "failed", "stale"], [*rows, ["all", *sums]]))
    return OK


def _execute(session: Session, jobs: list[Job], *, serial: bool, workers: int | None) -> int:
    """Run the jobs; whatever happens, what is finished is kept and compacted."""
    from ablations.context import choose_device, make_context, save_context
    from ablations.progress import RunProgress, duration

    progress = RunProgress(jobs)
    try:
        context = make_context(session, choose_device())
        log.info("the plain model: top-1 %.1f %% at %.3f GMACs", 100 * context.dense.top1, context.dense.gmacs)
        with progress:
            if serial:
                from ablations.serial import run_serial

                run_serial(jobs, context=context, store=session.store, progress=progress)
            else:
                from ablations.runner import run_on_ray

                run_on_ray(
                    jobs,
                    context=save_context(session, context),
                    facts=session.facts,
                    store=session.store,
                    progress=progress,
                    workers=workers,
                )
    except KeyboardInterrupt:
        signal.signal(signal.SIGINT, signal.SIG_IGN)  # a second Ctrl-C must not cut the summary short
        kept = _compact(session)
        print(
            f"\ninterrupted: {kept} of {len(session.all_trials)} trials are finished and kept in {session.store.out}; "
            "the same command goes on from there",
            file=sys.stderr,
        )
        return INTERRUPTED
    log.info("%d trials in %s", progress.finished, duration(progress.elapsed))
    return _summarise_failures(progress.failures, missing=progress.total - progress.finished)


def _compact(session: Session) -> int:
    """Collect the planned trials on disk; how many of this run's are finished."""
    from ablations.record import keys_in_plan

    keys = [key for keys in keys_in_plan(session.store).values() for key in keys]
    session.store.compact(keys)
    return len(session.store.finished() & {trial.key for trial in session.all_trials})


def _summarise_failures(failures: list[tuple[str, str]], *, missing: int) -> int:
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
    print(f"{pending} to compute{shared}" if pending else "all of them are finished: nothing to compute")
    sys.stdout.flush()


if __name__ == "__main__":
    sys.exit(main())
