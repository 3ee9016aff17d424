"""The command line: ``python -m ablations list | validate | run | status | …``."""

from __future__ import annotations

import argparse
import logging
import signal
import sys
import time
import traceback
from collections.abc import Sequence
from contextlib import nullcontext
from typing import TYPE_CHECKING

from ablations.cli.options import make_parser
from ablations.measure.profile import Profile, profile_rows, profile_words, summary
from ablations.run.ray.address import check_address
from ablations.run.ray.folder import check_ray_folder
from ablations.streams import silence, standard_streams
from ablations.words import table

if TYPE_CHECKING:
    from ablations.run.execution import Ended
    from ablations.run.session import Session

log = logging.getLogger("ablations")

OK, FAILED, BAD_INPUT, INTERRUPTED = 0, 1, 2, 130


def main(argv: Sequence[str] | None = None) -> int:
    """Run a command; the exit status. User errors are one message on standard error, without a traceback."""
    words = list(sys.argv[1:] if argv is None else argv)
    commands = {
        "list": _list, "validate": _validate, "run": _run, "status": _status, "log": _log, "reproduce": _reproduce,
        "train": _train, "docs": _docs,
    }  # fmt: skip
    arguments = make_parser(commands).parse_args(words)
    arguments.words = words
    with standard_streams(lasting=arguments.command in (_run, _train, _reproduce)):
        return _carry_out(arguments)


def _carry_out(arguments: argparse.Namespace) -> int:
    logging.basicConfig(
        level=logging.DEBUG if arguments.verbose else logging.INFO, format="%(message)s", stream=sys.stderr
    )
    for noisy in ("PIL", "urllib3", "matplotlib", "asyncio", "filelock"):
        logging.getLogger(noisy).setLevel(logging.WARNING)
    signal.signal(signal.SIGTERM, _interrupt)
    try:
        status: int = arguments.command(arguments)
        sys.stdout.flush()  # here, and not as the interpreter ends: the reader of a pipe may have gone
        return status
    except KeyboardInterrupt:
        print("\ninterrupted; nothing that is finished is lost, and the same command goes on", file=sys.stderr)
        return INTERRUPTED
    except BrokenPipeError:  # the reader of a pipe has gone, e.g. `list | head`
        silence(sys.stdout)
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
        from ablations.catalogue.methods import REDUCER_COLUMNS, reducer_rows

        rows = reducer_rows()
        print(table(REDUCER_COLUMNS, rows))
        print(f"{len(rows)} methods; a page on each: docs/methods")
        return OK
    from ablations.run.session import Settings, preview

    plan = preview(Settings())
    rows = [[file.spec.name, str(len(plan.trials[file.spec.name])), file.spec.title] for file in plan.specs]
    print(table(["spec", "trials", "title"], [*rows, ["all", str(sum(int(row[1]) for row in rows)), ""]]))
    return OK


def _validate(arguments: argparse.Namespace) -> int:
    from ablations.cli.listing import trial_rows
    from ablations.run.session import Settings, preview

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
        from ablations.records.names import LIVE
        from ablations.run.record import write_record, write_samples
        from ablations.run.session import Settings, open_session

    if arguments.workers is not None and arguments.workers < 1:
        raise ValueError(f"--workers {arguments.workers}: at least one trial must run at a time")
    if arguments.time_limit < 0:
        raise ValueError(f"--time-limit {arguments.time_limit:g}: give seconds, or 0 for none")
    if not (arguments.serial or arguments.dry_run):
        check_address()
        check_ray_folder()
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
        labels=arguments.labels or None,
        links=not arguments.no_links,
    )
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
            write_record(session, command=["python", "-m", "ablations", *arguments.words])
            write_samples(session)
        ended = None
        if work:
            with profile.measure("imports"):
                from ablations.run.execution import execute
            ended = execute(session, work, profile, serial=arguments.serial, workers=arguments.workers,
                            time_limit=arguments.time_limit or None)  # fmt: skip
            _profile(
                session, profile, shown=arguments.profile, workers=ended.workers, trials=len(pending),
                computations=len(work), wall=time.perf_counter() - started,
            )  # fmt: skip
        kept = _collect(session) if ended is None else ended.finished
    return _say_how_it_ended(session, ended, kept)


def _profile(
    session: Session, profile: Profile, *, shown: bool, workers: int, trials: int, computations: int, wall: float
) -> None:
    """Keep where the time went, and show it if asked to."""
    found = summary(profile, wall=wall, workers=workers, trials=trials, computations=computations)
    session.store.write_json("profile.json", found)
    if shown:
        print(table(["where the time went", "seconds", "share"], profile_rows(found)))
        print(profile_words(found))


def _status(arguments: argparse.Namespace) -> int:
    from ablations.store.status import lines, look, watch
    from ablations.store.store import Store

    store = Store(arguments.out)
    if arguments.watch is None:
        print("\n".join(lines(look(store))))
        return OK
    if arguments.watch < 1:
        raise ValueError(f"--watch {arguments.watch:g}: looking costs the storage something; give 1 second or more")
    clear = "\x1b[2J\x1b[H" if sys.stdout.isatty() else ""
    for shown in watch(store, every=arguments.watch):
        print(clear + "\n".join(shown), flush=True)
    return OK


def _log(arguments: argparse.Namespace) -> int:
    from ablations.store.status import find_key, log_lines
    from ablations.store.store import Store

    store = Store(arguments.out)
    print("\n".join(log_lines(store, find_key(store, arguments.key, folders=("trials", "logs")))))
    return OK


def _reproduce(arguments: argparse.Namespace) -> int:
    from ablations.run.reproduce import report, reproduce
    from ablations.store.store import Store

    found = reproduce(
        Store(arguments.out), arguments.key, data=arguments.data or None, train_data=arguments.train_data or None,
        weights=arguments.weights or None, labels=arguments.labels or None, scratch=arguments.scratch,
    )  # fmt: skip
    print("\n".join(report(found)))
    return OK if found.same else FAILED


def _train(arguments: argparse.Namespace) -> int:
    from ablations.measure.context import use_exact_float32
    from ablations.run import train
    from ablations.trial.recipe import parse_settings
    from ablations.workloads import Reading, default_models

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
        reading=Reading(arguments.labels or None, not arguments.no_links),
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
    from ablations.catalogue import docs

    if arguments.check:
        old = docs.stale()
        print("\n".join([f"stale: {name}" for name in old] or ["all pages are current"]))
        return FAILED if old else OK
    changed = docs.write()
    print(f"{docs.FOLDER}: {len(changed)} pages changed" + "".join(f"\n  {name}" for name in changed))
    return OK


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


if __name__ == "__main__":
    sys.exit(main())
