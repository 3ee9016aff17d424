"""A search on Ray Tune: candidates at once, each a Tune trial that reports rung by rung.

Tune's searcher asks the race what to try, its scheduler asks the race who goes on: the same race, with the same pure
functions behind it, that a serial run asks. What a worker computes it stores itself, as in any run.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np

from ablations.run.ray.driver import (  # before Ray: it sets Ray's environment
    about_run,
    forget_watches,
    quiet_run,
    scratch,
    token,
)

import ray  # isort: skip
from ray import tune
from ray.tune.schedulers import FIFOScheduler, TrialScheduler
from ray.tune.search import Searcher

from ablations.measure.opening import Subject
from ablations.measure.profile import Profile
from ablations.records.storage import StoreError
from ablations.run.contexts import context_files, save_subject
from ablations.run.ray.cluster import Cluster, start
from ablations.run.ray.files import listed, open_library
from ablations.run.ray.folder import ray_folder
from ablations.run.ray.search_worker import try_candidate
from ablations.run.recommend.pieces import Pieces
from ablations.run.recommend.serial import ShareOf
from ablations.search.planner import Candidate
from ablations.search.race import Race
from ablations.store.store import Store
from ablations.trial.stages import HostOptions

_INSIDE = "/"  # between the names of what Tune gives a scheduler flattened
_TRIES = 2  # times a candidate is handed out again whose worker was lost

Searching = Callable[[Race, Pieces, ShareOf, Callable[[Race], None]], None]


@contextmanager
def search_on_ray(
    subject: Subject, out: Store, store: Store, *, seed: int, host: HostOptions, workers: int | None, profile: Profile,
    time_limit: float | None,
) -> Iterator[tuple[Searching, int]]:  # fmt: skip
    """Who carries races out on Ray, as long as the block lasts, and how many candidates at once.

    ``out`` keeps the images, what the plain model says of them and what an earlier run left, ``store`` the candidates'
    results.
    """
    with ray_folder() as folder:
        try:
            with profile.measure("ray_start"):
                cluster = start(workers, folder=folder)
            path = save_subject(subject, out.cache)
            about = {
                **about_run(cluster, store, {subject.facts.name: path}, limit=time_limit),
                "seed": seed,
                "host": host.text,
                "batch": subject.target.batch,
                "warm": out.location if out.finished() else "",
            }
            if cluster.joined:
                files = [file for file in context_files(path) if file.exists()]
                about.update(library=open_library(map(str, files)), files=listed(files))
            yield _Search(cluster, about, store, profile), cluster.at_once
        finally:
            with profile.measure("ray_start"):
                ray.shutdown()
                forget_watches(store.cache)


class _Search:
    """Carries races out, one after the other, on one cluster."""

    def __init__(self, cluster: Cluster, about: Mapping[str, Any], store: Store, profile: Profile) -> None:
        self._cluster, self._about, self._store, self._profile = cluster, about, store, profile

    def __call__(self, race: Race, pieces: Pieces, share_of: ShareOf, told: Callable[[Race], None]) -> None:
        about, began = dict(self._about), time.perf_counter()
        rounds = _Rounds(race, told, self._profile)
        with scratch(self._cluster.folder) as folder, token(self._store, about):
            tune.Tuner(
                tune.with_resources(
                    tune.with_parameters(try_candidate, run=about, rungs=len(pieces.parts.rungs)),
                    self._cluster.taken_by(whole=False, timed=False),
                ),
                tune_config=tune.TuneConfig(
                    search_alg=_Asking(rounds, share_of),
                    scheduler=_Rungs(rounds),
                    metric="mean",
                    mode="max",
                    num_samples=-1,  # as long as the race has candidates
                    reuse_actors=True,
                    max_concurrent_trials=self._cluster.at_once,
                    trial_name_creator=lambda trial: f"candidate_{trial.config['number']}",
                    trial_dirname_creator=lambda trial: f"candidate_{trial.config['number']}",
                ),
                run_config=quiet_run(f"search-{about['id']}", folder, _Fatal(rounds), tries=_TRIES),
            ).fit()
        spent = self._cluster.at_once * (time.perf_counter() - began)
        self._profile.add("hand_over", max(0.0, spent - rounds.busy - rounds.planning))


class _Rounds:
    """What workers report, told to the race."""

    def __init__(self, race: Race, told: Callable[[Race], None], profile: Profile) -> None:
        self.race, self._told, self._profile = race, told, profile
        self.fatal: str | None = None
        self.busy = 0.0  # seconds that workers computed
        self.planning = 0.0  # … and that one of them waited to be told what

    def asked(self) -> Candidate | None:
        """The next candidate; a worker waits for it."""
        began = time.perf_counter()
        candidate = self.race.ask()
        spent = time.perf_counter() - began
        self.planning += spent
        self._profile.add("planning", spent)
        return candidate

    def reported(self, number: int, result: Mapping[str, Any]) -> bool:
        """Whether the candidate goes on."""
        if "fatal" in result:
            self.fatal = str(result["fatal"])
            return False
        if "busy" not in result:
            return True  # Tune's own last word
        self.busy += result["busy"]
        prefix = f"spent{_INSIDE}"
        self._profile.merge({name.removeprefix(prefix): value for name, value in result.items() if prefix in name})
        standing = self.race.standings[number]
        if standing.ended or standing.complete:
            return False
        if "failed" in result:
            self.race.fail(number, result["failed"])
            on = False
        elif result["rung"] < len(standing.values):
            return True  # told before its worker was lost
        else:
            on = self.race.report(number, result["key"], np.array(result["values"]))
        if not on:
            self._told(self.race)
        return on

    def lost(self, number: int) -> None:
        """It is over in Tune; where it has not ended in the race, its worker was lost too often, or said nothing."""
        standing = self.race.standings[number]
        if self.fatal is None and not (standing.ended or standing.complete):
            self.race.lose(number, "its worker was lost; the same command tries it again")
            self._told(self.race)


class _Asking(Searcher):
    """Tune's question what to try, asked of the race."""

    def __init__(self, rounds: _Rounds, share_of: ShareOf) -> None:
        super().__init__(metric="mean", mode="max")
        self._rounds, self._share_of = rounds, share_of

    def __getstate__(self) -> dict[str, Any]:
        """Nothing, as of ``_Fatal``."""
        return {}

    def suggest(self, trial_id: str) -> Any:
        candidate = self._rounds.asked()
        if candidate is None:
            return Searcher.FINISHED
        return {
            "number": candidate.number,
            "stages": candidate.stages.text,
            "label": candidate.label,
            "training": candidate.training.text,
            "share": self._share_of(candidate.stages),
            "first": len(self._rounds.race.standings[candidate.number].values),
        }

    def on_trial_complete(self, trial_id: str, result: dict[str, Any] | None = None, error: bool = False) -> None:
        """Told by the scheduler already."""

    def save(self, checkpoint_path: str) -> None:
        """Nothing: the journal is what a search goes on from."""
        Path(checkpoint_path).touch()

    def restore(self, checkpoint_path: str) -> None:
        """Nothing, as ``save``."""


