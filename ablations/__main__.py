"""The command line: ``python -m ablations list | validate | run | status | train | docs``."""

from __future__ import annotations

import argparse
import logging
import os
import signal
import sys
import time
import traceback
from collections.abc import Sequence
from typing import TYPE_CHECKING

from ablations.listing import REDUCER_COLUMNS, reducer_rows, table, trial_rows
from ablations.options import make_parser
from ablations.profile import Profile, profile_rows, profile_words, summary

if TYPE_CHECKING:
    from ablations.jobs import Computation
    from ablations.session import Session
    from ablations.trial import Trial

log = logging.getLogger("ablations")

OK, FAILED, BAD_INPUT, INTERRUPTED = 0, 1, 2, 130


def main(argv: Sequence[str] | None = None) -> int:
    """Run a command; the exit status. User errors are one message on standard error, without a traceback."""
    words = list(sys.argv[1:] if argv is None else argv)
    commands = {"list": _list, "validate": _validate, "run": _run, "status": _status, "train": _train, "docs": _docs}
    arguments = make_parser(commands).parse_args(words)
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
        print("\ninterrupted; nothing that is finished is lost, and the same command goes on", file=sys.stderr)
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


# --- commands ---------------------------------------------------------------------------------------------------------


def _list(arguments: argparse.Namespace) -> int:
    if arguments.reducers:
        rows = reducer_rows()
        print(table(REDUCER_COLUMNS, rows))
        print(f"{len(rows)} methods; a page on each: docs/methods")
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
    profile, started = Profile(), time.perf_counter()
    with profile.measure("imports"):
        from ablations.record import write_record, write_samples
        from ablations.session import Settings, open_session

    if arguments.workers is not None and arguments.workers < 1:
        raise ValueError(f"--workers {arguments.workers}: at least one trial must run at a time")
    settings = Settings(
        out=arguments.out,
        workload=arguments.workload,
        data=arguments.data or None,  # `--data ""`, as make passes it on, means none
        train_data=arguments.train_data or None,
        model=arguments.model or None,
        weights=arguments.weights or None,
        specs=tuple(" ".join(arguments.specs).split()),  # one argument or several
        limit=arguments.limit,
        batch=arguments.batch,
        strict=arguments.strict,
        download=arguments.download,
    )
    with profile.measure("opening"):
        session = open_session(settings)
        pending = session.pending()
        work = session.computations(pending)
    _announce(session, len(pending), len(work))
    if arguments.dry_run:
        return OK
    with session.store.lock():
        with profile.measure("records"):
            write_record(session, command=["python", "-m", "ablations", *arguments.words])
            write_samples(session)
        status, workers = OK, 1
        if work:
            status, workers = _execute(session, work, profile, serial=arguments.serial, workers=arguments.workers)
        with profile.measure("records"):
            kept = _compact(session)
        if work:
            _profile(
                session, profile, shown=arguments.profile, workers=workers, trials=len(pending), computations=len(work),
                wall=time.perf_counter() - started,
            )  # fmt: skip
    if status != INTERRUPTED:
        done = f"{session.store.results}: {kept} of the {len(session.all_trials)} trials asked for are finished"
        print(done + ("" if work else "; nothing was left to compute"))
    return status


def _profile(
    session: Session, profile: Profile, *, shown: bool, workers: int, trials: int, computations: int, wall: float
) -> None:
    """Keep where the time went, and show it if asked to."""
    from ablations.store import write_json

    found = summary(profile, wall=wall, workers=workers, trials=trials, computations=computations)
    write_json(session.store.out / "profile.json", found)
    if shown:
        print(table(["where the time went", "seconds", "share"], profile_rows(found)))
        print(profile_words(found))


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


