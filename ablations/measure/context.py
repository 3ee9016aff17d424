"""What trials are evaluated with: images, a model, and what the plain model says of the images.

Costly to make and never changing a result: opened once by a worker for each model, shared by all of its trials.
"""

from __future__ import annotations

import importlib.metadata
import platform
from collections.abc import Callable, Iterator, Mapping, MutableMapping
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from ablations.measure.failures import halving
from ablations.measure.metrics import GIGA, finite, motion_of, of_views, patch_masks
from ablations.measure.profile import Profile
from ablations.precision import Arithmetic
from ablations.tasks import Task, task_of
from ablations.trial.code import code_of
from ablations.trial.trial import CLASSIFY, ModelFacts, Trial, TrialError
from ablations.workloads.base import Workload
from ablations.workloads.reading import ImageSource
from reducers import Placement, Shared, reduce_tokens
from reducers.hosts import host_of

_VERSIONED = ("torch", "timm", "numpy")


def _unwatched() -> None:
    """What nobody watches over need not say that it lives."""


@dataclass(frozen=True, eq=False)
class DensePredictions:
    """What is kept of the plain model's answer to every image, and what it costs."""

    reference: Mapping[str, np.ndarray]  # (n, …), by the names in the task's ``kept``
    gmacs: float  # billions of multiply-adds per image; of a clip, all its views together
    fitted: Mapping[str, np.ndarray] = field(default_factory=dict)  # of no image, by the names in its ``fitted``

    def of(self, start: int, stop: int) -> dict[str, np.ndarray]:
        """The reference of the images ``start`` … ``stop - 1``, and what was fitted."""
        return {**{name: array[start:stop] for name, array in self.reference.items()}, **self.fitted}

    @property
    def classifies(self) -> bool:
        """Whether the plain model was asked for classes."""
        return "prediction" in self.reference

    @property
    def top1(self) -> float:
        """Its accuracy, where it was asked for classes."""
        return float(self.reference["correct"].mean())

    def __len__(self) -> int:
        return len(next(iter(self.reference.values())))


@dataclass(frozen=True, eq=False)
class TrialContext:
    """Caches that never change a result: made once for each model, shared by all trials of a worker."""

    workload: Workload  # the evaluated images
    model: nn.Module  # a plain timm model, in eval mode and on ``device``
    facts: ModelFacts
    dense: DensePredictions  # of the evaluated images
    device: torch.device
    task: Task = field(default_factory=lambda: task_of(CLASSIFY))  # what is asked of the model
    calibration: Workload | None = None  # the images that settings are sought on; none of them is evaluated
    probes: MutableMapping[Any, float] = field(default_factory=dict)  # (family, setting) -> mean GMACs there
    source: ImageSource = field(default_factory=ImageSource)  # where images come from: finetuning starts there
    cache: Path | None = None  # OUT/cache: what is costly to make, shared by the workers of a run
    profile: Profile = field(default_factory=Profile)
    beat: Callable[[], None] = _unwatched  # called at every sign of progress: see ``run.ray.watchdog``
    arithmetic: Arithmetic | None = None  # what a training computes in, as its record has it; None: found out
    # the calibration images on the device, batch by batch, with what the plain model computes of each
    calibration_batches: list[tuple[Tensor, Shared]] = field(default_factory=list, init=False, repr=False)

    @cached_property
    def targets(self) -> np.ndarray:
        """(n, …) int64: what the task holds answers against."""
        return self.task.targets(self.workload, self.facts.map_grid or self.facts.grid)

    @cached_property
    def object_patches(self) -> np.ndarray | None:
        """(n, N0) bool: patches that hold at least one pixel of the object, or None where no mask is known."""
        return None if self.workload.masks is None else patch_masks(self.workload.masks, self.facts.grid)

    @cached_property
    def motion(self) -> np.ndarray | None:
        """(n, frames of all views) how much moves in each frame of each clip; None where there are images."""
        return None if self.workload.frames is None else motion_of(self.workload.pixels, self.workload.views)


