"""Tiny but real: the embedded scenes, a small timm ViT with random weights, and specs of a few trials."""

from __future__ import annotations

import signal
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import torch

from ablations.cli.main import main
from ablations.measure.context import model_facts
from ablations.trial.target import Target
from ablations.trial.trial import ModelFacts
from ablations.workloads import open_model
from tests.ablations.runs import SPEC, TINY, end_launched


@pytest.fixture(autouse=True, scope="session")
def _single_thread() -> Iterator[None]:
    """Serial runs compute with one thread, as workers do: what they find is then equal to the last bit."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture(scope="session")
def facts() -> ModelFacts:
    """What is known of the narrow embedded model: 12 blocks, 64 patches."""
    loaded = open_model("digits_vit_tiny", weights="random", workload_name="embedded")
    return model_facts(
        loaded.model, name="digits_vit_tiny", weights="random", digest=loaded.digest, params_m=loaded.params_m
    )


@pytest.fixture(scope="session")
def target(facts: ModelFacts) -> Target:
    return Target(facts, "embedded", "d" * 64, 10, 4)


@pytest.fixture
def spec_path(tmp_path: Path) -> Path:
    """A spec of four trials in a file."""
    path = tmp_path / "tiny.yaml"
    path.write_text(SPEC)
    return path


@pytest.fixture
def ablate(tmp_path: Path) -> Iterator[Callable[..., int]]:
    """Run a command line in this process: the exit status. ``run`` is serial, tiny, and writes to tmp_path/out."""
    before = signal.getsignal(signal.SIGTERM)

    def call(*arguments: str | Path) -> int:
        words = [str(argument) for argument in arguments]
        if words[0] == "run":
            words = ["run", "--serial", "--out", str(tmp_path / "out"), *TINY, *words[1:]]
        return main(words)

    yield call
    signal.signal(signal.SIGTERM, before)


@pytest.fixture(autouse=True)
def _no_run_outlives_its_test() -> Iterator[None]:
    yield
    end_launched()