def _train(arguments: argparse.Namespace) -> int:
    from ablations import train
    from ablations.finetune.recipe import parse_settings
    from ablations.inputs import use_exact_float32
    from ablations.workloads import default_models

    known = train.trainable()
    if not arguments.methods:
        print("\n".join(["methods that can be trained:", *(f"  {name}" for name in known)]))
        return OK
    model = arguments.model or default_models(arguments.workload)[0]
    depth = train.depth_of(model)
    settings = None if arguments.settings is None else train.parse_method_settings(arguments.settings)
    asked = [
        one
        for method in (known if arguments.methods == ["all"] else arguments.methods)
        for one in train.asked_for(
            method, depth=depth, where=arguments.at, settings=settings, recipe=parse_settings(arguments.set)
        )
    ]
    use_exact_float32()
    context = train.open_context(
        arguments.workload, cache=arguments.out / "cache", model=model, data=arguments.data or None,
        train_data=arguments.train_data or None, weights=arguments.weights or None, limit=arguments.limit,
    )  # fmt: skip
    print(train.headline(context))
    compared = []
    for one in asked:
        compared.append(train.train(one, context))
        log.info("%s: %s; in %s", one.variant, compared[-1].verdict, train.save(compared[-1], context, arguments.out))
    print(table(train.COLUMNS, [train.line(one) for one in compared]))
    print(train.closing(compared))
    return OK


def _docs(arguments: argparse.Namespace) -> int:
    from ablations import docs

    if arguments.check:
        old = docs.stale()
        print("\n".join([f"stale: {name}" for name in old] or ["all pages are current"]))
        return FAILED if old else OK
    changed = docs.write()
    print(f"{docs.FOLDER}: {len(changed)} pages changed" + "".join(f"\n  {name}" for name in changed))
    return OK


def _execute(
    session: Session, work: list[Computation], profile: Profile, *, serial: bool, workers: int | None
) -> tuple[int, int]:
    """Evaluate, then time what is to be timed; whatever happens, what is finished is kept and compacted.

    The exit status, and how many workers computed side by side.
    """
    from ablations.context import Contexts, choose_device, make_context, save_context
    from ablations.progress import RunProgress, duration
    from ablations.serial import run_timed, timed_trials

    timed = timed_trials(work)
    progress = RunProgress(work, timed=timed)
    contexts = Contexts(lambda model: make_context(session, choose_device(), model=model, profile=profile))
    left = _not_evaluated(session, work, timed)
    try:
        for model in dict.fromkeys(computation.trial.model for computation in work):
            contexts[model]  # the plain model's predictions come first
        with progress:
            if serial:
                from ablations.jobs import schedule
                from ablations.serial import run_serial

                run_serial(schedule(left, workers=1), contexts=contexts, store=session.store, progress=progress)
            elif left:
                with profile.measure("imports"):
                    from ablations.runner import run_on_ray

                run_on_ray(
                    left,
                    contexts={model: save_context(session, context) for model, context in contexts.items()},
                    facts=session.all_facts,
                    store=session.store,
                    progress=progress,
                    profile=profile,
                    workers=workers,
                )
            run_timed(timed, contexts=contexts, store=session.store, progress=progress)
    except KeyboardInterrupt:
        signal.signal(signal.SIGINT, signal.SIG_IGN)  # a second Ctrl-C must not cut the summary short
        kept = _compact(session)
        print(
            f"\ninterrupted: {kept} of {len(session.all_trials)} trials are finished and kept in {session.store.out}; "
            "the same command goes on from there",
            file=sys.stderr,
        )
        return INTERRUPTED, progress.at_once
    log.info("%d trials in %s", progress.finished, duration(progress.elapsed))
    return _summarise_failures(progress.failures, missing=progress.total - progress.finished), progress.at_once


def _not_evaluated(session: Session, work: list[Computation], timed: list[Trial]) -> list[Computation]:
    """What is left to evaluate: the results of some trials may only wait to be timed."""
    waiting = session.store.untimed.finished() if timed else set()
    return [one for one in work if not all(trial.measure and trial.key in waiting for trial in one.answers)]


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
    others = [name for name in session.subjects if name != facts.name]
    if others:
        print(f"  (with {', '.join(others)} as well, for specs that say `models: all`)")
    print(f"{pending} to compute{shared}" if pending else "all of them are finished: nothing to compute")
    sys.stdout.flush()


if __name__ == "__main__":
    sys.exit(main())