def model_facts(model: nn.Module, *, name: str, weights: str, digest: str, params_m: float) -> ModelFacts:
    """Read what a plan needs off a vision transformer.

    Raises:
        UnsupportedModel: no host drives it.
    """
    host = host_of(model)
    return ModelFacts(
        name=name,
        weights=weights,
        weights_digest=digest,
        params_m=params_m,
        depth=host.depth,
        patches=host.patches,
        grid=host.grid,
        width=host.width,
        classes=host.classes,
        class_token=host.has_class_token,
        first_free=host.first_free,
        map_grid=None if host.map_grid == host.grid else host.map_grid,
        closed=tuple(sorted(host.closed)),
        windows=host.regroups,
        options=dict(host.options),
        units=host.units,
    )


def spans(images: int, batch: int) -> Iterator[tuple[int, int]]:
    """The (start, stop) of each batch."""
    return ((start, min(start + batch, images)) for start in range(0, images, batch))


def versions() -> dict[str, str]:
    """The versions that a number may depend on."""
    known = {"python": platform.python_version()}
    for package in _VERSIONED:
        known[package] = importlib.metadata.version(package)
    return known


def device_name(device: torch.device) -> str:
    """The device in words, threads included, e.g. ``cpu (1 thread)``."""
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    threads = torch.get_num_threads()
    return f"{device.type} ({threads} thread{'s' if threads > 1 else ''})"


def use_exact_float32() -> None:
    """Full float32 on a GPU as well: its shortcut to 19 bits (TF32) would change which tokens are chosen."""
    torch.backends.cuda.matmul.allow_tf32 = False
    torch.backends.cudnn.allow_tf32 = False


@torch.inference_mode()
def dense_predictions(
    model: nn.Module, workload: Workload, *, batch: int, device: torch.device, task: Task | None = None
) -> DensePredictions:
    """Ask the plain model about all images (``task`` None: their classes). Its cost is counted by the same rules as a
    reduced model's.

    Where the GPU's memory runs out, with half as many images at once, down to one.
    """
    use_exact_float32()
    asked = task or task_of(CLASSIFY)
    fitted = asked.fit(model, workload, batch=batch, device=device)
    targets = asked.targets(workload, host_of(model).map_grid)

    def answer(start: int, stop: int) -> dict[str, np.ndarray]:
        said = of_views(asked.ask(model, workload.batch(start, stop).to(device)), workload.views)
        found = finite(said, start, what=asked.answers)
        return asked.keep(found, labels=targets[start:stop], fitted=fitted)

    found = halving(
        lambda at_once: [answer(*span) for span in spans(len(workload), at_once)],
        at_once=batch,
        what="the plain model is run",
    )
    _, trace = reduce_tokens(model, Placement()).eval().trace(workload.batch(0, 1).to(device))
    reference = {name: np.concatenate([each[name] for each in found]) for name in asked.kept}
    return DensePredictions(reference, float(trace.macs.sum()) / GIGA, fitted)


def check_inputs(trial: Trial, context: TrialContext) -> None:
    """The context must hold what the trial was planned with: a key names its inputs."""
    inputs = [
        ("task", trial.task, context.task.name),
        ("data", trial.data_digest, context.workload.digest),
        ("weights", trial.weights_digest, context.facts.weights_digest),
        ("code", trial.code, code_of(trial) if trial.code else ""),
    ]
    if trial.target is not None or trial.calibration:
        if context.calibration is None:
            raise TrialError("a trial with a target needs calibration images, and its context has none")
        inputs.append(("calibration images", trial.calibration, context.calibration.digest))
    for name, planned, present in inputs:
        if planned != present:
            raise TrialError(
                f"the {name} changed after the trial was planned ({_brief(present)} instead of "
                f"{_brief(planned)}); run `sievit run` again to plan with what is there now"
            )


def _brief(digest: str) -> str:
    return digest if "=" in digest else f"digest {digest[:12]}"
