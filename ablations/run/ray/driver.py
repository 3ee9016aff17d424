"""Run jobs at once with Ray Tune, on this machine or on a cluster. ``runner*.py`` are the only modules that import Ray.

One Tune trial is one job: a few trials that share what they compute. Workers are reused, so each loads torch, the model
and the images once (``runner_worker``); they store results themselves, so that a driver that dies loses nothing. Jobs
that lose their worker are handed out again, a bounded number of times (``tries``). Tune keeps no checkpoints and no
logs of its own here.
"""

from __future__ import annotations

import logging
import os
import shutil
import tempfile
import uuid
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

_QUIET = {  # read by Ray when it is imported or started; what a user has set stays
    "RAY_USAGE_STATS_ENABLED": "0",  # no telemetry
    "RAY_CHDIR_TO_TRIAL_DIR": "0",
    "RAY_AIR_NEW_OUTPUT": "0",
    "RAY_DEDUP_LOGS": "0",
    "RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO": "0",
    "TUNE_DISABLE_AUTO_CALLBACK_LOGGERS": "1",  # no tensorboard, csv or json files
    "TUNE_DISABLE_SIGINT_HANDLER": "1",  # Ctrl-C is ours: finished trials are already safe
    "TUNE_GLOBAL_CHECKPOINT_S": "3600",
    "TUNE_PRINT_ALL_TRIAL_ERRORS": "0",
    "TUNE_WARN_INSUFFICENT_RESOURCE_THRESHOLD_S": "3600",
    "OMP_NUM_THREADS": "1",  # one core a trial, as in ``runner_cluster.WORKER_SETTINGS``
    "MALLOC_ARENA_MAX": "1",
}
_address = os.environ.get("RAY_ADDRESS") or "local"
if _address == "local" or _address.rpartition(":")[0] in ("127.0.0.1", "localhost"):
    # a Ray of this machine alone listens on the loopback address; without this, it replaces 127.0.0.1 by a public one
    _QUIET["RAY_ENABLE_WINDOWS_OR_OSX_CLUSTER"] = "0"
for _name, _value in _QUIET.items():
    os.environ.setdefault(_name, _value)

import ray  # after the settings above
from ray import tune
from ray.exceptions import RayError, RayTaskError

from ablations.measure.context import versions
from ablations.measure.opening import keep_dense
from ablations.measure.profile import Profile
from ablations.run.contexts import context_files, missing_dense
from ablations.run.jobs import Computation, Job, schedule, timings
from ablations.run.progress import RunProgress
from ablations.run.ray.address import address
from ablations.run.ray.cluster import Cluster, ask_nodes, start
from ablations.run.ray.events import Events, Lost, Shown
from ablations.run.ray.files import listed, open_library
from ablations.run.ray.folder import ray_folder
from ablations.run.ray.tries import GivenUp, Tries
from ablations.run.ray.watchdog import LIMIT, place_of_stall
from ablations.run.ray.worker import describe_jobs, find_stall, run_job, run_plain_model, watched
from ablations.run.serial import keep, waits_to_be_timed
from ablations.store.store import Store
from ablations.trial.trial import ModelFacts, Trial, failed

log = logging.getLogger(__name__)

Place = Mapping[str, Any]
"""Where a job ran: node, process, gpus, taken (resources), code, began, ended (seconds since 1970), whole, timed."""


