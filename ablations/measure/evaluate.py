"""Evaluate trials: a pure function from (trials, context) to results.

No Ray and no global state: what is costly to make and never changes a result stands in the context. Trials that leave
the first blocks alone share what the plain model computes there, bit for bit what each would compute alone. Speed is
not measured here (see ``speed``): trials may share their machine.
"""

from __future__ import annotations

import dataclasses
import json
import logging
import time
import traceback
from collections.abc import Callable, Sequence
from functools import partial
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor

from ablations.measure.context import (
    TrialContext,
    check_inputs,
    device_name,
    spans,
    use_exact_float32,
    versions,
)
from ablations.measure.failures import DeviceError, again, device_lost, in_words
from ablations.measure.metrics import batch_columns, finite, image_columns, of_views, summary
from ablations.records.columns import TRAINED
from ablations.trial.trial import Solution, Trial, TrialError, TrialResult, base_row, failed, trained_together
from reducers import Identity, at, reduce_tokens
from reducers.runtime import ReducedViT, Shared

if TYPE_CHECKING:
    from ablations.measure.finetune import Finetuned

log = logging.getLogger(__name__)

Report = Callable[[dict[str, Any]], None]
"""Takes what a long step tells of its progress, such as an epoch of finetuning."""


def run_group(trials: Sequence[Trial], context: TrialContext, *, report: Report | None = None) -> list[TrialResult]:
    """Evaluate trials of one model and one training together, in float32; their results in the order given.

    Each result is what the trial gives alone, to the last bit. Whatever goes wrong with a trial becomes its record:
    the others go on. What may pass is tried once more, and where a GPU's memory runs out, with half as many images at
    once; the row says with how many. ``report`` hears of the epochs of a finetuning.

    Raises:
        DeviceError: the GPU takes no more work from this process.
    """
    runs = _evaluate(trials, context, report)
    return [_settled(run, context, alone=len(runs) == 1) for run in runs]


def _settled(run: _Run, context: TrialContext, *, alone: bool) -> TrialResult:
    """The result of a run, begun again as long as that may help; or the record of its failure."""
    while run.error is not None:
        if device_lost(run.error):
            raise DeviceError(f"the GPU takes no more work from this process ({run.error})") from run.error
        at_once = again(run.error, alone=alone, attempts=run.attempts, at_once=run.at_once) if run.begun else None
        if at_once is None:
            return failed(
                run.trial,
                context.facts,
                in_words(run.error, at_once=run.at_once if run.begun else None),
                seconds=run.seconds,
            )
        log.info("trial %s is begun again, %d images at once: %s", run.trial.key, at_once, run.error)
        if context.device.type == "cuda":
            torch.cuda.empty_cache()
        attempts, alone = run.attempts + 1, True
        (run,) = _evaluate([run.trial], context, None, at_once=at_once)
        run.attempts = attempts
    return run.result(context)


def run_trial(trial: Trial, context: TrialContext) -> TrialResult:
    """Evaluate a trial on every image of the workload, in float32. The same trial gives the same result anywhere."""
    (run,) = _evaluate([trial], context, None)
    if run.error is not None:
        raise run.error
    return run.result(context)


def try_trial(trial: Trial, context: TrialContext) -> TrialResult:
    """``run_trial``, with whatever goes wrong turned into a record."""
    return run_group([trial], context)[0]