class _Rungs(FIFOScheduler):
    """Tune's question who goes on, asked of the race."""

    def __init__(self, rounds: _Rounds) -> None:
        super().__init__()
        self._rounds = rounds

    def __getstate__(self) -> dict[str, Any]:
        """Nothing, as of ``_Fatal``."""
        return {}

    def on_trial_result(self, tune_controller: Any, trial: Any, result: dict[str, Any]) -> str:
        on = self._rounds.reported(trial.config["number"], result)
        return str(TrialScheduler.CONTINUE if on else TrialScheduler.STOP)

    def on_trial_complete(self, tune_controller: Any, trial: Any, result: dict[str, Any]) -> None:
        super().on_trial_complete(tune_controller, trial, result)
        self._rounds.lost(trial.config["number"])


class _Fatal(tune.Callback):
    """Hears of candidates that Tune hands out no more (schedulers hear of every loss alike), and ends a search where a
    worker found that going on would lose results.
    """

    def __init__(self, rounds: _Rounds) -> None:
        self._rounds = rounds

    def __getstate__(self) -> dict[str, Any]:
        """Nothing: Tune writes callbacks down to restore a run."""
        return {}

    def on_trial_error(self, iteration: int, trials: list[Any], trial: Any, **_: Any) -> None:
        """Its worker was lost as often as is tried."""
        self._rounds.lost(trial.config["number"])

    def on_step_end(self, iteration: int, trials: list[Any], **_: Any) -> None:
        """Raises StoreError with the worker's reason."""
        if self._rounds.fatal is not None:
            raise StoreError(self._rounds.fatal)
