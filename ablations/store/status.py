"""How far a run is, seen from its files alone: from another terminal, another machine, or long after it ended."""

from __future__ import annotations

import re
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import pyarrow as pa
import pyarrow.compute as pc

from ablations.records.locks import lock
from ablations.records.names import LIVE, RESULTS, RUN, TRIALS, planned_keys
from ablations.records.storage import Disk
from ablations.store.lease import BEAT, PATIENCE, holder
from ablations.store.store import Status, Store
from ablations.trial.staleness import Stale, account
from ablations.words import duration, in_words, table

_RECENT = 64  # results from whose times the pace is told
_FAILURES = 10  # shown
_IDLE = 2  # looks at which no run is at work before it is over: one may just be going on
_COLUMNS = ["spec", "planned", "finished", "failed", "waiting", "stale"]


@dataclass(frozen=True)
class State:
    """A run at one moment."""

    headline: str
    specs: list[Status]
    failures: list[tuple[str, str, str]]  # key, trial in words, reason
    running: bool | None  # some run holds the place; None: it did, and whether it lives cannot be told by one look
    live: Mapping[str, Any]  # what that run tells of itself; {} where it does not
    pace: float | None  # results a second, from the times of the latest files
    stale: list[Stale]  # every result that is, under its one reason

    @property
    def planned(self) -> int:
        return sum(each.planned for each in self.specs)

    @property
    def finished(self) -> int:
        return sum(each.finished for each in self.specs)

    @property
    def failed(self) -> int:
        return sum(each.failed for each in self.specs)

    @property
    def left(self) -> int:
        """Trials without a finished result."""
        return self.planned - self.finished

    @property
    def seconds_left(self) -> float | None:
        """As the run itself estimates, else from the pace; None where nothing tells."""
        told = self.live.get("seconds_left")
        if isinstance(told, int | float):
            return float(told)
        waiting = self.left - self.failed
        return waiting / self.pace if self.pace and waiting > 0 else None


class Signs:
    """Whether some run holds a store, from one look to the next."""

    def __init__(self, store: Store, *, patience: float = PATIENCE * BEAT) -> None:
        self._store, self._patience = store, patience
        self._last: dict[str, Any] | None = None
        self._since = 0.0  # when that was seen first

    def running(self) -> bool | None:
        """True or False where that is certain. A run that cannot lock its place shows by a file it changes that it
        lives: one look at it tells nothing, and a while without a change tells that it died.
        """
        if _is_locked(self._store):
            return True
        found, before, now = holder(self._store.storage), self._last, time.monotonic()
        if found is None:
            return False
        if found != before:
            self._last, self._since = found, now
            return None if before is None else True
        return None if now - self._since < self._patience else False


def look(store: Store, signs: Signs | None = None) -> State:
    """The state of a store now; ValueError where no run has been. ``signs`` remembers what earlier looks saw."""
    run = store.read_json(RUN)
    plan = planned_keys(run)
    if not plan:
        raise ValueError(
            f"{store.location} holds no {RUN}; give the OUT of a run, or start one with `sievit run --out OUT`"
        )
    rows = store.indexed()
    keys = {key for each in plan.values() for key in each}
    running = (signs or Signs(store)).running()
    live = None if running is False else store.read_json(LIVE)
    return State(
        headline=f"{run.get('model')} ({run.get('weights')} weights) on {run.get('images')} images of "
        f"{run.get('workload')}",
        specs=store.status(plan, rows),
        failures=_failures(rows, keys),
        running=running,
        live=live if isinstance(live, dict) else {},
        pace=pace(rows["row_modified"].to_pylist()),
        stale=account(rows, run, planned=keys),
    )


def _is_locked(store: Store) -> bool:
    if isinstance(store.storage, Disk):
        try:
            with (store.out / ".lock").open("rb") as file:
                lock(file, shared=True)
        except BlockingIOError:
            return True
        except OSError:  # no lock file, or a disk without locks
            pass
    return False


def pace(times: Sequence[int]) -> float | None:
    """Results a second, from when the latest files (nanoseconds) were written. All were dated by the storage: what the
    clock of this machine says does not matter.
    """
    latest = sorted(times)[-_RECENT:]
    if len(latest) < 2 or latest[-1] <= latest[0]:
        return None
    return (len(latest) - 1) / ((latest[-1] - latest[0]) / 1e9)