class _Run:
    """One trial on its way through the batches."""

    def __init__(self, trial: Trial, *, at_once: int) -> None:
        self.trial = trial
        self.at_once = at_once  # images in a batch; fewer than planned where the GPU's memory ran out
        self.attempts = 1
        self.begun = False  # it has its weights: what goes wrong from here on is its own
        self.tuned: Finetuned | None = None  # its weights, where they are not the model's own
        self.seconds = 0.0  # its own, and an equal share of what it has in common with others
        self.error: Exception | None = None
        self.shares = False
        self.solution: Solution | None = None  # of the calibration, where there is one
        self._batches: list[dict[str, np.ndarray]] = []

    def attempt(self, step: Callable[[], None]) -> None:
        """One step of the trial, timed; whatever it raises ends this trial alone."""
        started = time.perf_counter()
        try:
            step()
        except Exception as error:  # any failure at all is a result to record, with its reason
            self.error, self._batches = error, []
            log.info("trial %s failed", self.trial.key, exc_info=error)  # into the log of the trial
            traceback.clear_frames(error.__traceback__)  # they hold tensors, and memory may be what is short
        self.seconds += time.perf_counter() - started

    def prepare(self, context: TrialContext) -> None:
        """Check the inputs, find the settings that are still free, and place the reducers."""
        trial, self.begun = self.trial, True
        context.beat()
        check_inputs(trial, context)
        placed = self._calibrated(context) if trial.target is not None else trial
        torch.manual_seed(placed.random_seed)  # from here on the trial alone draws, whatever its calibration had to try
        placement = placed.stages.placement(context.facts.depth)
        if self.tuned is not None:
            placement = self.tuned.load_reducers(placement)
        self.fast: ReducedViT = reduce_tokens(context.model, placement, host=trial.host.data).to(context.device).eval()
        self._random = _random_state(context.device)

    def _calibrated(self, context: TrialContext) -> Trial:
        from ablations.measure.calibrate import (
            solve,  # it looks at costs in a context, as this module looks at predictions
        )

        with context.profile.measure("calibration"):
            self.solution = solve(self.trial, context, load=None if self.tuned is None else self.tuned.load_reducers)
        return self.trial.resolved(self.solution.stages)

    @property
    def can_share(self) -> bool:
        """Something is computed as the plain model does, and nothing looks at the images in its own way first."""
        own_way = any(member.steps.looks_first for member in self.fast.members())
        return self.fast.first_block > 0 and not own_way

    def batch(self, images: Tensor, span: tuple[int, int], context: TrialContext, shared: Shared | None) -> None:
        """Evaluate one batch, with the random numbers that the trial would draw alone."""
        context.beat()
        _set_random_state(self._random, context.device)
        with context.profile.measure("evaluation"):
            known = shared if self.shares else None
            answer, trace = context.task.trace(self.fast, images, known, restore=self.trial.restore)
            answer = finite(of_views(answer, context.workload.views), span[0], what=context.task.answers)
        self._random = _random_state(context.device)
        with context.profile.measure("bookkeeping"):
            labels, reference = context.targets[slice(*span)], context.dense.of(*span)
            own = context.task.columns(answer, labels=labels, reference=reference)
            self._batches.append(
                {**own, **batch_columns(trace, depth=context.facts.depth, views=context.workload.views)}
            )

    def result(self, context: TrialContext) -> TrialResult:
        """The finished result."""
        workload, dense, started = context.workload, context.dense, time.perf_counter()
        images = image_columns(
            self._batches,
            ids=workload.ids,
            objects=context.object_patches,
            clutter=workload.clutter,
            motion=context.motion,
        )
        row = {
            **base_row(self.trial, context.facts, self.solution),
            **context.task.metrics(images),
            **context.task.of_plain(dense.reference),
            **summary(images),
        }
        row["attention"] = "mask"  # in float32, as everything is evaluated in
        if self.tuned is not None:
            row.update({name: self.tuned.record[name] for name in ("training", *TRAINED)})
        if self.solution is not None and context.calibration is not None:
            row["calibration_images"] = len(context.calibration)
        if not context.facts.class_token:
            row["class_kept"] = None
        if context.task.restores:
            row["restore"] = self.trial.restore
        took = time.perf_counter() - started
        context.profile.add("bookkeeping", took)
        row.update(
            status="ok",
            dense_gmacs=dense.gmacs,
            views=workload.views if workload.frames is not None else None,
            shared_prefix=self.shares,
            evaluated_batch=self.at_once,
            attempts=self.attempts,
            seconds=self.seconds + took,
            device=device_name(context.device),
            versions=json.dumps(versions(), sort_keys=True),
        )
        return TrialResult(row, {name: value for name, value in images.items() if not name.startswith("_")})


