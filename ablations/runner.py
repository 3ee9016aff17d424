"""Run jobs at once with Ray Tune: the only module that imports Ray.

One Tune trial is one job. Workers are reused, so each loads torch, the model and the images once; they store results
themselves, so that a driver that dies loses nothing. Tune keeps no checkpoints and no logs of its own here.
"""

from __future__ import annotations

import dataclasses
import json
import logging
import os
import shutil
import signal
from collections.abc import Sequence
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
}
if not os.environ.get("RAY_ADDRESS"):
    # a private Ray listens on the loopback address alone; without this, it replaces 127.0.0.1 by a public address
    _QUIET["RAY_ENABLE_WINDOWS_OR_OSX_CLUSTER"] = "0"
for _name, _value in _QUIET.items():
    os.environ.setdefault(_name, _value)

import ray  # after the settings above
import torch
from ray import tune

from ablations.context import choose_device, load_context
from ablations.evaluate import try_trial
from ablations.plan import Job
from ablations.progress import RunProgress
from ablations.store import Store, write_json
from ablations.trial import ModelFacts, Trial, answers, failed

log = logging.getLogger(__name__)

_OBJECT_STORE = 128 * 2**20  # bytes: rows are stored as files, so next to nothing travels
_PER_GPU = 4  # trials that share a GPU unless --workers says otherwise: small models leave most of it idle


class _Worker(tune.Trainable):
    """A worker process: opens the context once, then runs one job after the other."""

    def setup(self, config: dict[str, Any]) -> None:
        torch.set_num_threads(1)
        self._context = load_context(Path(config["context"]), choose_device())
        self._store = Store(config["out"])
        self._jobs = json.loads(Path(config["jobs"]).read_text(encoding="utf-8"))
        self._index = int(config["job"])

    def reset_config(self, new_config: dict[str, Any]) -> bool:
        """Take the next job of the same run; nothing has to be loaded again."""
        self._index = int(new_config["job"])
        return True

    def step(self) -> dict[str, Any]:
        trials = [Trial(**fields) for fields in self._jobs[self._index]]
        result = try_trial(trials[0], self._context)
        for answer in answers(result, trials, self._context.facts):
            self._store.save(answer)
        return {"done": True, "reason": result.row["error"], "seconds": result.row["seconds"]}


class _Reporter(tune.Callback):
    """Carries what happens in Tune to the progress display, and records jobs whose worker died."""

    def __init__(self, jobs: Sequence[Job], facts: ModelFacts, store: Store, progress: RunProgress) -> None:
        self._jobs, self._facts, self._store, self._progress = jobs, facts, store, progress
        self._results: dict[int, dict[str, Any]] = {}

    def __getstate__(self) -> dict[str, Any]:
        """Nothing: Tune writes callbacks down to restore a run, and a progress bar cannot be written."""
        return {}

    def on_trial_result(self, iteration: int, trials: list[Any], trial: Any, result: dict[str, Any], **_: Any) -> None:
        self._results[trial.config["job"]] = result

    def on_trial_complete(self, iteration: int, trials: list[Any], trial: Any, **_: Any) -> None:
        index = trial.config["job"]
        result = self._results.pop(index, {})
        self._progress.done(self._jobs[index], seconds=result.get("seconds", 0.0), error=result.get("reason"))

    def on_trial_error(self, iteration: int, trials: list[Any], trial: Any, **_: Any) -> None:
        job = self._jobs[trial.config["job"]]
        reason = _reason(trial)
        rows = {planned.key: self._store.load(planned.key) for planned in job.trials}
        lost = [planned for planned in job.trials if (rows[planned.key] or {}).get("status") != "ok"]
        for planned in lost:
            self._store.save(failed(planned, self._facts, reason))
        self._progress.done(job, error=reason if lost else None)


def run_on_ray(
    jobs: Sequence[Job],
    *,
    context: Path,
    facts: ModelFacts,
    store: Store,
    progress: RunProgress,
    workers: int | None = None,
) -> None:
    """Run all jobs, as many at once as there are cores, or as share the GPUs; ``RAY_ADDRESS`` names a cluster.

    Raises KeyboardInterrupt on Ctrl-C and on SIGTERM; what is finished by then stays.
    """
    jobs_file = store.cache / "jobs.json"
    write_json(jobs_file, [[dataclasses.asdict(trial) for trial in job.trials] for job in jobs])
    storage = store.out / "ray"
    try:
        _start_ray(workers)
        resources, progress.at_once = _resources(workers)
        tune.Tuner(
            tune.with_resources(_Worker, resources),
            param_space={
                "job": tune.grid_search(list(range(len(jobs)))),
                "jobs": str(jobs_file),
                "context": str(context),
                "out": str(store.out),
            },
            tune_config=tune.TuneConfig(
                reuse_actors=True,
                max_concurrent_trials=workers,
                trial_name_creator=lambda trial: f"job_{trial.config['job']}",
                trial_dirname_creator=lambda trial: f"job_{trial.config['job']}",
            ),
            run_config=tune.RunConfig(
                name="run",
                storage_path=str(storage),
                verbose=0,
                callbacks=[_Reporter(jobs, facts, store, progress)],
                failure_config=tune.FailureConfig(max_failures=0),
                checkpoint_config=tune.CheckpointConfig(checkpoint_frequency=0, checkpoint_at_end=False),
            ),
        ).fit()
    finally:
        ray.shutdown()
        jobs_file.unlink(missing_ok=True)
        shutil.rmtree(storage, ignore_errors=True)


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
