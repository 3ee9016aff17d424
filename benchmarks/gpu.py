"""The measurements for one large GPU, by one command: the most telling first, and none begun when the time is up."""

from __future__ import annotations

import time
from collections.abc import Sequence

from benchmarks.session import Scenario, Source, run_speed
from benchmarks.speed import Effort

_EFFORT = Effort(rounds=15, warmup=3)

SCENARIOS = (
    Scenario(
        "deit_small_patch16_224", (1, 256, 1024), dtype="bfloat16", reference=True, profiled=True,
        effort=Effort(rounds=15, warmup=3, training_batch=256),
    ),
    Scenario("vit_base_patch16_384", (256,), dtype="bfloat16", reference=True, profiled=True, effort=_EFFORT),
    Scenario("deit_tiny_patch16_224", (256, 1024), dtype="bfloat16", reference=True, effort=_EFFORT),
    Scenario("vit_base_patch16_384", (1024,), dtype="bfloat16", contrast=False, effort=Effort(rounds=7, warmup=2)),
    Scenario("deit_small_patch16_224", (256,), size=384, dtype="bfloat16", effort=_EFFORT),
    Scenario("deit_base_patch16_224", (256,), dtype="bfloat16", effort=_EFFORT),
    Scenario("deit_small_patch16_224", (256,), dtype="float32", contrast=False, effort=Effort(rounds=7, warmup=2)),
)  # fmt: skip


def run(source: Source, *, minutes: float, scenarios: Sequence[Scenario] = SCENARIOS) -> list[Scenario]:
    """Measure one scenario after the other; those for which no time was left."""
    started = time.monotonic()
    for number, scenario in enumerate(scenarios):
        if time.monotonic() - started > 60 * minutes:
            left = list(scenarios[number:])
            source.say(f"{minutes:g} minutes are up; not measured: {', '.join(map(describe, left))}")
            return left
        run_speed(scenario, source)
    return []


def describe(scenario: Scenario) -> str:
    size = "" if scenario.size is None else f" at {scenario.size} px"
    return f"{scenario.model}{size}, {scenario.dtype}, batch {', '.join(map(str, scenario.batches))}"
