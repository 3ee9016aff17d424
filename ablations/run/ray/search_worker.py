"""What a worker process of Ray does for a search: it opens the images once, then looks at one candidate after another,
each rung by rung until the driver stops it.
"""

from __future__ import annotations

import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from ray import tune

from ablations.measure.opening import choose_device
from ablations.measure.profile import Profile
from ablations.records.storage import StoreError
from ablations.run.contexts import load_context
from ablations.run.ray.watchdog import Watch
from ablations.run.ray.worker import NodeError, check_node, locate_of, watched
from ablations.run.recommend.pieces import Pieces, Proposal, TrialFailed
from ablations.run.recommend.serial import settled
from ablations.search.parts import part
from ablations.store.store import Store
from ablations.trial.stages import HostOptions, Stages, Training


def try_candidate(config: Mapping[str, Any], run: Mapping[str, Any], rungs: int) -> None:
    """One Tune trial: one candidate, from its first rung that is not known yet. Tune calls this in a new thread."""
    torch.set_num_threads(1)  # a setting of the thread
    clock = _Clock()
    try:
        worker = _opened(run)
        with worker.watch.over(watched(worker.store.cache, run["id"], int(config["number"]))):
            _try(config, worker, rungs, clock)
    except (StoreError, NodeError) as error:
        tune.report({"fatal": str(error), "mean": 0.0})


class _Clock:
    """Seconds since it was last asked: what a report was worked for."""

    def __init__(self) -> None:
        self._since = time.perf_counter()

    def restart(self) -> None:
        """Begin to count anew."""
        self._since = time.perf_counter()

    @property
    def seconds(self) -> float:
        return time.perf_counter() - self._since


def _try(config: Mapping[str, Any], worker: _Worker, rungs: int, clock: _Clock) -> None:
    stages, training = Stages(config["stages"]), Training(config["training"])
    proposal = Proposal(stages, config["label"], float(config["share"]), training)
    _, reason = settled(proposal, worker.pieces)
    for rung in range(int(config["first"]), rungs):
        told: dict[str, Any] = {"failed": reason, "mean": 0.0}
        if reason is None:
            try:
                looked = worker.pieces.look(proposal, rung)
                values = looked.values
                told = {"rung": rung, "key": looked.row["key"], "values": values.tolist(), "mean": float(values.mean())}
            except TrialFailed as error:
                reason = told["failed"] = str(error)
        tune.report({**told, "busy": clock.seconds, "spent": worker.profile.take()})  # it waits for the driver's word
        clock.restart()
        if reason is not None:
            return


class _Worker:
    """What a worker process has opened: it stays from one candidate to the next."""

    def __init__(self, run: Mapping[str, Any]) -> None:
        self.store = Store(run["out"])
        check_node(run, self.store)
        self.store.cache.mkdir(parents=True, exist_ok=True)
        self.profile = Profile()
        self.watch = Watch(run["limit"])
        ((_, path),) = run["contexts"].items()
        with self.profile.measure("worker_start"):
            context = load_context(
                Path(path), choose_device(), profile=self.profile, locate=locate_of(run), cache=self.store.cache,
                beat=self.watch.beat,
            )  # fmt: skip
        self.pieces = Pieces(
            context, part(context.workload, context.calibration), self.store, batch=int(run["batch"]),
            seed=int(run["seed"]), warm=Store(run["warm"]) if run["warm"] else None, host=HostOptions(run["host"]),
        )  # fmt: skip


_workers: dict[str, _Worker] = {}  # by the id of the run: one at a time


def _opened(run: Mapping[str, Any]) -> _Worker:
    if run["id"] not in _workers:
        _workers.clear()
        _workers[run["id"]] = _Worker(run)
    return _workers[run["id"]]