def run_on_ray(
    work: Sequence[Computation],
    *,
    contexts: Mapping[str, Path],
    facts: Mapping[str, ModelFacts],
    store: Store,
    progress: RunProgress,
    profile: Profile | None = None,
    workers: int | None = None,
    timed: Sequence[Trial] = (),
    time_limit: float | None = LIMIT,
    asked: Callable[[], None] | None = None,
) -> list[Place]:
    """Carry out all computations, on as many workers as there are cores, or as share the GPUs; where each job ran.

    ``RAY_ADDRESS`` names a cluster; on one, the ``timed`` trials are then timed, each on a whole GPU or node (else the
    caller times them, when Ray has left the machine). ``contexts`` and ``facts`` are by model. A worker that shows no
    progress for ``time_limit`` seconds is ended (None: never), and its trials are tried again. ``asked`` is called when
    the plain models' predictions are known, before any trial.

    Raises:
        KeyboardInterrupt: on Ctrl-C and on SIGTERM; what is finished by then stays.
        OSError: results cannot be written, or not by every node (StoreError, NodeError); what is finished stays.
    """
    if not work and not (address() and timed):
        return []
    shown = Shown(progress, profile or Profile())
    with ray_folder() as folder:
        try:
            with shown.profile.measure("ray_start"):
                cluster = start(workers, folder=folder)
                progress.at_once = cluster.at_once
            run = _Run(cluster, facts=facts, store=store, shown=shown, limit=time_limit)
            run.describe(contexts)
            if asked is not None:
                asked()
            jobs = schedule(work, workers=cluster.at_once)
            log.debug("%d computations in %d jobs for %d workers", len(work), len(jobs), cluster.at_once)
            run.carry_out(jobs)
            if cluster.joined:
                run.carry_out(timings(trial for trial in timed if waits_to_be_timed(trial, store)))
            return run.places
        finally:
            with shown.profile.measure("ray_start"):
                ray.shutdown()
                forget_watches(store.cache)


class _Run:
    """One run on Ray, from the first job to the last try of the last lost one."""

    def __init__(
        self, cluster: Cluster, *, facts: Mapping[str, ModelFacts], store: Store, shown: Shown, limit: float | None
    ) -> None:
        self._cluster, self._facts, self._store, self._shown, self._limit = cluster, facts, store, shown, limit
        self._tries = Tries(self._finished)
        self._about: dict[str, Any] = {}
        self.places: list[Place] = []

    def describe(self, contexts: Mapping[str, Path]) -> None:
        """What every worker is told of the run, as plain data and the handle to the driver's files."""
        self._about = about_run(self._cluster, self._store, contexts, limit=self._limit)
        if self._cluster.joined:
            named = [file for path in contexts.values() for file in context_files(path)]
            self._about.update(library=open_library(map(str, named)), files=listed(f for f in named if f.exists()))
            self._find_dense(contexts.values())
            self._about["files"] = listed(named)

    def _find_dense(self, contexts: Iterable[Path]) -> None:
        """Have the plain model's predictions found by a node that computes, where they are not known yet."""
        missing = {path: file for path in contexts if (file := missing_dense(path)) is not None}
        share = self._cluster.share
        with self._shown.profile.measure("dense"), token(self._store, self._about):
            task = ray.remote(run_plain_model).options(num_cpus=share["CPU"], num_gpus=share.get("GPU", 0))
            found = {path: task.remote(self._about, str(path)) for path in missing}
            try:
                for path, file in missing.items():
                    keep_dense(file, ray.get(found[path]))
            except RayTaskError as error:
                raise error.cause from None
            except RayError as error:  # its worker was killed, each time
                reason = str(error).splitlines()[0]
                raise OSError(
                    f"the plain model cannot be run on the cluster ({reason}); look there for memory"
                ) from error

    def carry_out(self, jobs: Sequence[Job]) -> None:
        """All jobs, and those that are lost again, until each is done or given up."""
        left = list(jobs)
        while left:
            left = self._one_round(left)

    def _after(self, lost: Lost) -> list[Job]:
        """Record what is given up of a lost job; what is to be handed out again."""
        again, given_up, finished = self._tries.after(lost.job, lost.reason, with_node=lost.with_node)
        self._shown.progress.lost(lost.job.trials, again=bool(again))
        keys = [trial.key for trial in lost.job.trials]
        self._store.add_to_logs(keys, f"lost: {lost.reason}; {'tried again' if again else 'not tried again'}")
        if again:
            log.warning("%s: its trials are tried again (%d)", lost.reason, sum(len(job.trials) for job in again))
        for one in given_up:
            self._give_up(one, timed=lost.job.timed)
        for computation in finished:
            self._shown.progress.done(computation)
        return again

    def _stall(self, run: str, index: int) -> str | None:
        """Where a worker stood that ended for want of progress; None where it ended for another reason."""
        found = place_of_stall(watched(self._store.cache, run, index))
        if found is not None or not (self._cluster.joined and self._store.remote):
            return found
        return ask_nodes(find_stall, self._store.location, run, index)  # it is on the disk of the worker's node

    def _one_round(self, jobs: Sequence[Job]) -> list[Job]:
        """Hand the jobs out, and wait for them; those to hand out again."""
        about, again = {**self._about, "id": uuid.uuid4().hex[:8]}, list[Job]()
        events = Events(
            jobs,
            self._shown,
            on_lost=lambda lost: again.extend(self._after(lost)),
            stall=lambda index: self._stall(about["id"], index),
            limit=self._limit,
            joined=self._cluster.joined,
        )
        with scratch(self._cluster.folder) as folder, token(self._store, about):
            try:
                tune.Tuner(
                    tune.with_resources(
                        tune.with_parameters(run_job, run=about, jobs=describe_jobs(list(jobs))), self._resources(jobs)
                    ),
                    param_space={"job": tune.grid_search(list(range(len(jobs))))},
                    tune_config=tune.TuneConfig(
                        reuse_actors=True,
                        max_concurrent_trials=self._shown.progress.at_once,
                        trial_name_creator=lambda trial: f"job_{trial.config['job']}",
                        trial_dirname_creator=lambda trial: f"job_{trial.config['job']}",
                    ),
                    run_config=quiet_run(f"run-{about['id']}", folder, events),
                ).fit()
            finally:
                events.tick()
                self.places += events.places
        return again

    def _resources(self, jobs: Sequence[Job]) -> Any:
        """From a Tune trial's config to what its job takes; Tune keeps apart the workers of each kind."""
        kinds = [(job.whole_device, job.timed) for job in jobs]
        cluster = self._cluster

        def of(config: Mapping[str, Any]) -> tune.PlacementGroupFactory:
            whole, timed = kinds[config["job"]]
            return cluster.taken_by(whole=whole, timed=timed)

        return of

    def _finished(self, trial: Trial, timed: bool) -> bool:
        """Its result is stored; for one that is to be timed and is not yet, the evaluation is."""
        row = self._store.load(trial.key)
        if row is not None and row["status"] == "ok":
            return True
        return bool(trial.measure) and not timed and waits_to_be_timed(trial, self._store)

    def _give_up(self, one: GivenUp, *, timed: bool) -> None:
        for trial in one.computation.answers:
            if not self._finished(trial, timed):
                keep(failed(trial, self._facts[trial.model], one.reason), trial, self._store)
        if timed:
            self._shown.progress.timed(one.computation.trial, error=one.reason)
        else:
            self._shown.progress.done(one.computation, error=one.reason)


