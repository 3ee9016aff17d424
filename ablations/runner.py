"""Run jobs at once with Ray Tune: the only module that imports Ray.

One Tune trial is one job: a few trials that share what they compute. Workers are reused, so each loads torch, the model
and the images once; they store results themselves, so that a driver that dies loses nothing. Jobs that lose their
worker are repeated one trial at a time. Tune keeps no checkpoints and no logs of its own here.
"""

from __future__ import annotations

import dataclasses
import json
import logging
import os
import shutil
import signal
import time
import uuid
from collections.abc import Mapping, Sequence
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
    "OMP_NUM_THREADS": "1",  # one core a trial
    # Tune runs each job in a new thread, and glibc would give each a heap of its own, which add up to gigabytes
    "MALLOC_ARENA_MAX": "1",
}
if not os.environ.get("RAY_ADDRESS"):
    # a private Ray listens on the loopback address alone; without this, it replaces 127.0.0.1 by a public address
    _QUIET["RAY_ENABLE_WINDOWS_OR_OSX_CLUSTER"] = "0"
for _name, _value in _QUIET.items():
    os.environ.setdefault(_name, _value)

import ray  # after the settings above
import torch
from ray import tune

from ablations.context import Contexts, choose_device, load_context
from ablations.jobs import Computation, Job, schedule
from ablations.profile import Profile
from ablations.progress import RunProgress
from ablations.serial import Outcome, carry_out
from ablations.store import Store, write_json
from ablations.trial import ModelFacts, Trial, failed

log = logging.getLogger(__name__)

_OBJECT_STORE = 128 * 2**20  # bytes: rows are stored as files, so next to nothing travels
_PER_GPU = 4  # trials that share a GPU unless --workers says otherwise: small models leave most of it idle


class _Worker:
    """What a worker process has opened: it stays from one job to the next."""

    def __init__(self, description: Path) -> None:
        about = json.loads(description.read_text(encoding="utf-8"))
        self.profile = Profile()
        self.store = Store(about["out"])
        self.jobs = [Job(tuple(map(_computation, job))) for job in about["jobs"]]
        self._contexts = Contexts(
            lambda model: load_context(Path(about["contexts"][model]), choose_device(), profile=self.profile)
        )

    def run(self, index: int) -> list[Outcome]:
        """Carry out a job, its epochs of finetuning told to Tune."""
        job = self.jobs[index]
        with self.profile.measure("worker_start"):  # nothing to do but for the first job of a model
            context = self._contexts[job.model]
        return carry_out(job, context, self.store, report=lambda epoch: tune.report({"epoch": dict(epoch)}))


_workers: dict[str, _Worker] = {}  # by the file that describes the run


def _work(config: dict[str, Any]) -> None:
    """One Tune trial: one job. Tune calls this in a new thread of a process that it uses again."""
    started = time.perf_counter()
    torch.set_num_threads(1)  # a setting of the thread
    if config["run"] not in _workers:
        _workers[config["run"]] = _Worker(Path(config["run"]))
    worker = _workers[config["run"]]
    outcomes = worker.run(int(config["job"]))
    tune.report(
        {
            "outcomes": [dataclasses.asdict(outcome) for outcome in outcomes],
            "spent": worker.profile.take(),
            "busy": time.perf_counter() - started,
        }
    )


def _computation(fields: dict[str, Any]) -> Computation:
    answers = tuple(Trial(**trial) for trial in fields["answers"])
    return Computation(**{**fields, "trial": Trial(**fields["trial"]), "answers": answers})


