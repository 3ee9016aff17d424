"""The measurements for one large GPU, by one command: the most telling first, and none begun when the time is up."""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import replace

import torch

from ablations.precision import half_of
from benchmarks.session import Kept, Scenario, Source, run_speed, table_of
from benchmarks.speed import Effort

MINUTES = 4.0  # after which nothing is begun: what runs then ends within the fifth
HALF = "half"  # what the device has: bfloat16, float16 of older cards
TOY = "test_vit"  # timm's own: six blocks, 64 wide

_EFFORT = Effort(rounds=15, warmup=3)

SCENARIOS = (
    Scenario(
        "deit_small_patch16_224", (256,), dtype=HALF, lineup="telling", profiled=True,
        effort=Effort(rounds=15, warmup=3, training_batch=256),
    ),
    Scenario("deit_small_patch16_224", (1, 1024), dtype=HALF, lineup="telling", effort=_EFFORT),
    Scenario("vit_base_patch16_384", (256,), dtype=HALF, lineup="telling", profiled=True, effort=_EFFORT),
    Scenario("deit_small_patch16_224", (256,), dtype=HALF, lineup="compiled", compiler="inductor", effort=_EFFORT),
)  # fmt: skip
"""The most telling first; a compiler takes longest, so it comes last."""


def run(source: Source, *, minutes: float = MINUTES, scenarios: Sequence[Scenario] = SCENARIOS) -> list[Scenario]:
    """Measure one scenario after the other; those for which no time was left.

    Scenarios of one model, size and precision fill one table, which is written anew after each of them.
    """
    source = replace(source, until=time.monotonic() + 60 * minutes)
    tables: dict[str, Kept] = {}
    for number, scenario in enumerate(scenarios):
        if time.monotonic() > source.until:
            left = list(scenarios[number:])
            source.say(f"{minutes:g} minutes are up; not measured: {', '.join(map(describe, left))}")
            return left
        chosen = replace(scenario, dtype=half_of(source.device)) if scenario.dtype == HALF else scenario
        run_speed(chosen, source, tables.setdefault(table_of(chosen, chosen.size), Kept()))
    return []


def toy(scenarios: Sequence[Scenario] = SCENARIOS, *, precision: str = "bfloat16") -> list[Scenario]:
    """The same at toy size, once, to see whether everything runs: on any device, its times meaning nothing."""
    effort = Effort(rounds=1, warmup=1)
    return [
        replace(
            scenario, model=TOY, size=64 if scenario.model.endswith("384") else 32, dtype=precision,
            batches=tuple(min(batch, 2 + batch // 1024) for batch in scenario.batches),
            effort=replace(effort, training_batch=None if scenario.effort.training_batch is None else 2),
            compiler=None if scenario.compiler is None else "aot_eager",
        )
        for scenario in scenarios
    ]  # fmt: skip


def describe(scenario: Scenario) -> str:
    size = "" if scenario.size is None else f" at {scenario.size} px"
    compiled = "" if scenario.compiler is None else ", compiled"
    return f"{scenario.model}{size}, {scenario.dtype}, batch {', '.join(map(str, scenario.batches))}{compiled}"


def device_line(device: torch.device) -> str:
    """What is measured on, before anything is."""
    name = torch.cuda.get_device_name(device) if device.type == "cuda" else device.type
    return f"on {name}, in {half_of(device)}"
