"""What a worker process of Ray does: it opens a run once and then carries out one job after the other.

A worker stores its results itself, so that a driver that dies loses nothing. It trusts its node only after a look: a
worker that cannot see where results go, or computes with other versions, ends the run before it does harm.
"""

from __future__ import annotations

import dataclasses
import json
import os
import platform
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import ray
import torch
from ray import tune

from ablations.measure.context import DensePredictions, versions
from ablations.measure.opening import choose_device
from ablations.measure.profile import Profile
from ablations.records.storage import StoreError
from ablations.run.contexts import Contexts, Locate, find_dense, load_context
from ablations.run.jobs import Computation, Job
from ablations.run.ray.files import Files
from ablations.run.ray.watchdog import Watch, place_of_stall
from ablations.run.serial import Outcome, carry_out
from ablations.store.store import Store
from ablations.trial.trial import trial_from

_COMPARED = ("torch", "timm", "numpy")  # versions that change numbers
_PATIENCE = 60.0  # seconds: a network disk may show a new file late


class NodeError(OSError):
    """This node must not compute for this run."""


def run_job(config: dict[str, Any], run: Mapping[str, Any], jobs: bytes) -> None:
    """One Tune trial: one job. Tune calls this in a new thread of a process that it uses again.

    ``run`` says what a worker must know of the run, ``jobs`` is what ``describe_jobs`` made of all of them; both come
    through Ray's object store.
    """
    started, began = time.perf_counter(), time.time()
    torch.set_num_threads(1)  # a setting of the thread
    index = int(config["job"])
    try:
        worker = _opened(run, jobs)
        with worker.watch.over(watched(worker.store.cache, run["id"], index)):
            outcomes = worker.carry_out(index)
    except (StoreError, NodeError) as error:
        tune.report({"fatal": str(error)})
        return
    tune.report(
        {
            "outcomes": [dataclasses.asdict(outcome) for outcome in outcomes],
            "spent": worker.profile.take(),
            "busy": time.perf_counter() - started,
            "place": {**place(), "began": began, "ended": time.time()},
        }
    )


class _Worker:
    """What a worker process has opened: it stays from one job to the next."""

    def __init__(self, run: Mapping[str, Any], jobs: bytes) -> None:
        self.store = Store(run["out"])
        check_node(run, self.store)
        self.store.cache.mkdir(parents=True, exist_ok=True)
        self.profile = Profile()
        self.watch = Watch(run["limit"])
        self._jobs = json.loads(bytes(jobs))
        files = locate_of(run)
        self._contexts = Contexts(
            lambda model: load_context(
                Path(run["contexts"][model]), choose_device(), profile=self.profile, locate=files,
                cache=self.store.cache, beat=self.watch.beat,
            )
        )  # fmt: skip

    def carry_out(self, index: int) -> list[Outcome]:
        """A job by its number, its epochs of finetuning told to Tune."""
        job = read_job(self._jobs[index])
        with self.profile.measure("worker_start"):  # nothing to do but for the first job of a model
            context = self._contexts[job.model]
        self.watch.beat()
        return carry_out(job, context, self.store, report=lambda epoch: tune.report({"epoch": dict(epoch)}))


def locate_of(run: Mapping[str, Any]) -> Locate:
    """Where the driver's files are on this node."""
    return Files(run["files"], run["library"], run=run["id"], always=run["fetch"]) if run["joined"] else Path


def run_plain_model(run: Mapping[str, Any], context: str) -> DensePredictions:
    """A task of Ray: what the plain model says of the images, found where trials are computed, not by the driver."""
    torch.set_num_threads(1)
    check_node(run, Store(run["out"]))
    return find_dense(Path(context), choose_device(), locate=locate_of(run))


def find_stall(out: str, run: str, index: int) -> str | None:
    """A task of Ray: where a worker of this node stood that hung, from what it left here."""
    path = watched(Store(out).cache, run, index)
    found = place_of_stall(path)
    path.unlink(missing_ok=True)
    return found


_workers: dict[str, _Worker] = {}  # by the id of the run: one at a time


def _opened(run: Mapping[str, Any], jobs: bytes) -> _Worker:
    if run["id"] not in _workers:
        _workers.clear()
        _workers[run["id"]] = _Worker(run, jobs)
    return _workers[run["id"]]


def check_node(run: Mapping[str, Any], store: Store) -> None:
    """Refuse a node whose results would be lost, or would not compare.

    Raises:
        NodeError: with the node's name, what is wrong, and what to do.
    """
    if not run["joined"]:
        return  # the driver's own machine
    here, there = versions(), run["versions"]
    other = [f"{name} {here[name]}, not {there[name]}" for name in _COMPARED if here[name] != there[name]]
    if other:
        raise NodeError(
            f"the node {platform.node()} has {'; '.join(other)}: install the versions of the driver there, or let "
            "SIEVIT_SHIP=environment do it"
        )
    if not store.remote and not _appears(Path(run["token"])):
        raise NodeError(
            f"the node {platform.node()} does not see {store.location}: OUT must be on a disk that all nodes "
            "share, at the same path, or a URI such as s3://bucket/folder"
        )


def _appears(path: Path) -> bool:
    until = time.monotonic() + _PATIENCE
    while not path.exists():
        if time.monotonic() > until:
            return False
        time.sleep(1.0)
    return True


def place() -> dict[str, Any]:
    """Where this worker is: its node, process and GPUs, and the code it runs."""
    context = ray.get_runtime_context()
    return {
        "node": context.get_node_id(),
        "process": os.getpid(),
        "gpus": [str(gpu) for gpu in context.get_accelerator_ids().get("GPU", [])],
        "taken": dict(context.get_assigned_resources()),
        "code": str(Path(__file__).resolve().parents[2]),
    }


# --- what travels -----------------------------------------------------------------------------------------------------


def watched(cache: Path, run: str, index: int) -> Path:
    """Where a worker that hangs leaves its stacks."""
    return cache / "watch" / f"{run}-{index}.txt"


def describe_jobs(jobs: list[Job]) -> bytes:
    """Jobs as plain data."""
    described = [{"timed": job.timed, "computations": [*map(_described, job.computations)]} for job in jobs]
    return json.dumps(described).encode()


def read_job(fields: Mapping[str, Any]) -> Job:
    """A job from plain data."""
    return Job(tuple(map(_computation, fields["computations"])), timed=fields["timed"])


def _described(computation: Computation) -> dict[str, Any]:
    answers = [trial.description for trial in computation.answers]
    return {**vars(computation), "trial": computation.trial.description, "answers": answers}


def _computation(fields: Mapping[str, Any]) -> Computation:
    answers = tuple(map(trial_from, fields["answers"]))
    return Computation(**{**fields, "trial": trial_from(fields["trial"]), "answers": answers})
