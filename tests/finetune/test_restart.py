"""Killed and restarted is ran through, to the last bit; checkpoints that do not fit are refused."""

from __future__ import annotations

import logging
import os
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from ablations.measure.finetune import checkpoint
from ablations.measure.finetune.checkpoint import CheckpointError, OtherTraining
from ablations.measure.finetune.loop import Finetuning
from ablations.measure.finetune.training_state import own_randomness, random_state, set_random_state
from tests.finetune.conftest import CPU, RESTARTED, recipe_of, training

ROOT = Path(__file__).parents[2]
IDENTITY = {"recipe": "restarted"}

# Dies without a word while it writes its fifth checkpoint: after the fourth of six updates, two of three into epoch 2.
_VICTIM = """
import os, signal, sys
from pathlib import Path
import torch
from ablations.measure.finetune import checkpoint
from tests.finetune.conftest import RESTARTED, recipe_of, training
torch.set_num_threads(1)
whole, written = checkpoint.save_file, []
def save_file(tensors, path, metadata):
    written.append(path)
    whole(tensors, path, metadata)
    if len(written) == 5:
        os.truncate(path, os.path.getsize(path) // 2)
        os.kill(os.getpid(), signal.SIGKILL)
checkpoint.save_file = save_file
cache, path = map(Path, sys.argv[1:])
training(cache, recipe_of(**RESTARTED)).run(path=path, identity={"recipe": "restarted"}, every=0)
"""


def equal(found: Any, wanted: Any) -> bool:
    """The same to the last bit, in nested data."""
    if isinstance(wanted, torch.Tensor):
        return torch.equal(found, wanted)
    if isinstance(wanted, np.ndarray):
        return np.array_equal(found, wanted)
    if isinstance(wanted, dict):
        return set(found) == set(wanted) and all(equal(found[key], wanted[key]) for key in wanted)
    if isinstance(wanted, list | tuple):
        return len(found) == len(wanted) and all(map(equal, found, wanted))
    return bool(found == wanted)


def lasting(state: dict[str, Any]) -> dict[str, Any]:
    """A state without the times in it."""
    curve = [{k: v for k, v in row.items() if k not in ("seconds", "eta")} for row in state["curve"]]
    return {**state, "seconds": 0.0, "curve": curve}


@pytest.mark.slow
def test_a_training_killed_in_the_middle_of_an_epoch_ends_as_if_it_had_run_through(cache: Path, tmp_path: Path) -> None:
    through = training(cache, recipe_of(**RESTARTED))
    initial = {name: tensor.clone() for name, tensor in through.model.state_dict().items()}
    through.run()
    path = tmp_path / "training.checkpoint"
    process = subprocess.run(
        [sys.executable, "-c", _VICTIM, str(cache), str(path)],
        cwd=ROOT, env={**os.environ, "OMP_NUM_THREADS": "1"}, capture_output=True, text=True, timeout=120, check=False,
    )  # fmt: skip
    assert process.returncode == -signal.SIGKILL, process.stderr
    saved = checkpoint.load(path, identity=IDENTITY)
    assert saved is not None
    assert saved["update"] == 4 and through.per_epoch == 3  # in the middle of the second epoch
    again = training(cache, recipe_of(**RESTARTED))
    torch.manual_seed(99)  # whatever the new process did before
    np.random.seed(99)
    again.run(path=path, identity=IDENTITY, every=0)
    assert again.update == through.update == 6
    assert not torch.equal(through.model.state_dict()["base.head.weight"], initial["base.head.weight"])
    # the generators are put back after a run, so the last checkpoint is what shows where they were
    last = checkpoint.load(path, identity=IDENTITY)
    assert last is not None
    wanted = {name: value for name, value in lasting(through.state()).items() if name != "random"}
    assert equal({name: value for name, value in lasting(last).items() if name != "random"}, wanted)
    for found, target in zip(again.trained(), through.trained(), strict=True):
        assert equal(found, target)


def test_restoring_a_state_restores_every_generator(cache: Path, tmp_path: Path) -> None:
    path = tmp_path / "a"
    first = training(cache, recipe_of())
    with own_randomness(3, CPU):
        checkpoint.save(path, identity={}, state={"random": random_state(CPU)})
        drawn = torch.rand(3), np.random.rand(3)
    state = checkpoint.load(path, identity={})
    assert state is not None
    before = torch.get_rng_state()
    with own_randomness(4, CPU):
        set_random_state(state["random"], CPU)
        assert torch.equal(torch.rand(3), drawn[0]) and np.array_equal(np.random.rand(3), drawn[1])
    assert torch.equal(torch.get_rng_state(), before)
    assert first.update == 0


def test_a_training_leaves_the_callers_random_numbers_alone(cache: Path) -> None:
    torch.manual_seed(5)
    before = torch.get_rng_state()
    training(cache, recipe_of(mixup=0.5)).run()
    assert torch.equal(torch.get_rng_state(), before)


@pytest.mark.parametrize("damage", ["short", "text", "empty", "header"])
def test_a_damaged_checkpoint_is_reported_and_the_training_starts_afresh(
    damage: str, cache: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    path = tmp_path / "training.checkpoint"
    recipe = recipe_of(images=8)
    first = training(cache, recipe)
    first.run(path=path, identity=IDENTITY)
    content = path.read_bytes()
    path.write_bytes(
        {"short": content[: len(content) // 2], "text": b"not a checkpoint", "empty": b"", "header": content[8:]}[
            damage
        ]
    )
    again = training(cache, recipe)
    with caplog.at_level(logging.WARNING):
        again.run(path=path, identity=IDENTITY)
    assert "no whole checkpoint" in caplog.text and "starts afresh" in caplog.text
    assert equal(again.trained(), first.trained())


def test_a_checkpoint_of_another_training_is_refused_with_the_difference(cache: Path, tmp_path: Path) -> None:
    path = tmp_path / "training.checkpoint"
    training(cache, recipe_of(images=8)).run(path=path, identity={"recipe": {"lr": 0.1, "seed": 0}})
    with pytest.raises(OtherTraining, match=r"recipe\.lr 0\.1 instead of 0\.2"):
        training(cache, recipe_of(images=8)).run(path=path, identity={"recipe": {"lr": 0.2, "seed": 0}})
    with pytest.raises(CheckpointError, match="another training"):
        checkpoint.load(path, identity={})


def test_a_missing_checkpoint_is_none(tmp_path: Path) -> None:
    assert checkpoint.load(tmp_path / "none", identity={}) is None


def test_a_checkpoint_holds_nested_plain_values_exactly_and_refuses_anything_else(tmp_path: Path) -> None:
    state = {"a": (1, [2.5, None, True], {"x": 1e-300, 3: "y"}), "t": {0: torch.arange(3)}, "n": np.float64(0.1)}
    checkpoint.save(tmp_path / "a", identity={}, state=state)
    loaded = checkpoint.load(tmp_path / "a", identity={})
    assert loaded is not None
    assert loaded["a"] == state["a"] and torch.equal(loaded["t"][0], torch.arange(3)) and loaded["n"] == 0.1
    with pytest.raises(TypeError, match="cannot hold"):
        checkpoint.save(tmp_path / "b", identity={}, state={"model": Finetuning})
    assert not (tmp_path / "b").exists()
