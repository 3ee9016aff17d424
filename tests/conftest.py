"""What every test starts from: fixed random numbers, no network, no display."""

from __future__ import annotations

import os

os.environ["HF_HUB_OFFLINE"] = "1"  # read when huggingface_hub is imported: no test may download anything
os.environ["MPLBACKEND"] = "Agg"

import numpy as np
import pytest
import torch


@pytest.fixture(autouse=True)
def fixed_random_numbers() -> None:
    """Each test draws the same numbers, alone or among others."""
    torch.manual_seed(0)
    np.random.seed(0)


@pytest.fixture
def few_scenes(monkeypatch: pytest.MonkeyPatch) -> None:
    """Draw 16 training scenes instead of the thousands of a real run."""
    from ablations.workloads import training as sources

    fields = sources.TrainingAccess.__init__.__defaults__
    assert fields is not None and sources.SCENES in fields
    fewer = tuple(16 if value == sources.SCENES else value for value in fields)
    monkeypatch.setattr(sources.TrainingAccess.__init__, "__defaults__", fewer)