def _evaluate(
    trials: Sequence[Trial], context: TrialContext, report: Report | None, *, at_once: int | None = None
) -> list[_Run]:
    """All trials, batch by batch, each up to its end or its own failure; ``at_once`` images instead of the planned."""
    if len({trained_together(trial) for trial in trials}) != 1:
        raise ValueError("trials that are evaluated together have one model, one training and one batch size")
    use_exact_float32()
    at_once = at_once or trials[0].batch
    runs = [_Run(trial, at_once=at_once) for trial in trials]
    try:
        context = _finetuned(runs, context, report)
    except Exception as error:  # noqa: BLE001  # without its weights no trial of the group can run
        for run in runs:
            run.error = error
        return runs
    for run in runs:
        run.attempt(partial(run.prepare, context))
    alive = sorted((run for run in runs if run.error is None), key=lambda run: run.fast.first_block)
    sharing = [run for run in alive if run.can_share]
    for run in sharing:
        run.shares = len(sharing) > 1
    prefixes = _prefixes(sharing, context) if len(sharing) > 1 else {}
    for span in spans(len(context.workload), at_once):
        _evaluate_batch(alive, span, prefixes, context)
    return runs


def _finetuned(runs: Sequence[_Run], context: TrialContext, report: Report | None) -> TrialContext:
    """The context with the weights that the trials are evaluated with."""
    training, host = runs[0].trial.training, runs[0].trial.host
    if not training:
        return context
    from ablations.measure.finetune import finetuned  # most runs need none of it

    check_inputs(runs[0].trial, context)  # before hours of training
    if not context.task.needs_labels:
        raise TrialError(f"finetuning reads labels, and the task {context.task.name} knows none")
    with context.profile.measure("finetuning"):
        tuned = finetuned(training, context, report=report, host=host)
    for run in runs:
        run.tuned = tuned
    return dataclasses.replace(context, model=tuned.model)


@torch.inference_mode()
def _evaluate_batch(
    runs: Sequence[_Run], span: tuple[int, int], prefixes: dict[int, ReducedViT], context: TrialContext
) -> None:
    alive = [run for run in runs if run.error is None]
    if not alive:
        return
    with context.profile.measure("images"):
        started = time.perf_counter()
        try:
            images = context.workload.batch(*span).to(context.device)
        except Exception as error:  # noqa: BLE001  # none of them has its images: a result to record, for each
            for run in alive:
                run.error = error
            return
        each = (time.perf_counter() - started) / len(alive)
    for run in alive:
        run.seconds += each
    shared = Shared() if prefixes else None
    if shared is not None:
        _share(alive, images, shared, prefixes, context)
    for run in alive:
        run.attempt(partial(run.batch, images, span, context, shared))


def _prefixes(sharing: Sequence[_Run], context: TrialContext) -> dict[int, ReducedViT]:
    """For each block at which some trial begins to reduce: the plain model up to there."""
    blocks = sorted({run.fast.first_block for run in sharing} - {context.facts.depth})
    return {block: reduce_tokens(context.model, at(block, Identity())).eval() for block in blocks}


def _share(
    runs: Sequence[_Run], images: Tensor, shared: Shared, prefixes: dict[int, ReducedViT], context: TrialContext
) -> None:
    """Compute what trials have in common before any of them, so that its time can be told and divided."""
    for block, prefix in prefixes.items():
        those = [run for run in runs if run.shares and run.fast.first_block >= block]
        if not those:
            return
        with context.profile.measure("prefix"):
            started = time.perf_counter()
            try:
                prefix.cost(images, shared=shared)
            except Exception as error:  # noqa: BLE001  # each trial will find out for itself, and say so in its record
                log.debug("the shared blocks failed: %s", error)
                return
            if context.device.type == "cuda":
                torch.cuda.synchronize(context.device)
            for run in those:
                run.seconds += (time.perf_counter() - started) / len(those)


def _random_state(device: torch.device) -> tuple[Tensor, ...]:
    """Where the global random numbers are: those of the CPU, and of the GPU if that is the device."""
    return (torch.get_rng_state(), *([torch.cuda.get_rng_state(device)] if device.type == "cuda" else []))


def _set_random_state(state: tuple[Tensor, ...], device: torch.device) -> None:
    torch.set_rng_state(state[0])
    if device.type == "cuda":
        torch.cuda.set_rng_state(state[1], device)
