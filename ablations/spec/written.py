"""The arms of a shipped spec as plain data, for commands that run where torch and timm are all there is.

``spec`` validates every key and spans all combinations; here an arm is read as it is written, with the first of each
list of values. The shipped specs are validated by the tests.
"""

from __future__ import annotations

import functools
from dataclasses import dataclass
from fractions import Fraction
from typing import Any

from ablations.spec.arms import SPECS, combinations, merged
from ablations.spec.plain_yaml import parse_yaml, substitute
from ablations.trial.free_settings import AUTO, Setting, budgets_in, filled
from reducers import available

TRAINED = "trained_methods"  # the spec that says how each method is trained here
_USUAL: dict[str, Setting] = {
    "count": 108,
    "ratio": Fraction("0.7"),
    "drop": 13,
}  # where a budget is sought: what a reader knows from the papers


@dataclass(frozen=True)
class WrittenArm:
    """One curve of a spec at its first values."""

    variant: str
    stages: list[dict[str, Any]]
    training: dict[str, Any] | None
    target: float | None  # share of the dense model's multiply-adds, where a budget is sought

    def names(self) -> set[str]:
        """The methods that reduce."""
        return {str(part["name"]) for stage in self.stages for part in stage["stack"]}

    def trains(self) -> set[str]:
        """The methods that are active in training."""
        stages = (self.training or {}).get("stages", [])
        return {str(part["name"]) for stage in stages for part in stage["stack"]}


@functools.lru_cache(maxsize=8)
def written_arms(spec: str) -> tuple[WrittenArm, ...]:
    """The arms of a shipped spec, in its order."""
    path = SPECS / f"{spec}.yaml"
    _, data = parse_yaml(path.read_text(encoding="utf-8"), path)
    return tuple(_first(merged(data.get("base", {}), arm)) for arm in data["arms"])


def _first(arm: dict[str, Any]) -> WrittenArm:
    values = next(combinations(arm))
    return WrittenArm(
        variant=str(substitute(arm["variant"], values)),
        stages=substitute(arm["stages"], values),
        training=substitute(arm.get("training"), values),
        target=values.get("target"),
    )


def example_stages(name: str) -> list[dict[str, Any]]:
    """Where and how a method is used, as people would write it: from the shipped specs, else at three blocks, or of
    clips at the first.

    A budget that is sought there stands at a usual value.
    """
    for spec in ("methods", TRAINED):
        for arm in written_arms(spec):
            if arm.names() == {name}:
                return usual(arm.stages)
    method = available()[name]
    needs = {parameter.name: parameter for parameter in method.settings()}
    budget = needs.get("budget")
    asks = budget is not None and budget.default is budget.empty
    at: Any = {"thirds": True} if "images" in method.traits.inputs else 0  # clips alone: as they enter
    return [{"at": at, "stack": [{"name": name, **({"budget": {"ratio": 0.7}} if asks else {})}]}]


def usual(stages: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """The stages with a usual number wherever a budget is sought."""
    chosen: list[dict[str, Any]] = filled(stages, _USUAL)
    assert all(AUTO not in budget.values() for budget in budgets_in(chosen))
    return chosen
