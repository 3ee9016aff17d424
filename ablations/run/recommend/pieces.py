"""Candidates of a search as ordinary trials, on one part of the images at a time.

A part is a workload of its own, whose digest stands in the trial's key, so that what a lower rung computed is never
computed again, and every candidate can be looked up and reproduced like any trial.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
import pyarrow as pa

from ablations.measure.calibrate import solve
from ablations.measure.context import DensePredictions, TrialContext
from ablations.measure.opening import target_of
from ablations.run.jobs import Computation, Job
from ablations.run.serial import carry_out
from ablations.search.parts import Parts, workload_of
from ablations.search.planner import Candidate
from ablations.store.store import Store
from ablations.trial.code import code_of
from ablations.trial.free_settings import free_kinds
from ablations.trial.stages import AS_USUAL, OFF_THE_SHELF, HostOptions, Stages, Training
from ablations.trial.trial import Solution, Trial, TrialError, trial_from
from ablations.workloads import Workload
from reducers import Placement

Load = Callable[[Placement], Placement]
"""Puts trained tensors into the reducers of a placement."""

SPEC = "recommend"
_LONGEST = 120  # characters of a label


@dataclass(frozen=True)
class Proposal:
    """What is to be tried: stages with one kind of budget open, and the share of the dense model's cost to meet."""

    stages: Stages
    label: str
    share: float
    training: Training = OFF_THE_SHELF  # whose weights it has

    @classmethod
    def of(cls, candidate: Candidate, share: float) -> Proposal:
        """A candidate at a share of the dense model's cost."""
        return cls(candidate.stages, candidate.label, share, candidate.training)


@dataclass(frozen=True)
class Looked:
    """What a trial gave: its row, and the task's value of each image."""

    row: Mapping[str, Any]
    values: np.ndarray
    gmacs: np.ndarray