def lines(state: State) -> list[str]:
    """The state for a terminal."""
    shown = [state.headline, _progress(state)]
    rows = [[each.spec, *map(str, _numbers(each))] for each in state.specs]
    sums = [str(sum(_numbers(each)[column] for each in state.specs)) for column in range(len(_COLUMNS) - 1)]
    shown += table(_COLUMNS, [*rows, ["all", *sums]]).splitlines()
    if state.failures:
        shown += ["", f"failed ({len(state.failures)}; `sievit log KEY --out OUT` has more):"]
        shown += [f"  {key}  {words}: {reason:.160}" for key, words, reason in state.failures[:_FAILURES]]
        if len(state.failures) > _FAILURES:
            shown.append(f"  … and {len(state.failures) - _FAILURES} more")
    if state.stale:
        again = sum(each.planned for each in state.stale)
        apart = sum(each.count for each in state.stale) - again
        words = [f"{apart} in no figure"] if apart else []
        words += [f"{again} of the plan, until the next run"] if again else []
        shown += ["", f"stale: {', '.join(words)}"]
        shown += [f"  {each.count:6}  {each.reason}: {each.remedy}" for each in state.stale]
    return shown


def _numbers(each: Status) -> tuple[int, int, int, int, int]:
    return each.planned, each.finished, each.failed, each.planned - each.finished - each.failed, each.stale


def _progress(state: State) -> str:
    share = 100 * state.finished / state.planned if state.planned else 100.0
    words = [f"{state.finished} of {state.planned} trials finished ({share:.0f} %)"]
    if state.running is False:
        return f"{words[0]}; no run is at work"
    words.append("a run is at work" if state.running else "a run is at work, or died there (--watch can tell)")
    running = state.live.get("running")
    if isinstance(running, list) and running:
        words.append(f"{len(running)} running")
    retried = state.live.get("retried")
    if isinstance(retried, int) and retried:
        words.append(f"{retried} tried again")
    if state.seconds_left is not None and state.left:
        words.append(f"about {duration(state.seconds_left)} left")
    return "; ".join(words)


def watch(
    store: Store, *, every: float, sleep: Callable[[float], None] = time.sleep, times: int | None = None
) -> Iterator[list[str]]:
    """The state again and again, until no run is at work any more or ``times`` looks were taken.

    What has been read is not read again: each look costs a listing and the results that are new.
    """
    count = idle = 0
    signs = Signs(store)
    while True:
        state = look(store, signs)
        yield lines(state)
        count, idle = count + 1, idle + 1 if state.running is False else 0
        if count == times or (idle and not state.left) or idle == _IDLE:
            return
        sleep(every)


def _failures(rows: pa.Table, keys: set[str]) -> list[tuple[str, str, str]]:
    failed = rows.filter(pc.equal(rows["status"], "failed")).select(["key", "spec", "variant", "x", "error"])
    return [
        (row["key"], f"{row['spec']}: {in_words(row['variant'], row['x'])}", row["error"] or "no reason")
        for row in failed.to_pylist()
        if row["key"] in keys
    ]


# --- one trial --------------------------------------------------------------------------------------------------------


def find_key(store: Store, key: str, *, folders: Sequence[str] = (TRIALS,)) -> str:
    """The one key that begins so, of a trial that has a file in one of the folders."""
    if not re.fullmatch(r"[0-9a-f]{4,16}", key):
        raise ValueError(f"{key!r} is no key: give its 16 hexadecimal digits, or the first 4 or more")
    names = {name.partition(".")[0] for folder in folders for name in store.storage.entries(folder)}
    found = sorted(name for name in names if name.startswith(key))
    if len(found) == 1:
        return found[0]
    if not found:
        raise ValueError(f"{store.location} has no trial {key}; {RESULTS} lists every key")
    raise ValueError(f"{len(found)} trials begin with {key} ({', '.join(found[:4])}, …); give more digits")


def log_lines(store: Store, key: str) -> Sequence[str]:
    """What is known of a trial: its row in short, then its log."""
    row = store.load(key) or {}
    named = ("spec", "variant", "x", "status", "error", "placement", "budget", "batch", "seconds", "device", "created")
    lines = [f"{name:10} {row[name]}" for name in named if row.get(name) is not None]
    text = store.read_log(key)
    return [key, *lines, "", *(text.splitlines() if text else ["no log was kept"])]
