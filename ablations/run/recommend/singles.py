"""The published methods, each alone at its own placement: the arms of the spec ``methods``, brought to one cost."""

from __future__ import annotations

import logging
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from functools import partial
from typing import Any

from torch import nn

from ablations.spec.expand import expand
from ablations.spec.model import SpecFile, find_specs
from ablations.spec.plain_yaml import SpecError
from ablations.trial.free_settings import free_kinds
from ablations.trial.stages import AS_USUAL, HostOptions, Stages
from ablations.trial.target import Target
from reducers import available, reduce_tokens
from reducers.candidates import why_no_candidate

log = logging.getLogger(__name__)

METHODS = "methods"  # the spec
BESIDE = ("random", "small_input")  # controls that are looked at beside the finalists


@dataclass(frozen=True)
class Single:
    """A method at its own placement, its budget open."""

    label: str
    stages: Stages
    control: bool = False  # no method: what every method must beat


def singles(target: Target, model: nn.Module, share: float, *, host: HostOptions = AS_USUAL) -> list[Single]:
    """Every method of the spec that this model, so driven, takes and that can be brought to a share of the dense
    model's cost.
    """
    (file,) = find_specs([METHODS])
    found: dict[Stages, Single] = {}
    for alone in _arms(file, share):
        try:
            trials = expand(alone, target, check=partial(reduce_tokens, model, host=host.data))
        except SpecError as error:  # this model does not take it
            log.debug("left out: %s", error)
            continue
        for trial in trials:
            names = list(_names(trial.stages.data))
            control = any(name in BESIDE for name in names)
            compared = control or not any(why_no_candidate(available()[name]) for name in names)
            if compared and free_kinds(trial.stages.data):
                found.setdefault(trial.stages, Single(trial.variant, trial.stages, control))
    return list(found.values())


def _arms(file: SpecFile, share: float) -> Iterator[SpecFile]:
    """A spec for each arm that seeks a cost, with this one alone."""
    base = file.spec.base
    for arm in file.spec.arms:
        told = arm.target if "target" in arm.model_fields_set else base.target
        if told:
            alone = arm.model_copy(update={"target": [share]})
            yield SpecFile(file.spec.model_copy(update={"arms": [alone]}), file.path)


def _names(data: Any) -> Iterator[str]:
    if isinstance(data, Mapping):
        if isinstance(data.get("name"), str):
            yield data["name"]
        for part in data.values():
            yield from _names(part)
    elif isinstance(data, tuple | list):
        for part in data:
            yield from _names(part)