class _Reporter(tune.Callback):
    """Carries what happens in Tune to the progress display, keeps the clocks, and notes jobs whose worker died."""

    def __init__(self, jobs: Sequence[Job], store: Store, facts: Mapping[str, ModelFacts], shown: _Shown) -> None:
        self._jobs, self._store, self._facts, self._shown = jobs, store, facts, shown
        self._results: dict[int, dict[str, Any]] = {}
        self._began: dict[int, float] = {}  # of jobs that run
        self._waiting = len(jobs)
        self._since = time.perf_counter()
        self._any = False
        self.lost: list[Job] = []

    def __getstate__(self) -> dict[str, Any]:
        """Nothing: Tune writes callbacks down to restore a run, and a progress bar cannot be written."""
        return {}

    def on_trial_start(self, iteration: int, trials: list[Any], trial: Any, **_: Any) -> None:
        self.tick()
        self._any = True
        self._waiting -= 1
        self._began[trial.config["job"]] = self._since

    def on_trial_result(self, iteration: int, trials: list[Any], trial: Any, result: dict[str, Any], **_: Any) -> None:
        if "epoch" in result:
            self._shown.progress.trained(self._jobs[trial.config["job"]].trials, result["epoch"])
        else:
            self._results[trial.config["job"]] = result

    def on_trial_complete(self, iteration: int, trials: list[Any], trial: Any, **_: Any) -> None:
        index = trial.config["job"]
        result = self._results.pop(index)
        self._ended(index, busy=result["busy"])
        self._shown.profile.merge(result["spent"])
        for computation, outcome in zip(self._jobs[index].computations, result["outcomes"], strict=True):
            self._shown.progress.done(computation, seconds=outcome["seconds"], error=outcome["error"])

    def on_trial_error(self, iteration: int, trials: list[Any], trial: Any, **_: Any) -> None:
        job = self._jobs[trial.config["job"]]
        self._ended(trial.config["job"], busy=None)
        reason = _reason(trial)
        if len(job.computations) > 1:  # one of them may have taken the others down with it
            log.warning("%s: its %d trials are tried again one by one", reason, len(job.computations))
            self.lost.append(job)
            return
        rows = {planned.key: self._store.load(planned.key) for planned in job.trials}
        lost = [planned for planned in job.trials if (rows[planned.key] or {}).get("status") != "ok"]
        for planned in lost:
            self._store.save(failed(planned, self._facts[planned.model], reason))
        self._shown.progress.done(job.computations[0], error=reason if lost else None)

    def tick(self) -> None:
        """Account for workers without a job since the last event: starting, waiting for one, or at the end idle."""
        now = time.perf_counter()
        passed, free = now - self._since, max(0, self._shown.progress.at_once - len(self._began))
        if self._any:
            self._shown.profile.add("hand_over" if self._waiting else "idle", free * passed)
        else:
            self._shown.profile.add("ray_start", passed)
        self._since = now

    def _ended(self, index: int, *, busy: float | None) -> None:
        self.tick()
        ran = self._since - self._began.pop(index, self._since)
        if busy is not None:
            self._shown.profile.add("hand_over", max(0.0, ran - busy))


@dataclasses.dataclass(frozen=True)
class _Shown:
    """What a person sees of a run."""

    progress: RunProgress
    profile: Profile


def run_on_ray(
    work: Sequence[Computation],
    *,
    contexts: Mapping[str, Path],
    facts: Mapping[str, ModelFacts],
    store: Store,
    progress: RunProgress,
    profile: Profile | None = None,
    workers: int | None = None,
) -> None:
    """Carry out all computations, on as many workers as there are cores, or as share the GPUs; ``RAY_ADDRESS`` names a
    cluster. ``contexts`` and ``facts`` are by model.

    Raises KeyboardInterrupt on Ctrl-C and on SIGTERM; what is finished by then stays.
    """
    shown = _Shown(progress, profile or Profile())
    try:
        with shown.profile.measure("ray_start"):
            _start_ray(workers)
            resources, progress.at_once = _resources(workers)
        jobs = schedule(work, workers=progress.at_once)
        log.debug("%d computations in %d jobs for %d workers", len(work), len(jobs), progress.at_once)
        lost = _run(jobs, resources, contexts=contexts, facts=facts, store=store, shown=shown)
        alone = [Job((computation,)) for job in lost for computation in job.computations]
        if alone:
            _run(alone, resources, contexts=contexts, facts=facts, store=store, shown=shown)
    finally:
        with shown.profile.measure("ray_start"):
            ray.shutdown()
            shutil.rmtree(store.out / "ray", ignore_errors=True)