class Pieces:
    """Evaluates proposals on the parts of a context's images.

    Args:
        context: the whole workload, with the dense model's predictions.
        parts: its parts.
        store: where results are kept.
        batch: images at once.
        seed: of every draw that stages do not seed themselves.
        warm: results of an earlier run over the whole workload, from which search images alone are read.
        host: how the model is driven.
    """

    def __init__(
        self, context: TrialContext, parts: Parts, store: Store, *, batch: int, seed: int, warm: Store | None = None,
        host: HostOptions = AS_USUAL,
    ) -> None:  # fmt: skip
        self.context, self.parts, self.store, self.host = context, parts, store, host
        self.task = context.task
        self._tuned: dict[Training, tuple[TrialContext, Load | None]] = {OFF_THE_SHELF: (context, None)}
        self._batch, self._seed = batch, seed
        self._contexts: dict[int, TrialContext] = {}
        self._warm = warm
        self._known = {} if warm is None else _finished(warm, context.workload.digest)

    # --- trials -------------------------------------------------------------------------------------------------------

    def trial(self, proposal: Proposal, part: int) -> Trial:
        """The proposal on a part: the number of a rung, or after the last of them the confirmation."""
        return self._trial(proposal, self._context(part))

    def settle(self, proposal: Proposal) -> Solution | None:
        """The proposal with its budget written in, None where it has none that is open. What it tried is remembered."""
        trial = self._trial(proposal, self.context)
        if trial.target is None:
            return None
        context, load = self.with_weights(proposal.training)
        with self.context.profile.measure("calibration"):
            return solve(trial, context, load=load)

    def with_weights(self, training: Training) -> tuple[TrialContext, Load | None]:
        """The context with the weights of a training, and what puts the reducers' own into a placement.

        Raises:
            FinetuneError: they are not kept any more.
        """
        if training not in self._tuned:
            from ablations.measure.finetune import finetuned
            from ablations.run.given import provide  # most searches need none of it

            assert self.context.cache is not None
            provide(training, self.store, self.context.cache, self.context.model)
            tuned = finetuned(training, self.context, host=self.host)
            self._tuned[training] = dataclasses.replace(self.context, model=tuned.model), tuned.load_reducers
        return self._tuned[training]

    def look(self, proposal: Proposal, part: int) -> Looked:
        """The proposal's result on a part, computed unless it is on record.

        Raises:
            TrialFailed: it gave none; the reason is on record.
        """
        if (warm := self._warm_key(proposal, part)) is not None and (looked := self.known(warm, part)) is not None:
            return looked
        trial = self.trial(proposal, part)
        looked = self.known(trial.key, part)
        if looked is None:
            try:
                self.with_weights(proposal.training)  # they must lie in the caches
            except ValueError as error:
                raise TrialFailed(str(error)) from error
            job = Job((Computation(trial, (trial,), 0.0, 0.0),))
            (outcome,) = carry_out(job, self._context(part), self.store)
            looked = self.known(trial.key, part)
            if outcome.error is not None or looked is None:
                raise TrialFailed(outcome.error or f"the result of {trial.key} cannot be read")
        return looked

    def known(self, key: str, part: int) -> Looked | None:
        """A finished result by its key, or None."""
        whole = key in self._known.values()
        store = self._warm if whole and self._warm is not None else self.store
        row = store.load(key)
        if row is None or row["status"] != "ok":
            return None
        try:
            images = store.load_images(key)
        except (OSError, ValueError, pa.ArrowException):
            return None
        if whole:
            images = _only(images, self._context(part).workload.ids)
        columns = {name: np.array(images[name].to_pylist(), dtype=np.float64) for name in (self.task.value, "gmacs")}
        return Looked(row, self.task.values(columns), columns["gmacs"])

    def dense(self, *parts: int) -> np.ndarray:
        """The dense model's values on these parts, one after the other; compared with itself, it is 1 everywhere."""
        found = [self._context(part).dense.reference.get(self.task.value) for part in parts]
        whole = [len(self.parts.all[part]) for part in parts]
        return np.concatenate(
            [np.ones(count) if values is None else values for values, count in zip(found, whole, strict=True)]
        ).astype(np.float64)

    def workload(self, part: int) -> Workload:
        """The images of a part."""
        return self._context(part).workload

    def _trial(self, proposal: Proposal, context: TrialContext) -> Trial:
        open_budget = bool(free_kinds(proposal.stages.data))
        target = target_of(
            self.context.facts, context.workload, self.context.calibration, batch=self._batch, task=self.task.name
        )
        trial = target.trial(
            spec=SPEC,
            variant=proposal.label[:_LONGEST],
            x=proposal.share,
            stages=proposal.stages,
            seed=self._seed,
            target=proposal.share if open_budget else None,
            calibrated=open_budget,
            training=proposal.training,
            host=self.host,
        )
        return dataclasses.replace(trial, code=code_of(trial))

    def _context(self, part: int) -> TrialContext:
        """The context of a part; calibration is remembered for all of them together."""
        if part not in self._contexts:
            positions = list(self.parts.all[part])
            self._contexts[part] = dataclasses.replace(
                self.context,
                workload=workload_of(self.context.workload, positions),
                dense=DensePredictions(
                    {name: array[positions] for name, array in self.context.dense.reference.items()},
                    self.context.dense.gmacs,
                ),
            )
        return self._contexts[part]

    def _warm_key(self, proposal: Proposal, part: int) -> str | None:
        """The trial of the earlier run that asked the same of all images; never asked of the confirmation images."""
        if part >= len(self.parts.rungs) or not self._known:
            return None
        return self._known.get(self._trial(proposal, self.context).computation)


class TrialFailed(RuntimeError):
    """A trial that gave no result."""


def _finished(store: Store, digest: str) -> dict[str, str]:
    """Computation -> key of the finished trials of a store on these images."""
    found = {}
    for key in sorted(store.finished(verify=True)):
        row = store.load(key)
        if row is None or row["data_digest"] != digest or not row["trial"]:
            continue
        try:
            trial = trial_from(row["trial"])
        except TrialError:  # of another version: its methods are computed again
            continue
        if trial.key == key and not trial.measure:
            found[trial.computation] = key
    return found


def _only(images: pa.Table, ids: tuple[str, ...]) -> pa.Table:
    """The rows of these images, in their order."""
    place = {name: row for row, name in enumerate(images["image"].to_pylist())}
    return images.take(pa.array([place[name] for name in ids], pa.int64()))