def about_run(cluster: Cluster, store: Store, contexts: Mapping[str, Path], *, limit: float | None) -> dict[str, Any]:
    """What every worker is told, but for the driver's files."""
    return {
        "id": uuid.uuid4().hex[:8],
        "out": store.location,
        "contexts": {model: str(path) for model, path in contexts.items()},
        "limit": limit,
        "joined": cluster.joined,
        "versions": versions(),
        "files": {},
        "library": None,
        "fetch": os.environ.get("SIEVIT_FETCH") == "always",  # else only what a node does not see
    }


def quiet_run(name: str, folder: Path, callback: tune.Callback, *, tries: int = 0) -> tune.RunConfig:
    """Tune without words and without checkpoints: what counts is stored by the workers. ``tries``: times that Tune
    itself hands a lost trial out again.
    """
    return tune.RunConfig(
        name=name,
        storage_path=str(folder),
        verbose=0,
        callbacks=[callback],
        failure_config=tune.FailureConfig(max_failures=tries),
        checkpoint_config=tune.CheckpointConfig(checkpoint_frequency=0, checkpoint_at_end=False),
    )


@contextmanager
def scratch(below: Path | None) -> Iterator[Path]:
    """A folder for what Tune must write down somewhere; nothing of it is ever read again."""
    folder = Path(tempfile.mkdtemp(prefix="sievit-", dir=below))
    try:
        yield folder
    finally:
        shutil.rmtree(folder, ignore_errors=True)


@contextmanager
def token(store: Store, about: dict[str, Any]) -> Iterator[None]:
    """A file by which a node finds out whether it sees where the results go."""
    seen = store.cache / f"run-{about['id']}.token"
    about["token"] = str(seen)
    seen.write_text("a run is going on\n", encoding="utf-8")
    try:
        yield
    finally:
        seen.unlink(missing_ok=True)


def forget_watches(cache: Path) -> None:
    """What workers left that hung has been read by now, and stands in the records."""
    shutil.rmtree(cache / "watch", ignore_errors=True)