def _run(
    jobs: Sequence[Job],
    resources: Mapping[str, float],
    *,
    contexts: Mapping[str, Path],
    facts: Mapping[str, ModelFacts],
    store: Store,
    shown: _Shown,
) -> list[Job]:
    """Hand the jobs out; those that lost their worker and may be tried again."""
    description = store.cache / f"jobs-{uuid.uuid4().hex[:8]}.json"
    write_json(
        description,
        {
            "out": str(store.out),
            "contexts": {model: str(path) for model, path in contexts.items()},
            "jobs": [[dataclasses.asdict(computation) for computation in job.computations] for job in jobs],
        },
    )
    reporter = _Reporter(jobs, store, facts, shown)
    try:
        tune.Tuner(
            tune.with_resources(_work, dict(resources)),
            param_space={"job": tune.grid_search(list(range(len(jobs)))), "run": str(description)},
            tune_config=tune.TuneConfig(
                reuse_actors=True,
                max_concurrent_trials=shown.progress.at_once,
                trial_name_creator=lambda trial: f"job_{trial.config['job']}",
                trial_dirname_creator=lambda trial: f"job_{trial.config['job']}",
            ),
            run_config=tune.RunConfig(
                name=description.stem,
                storage_path=str(store.out / "ray"),
                verbose=0,
                callbacks=[reporter],
                failure_config=tune.FailureConfig(max_failures=0),
                checkpoint_config=tune.CheckpointConfig(checkpoint_frequency=0, checkpoint_at_end=False),
            ),
        ).fit()
    finally:
        reporter.tick()
        description.unlink(missing_ok=True)
    return reporter.lost


def _start_ray(workers: int | None) -> None:
    """Join the cluster of ``RAY_ADDRESS``, or start a private one on this machine's loopback address."""
    quiet: dict[str, Any] = {"log_to_driver": False, "logging_level": logging.ERROR, "configure_logging": True}
    address = os.environ.get("RAY_ADDRESS")
    before = signal.getsignal(signal.SIGTERM)
    if address:
        ray.init(address=address, **quiet)
    else:
        ray.init(
            num_cpus=max(1, workers or len(os.sched_getaffinity(0))),
            include_dashboard=False,
            object_store_memory=_OBJECT_STORE,
            _node_ip_address="127.0.0.1",
            **quiet,
        )
    signal.signal(signal.SIGTERM, before)  # Ray's own handler would end the process before the results are compacted
    for name in ("ray", "ray.tune", "ray.train"):
        logging.getLogger(name).setLevel(logging.CRITICAL)


def _resources(workers: int | None) -> tuple[dict[str, float], int]:
    """What one job takes (a core, and a share of a GPU where there is one), and how many jobs that lets run at once."""
    available = ray.cluster_resources()
    gpus, cores = available.get("GPU", 0.0), int(available.get("CPU", 1))
    if not gpus:
        return {"cpu": 1}, min(cores, workers or cores)
    at_once = max(1, workers or min(cores, int(gpus * _PER_GPU)))
    return {"cpu": 1, "gpu": min(1.0, gpus / at_once)}, min(at_once, cores)


def _reason(trial: Any) -> str:
    """Why a worker ended without a result, in one line, from the file that Tune has just written."""
    try:
        text = Path(trial.error_file).read_text(encoding="utf-8", errors="replace")
    except (OSError, TypeError):  # no file, or none named
        text = ""
    lines = [line.strip() for line in text.splitlines() if line.strip() and not line.startswith("Failure #")]
    if not lines or "died" in lines[0]:
        return "the worker was killed or crashed; where memory ran out, use fewer --workers or a smaller --batch"
    return f"the worker ended: {lines[-1]}"  # the last line of a traceback
