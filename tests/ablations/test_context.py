"""What the driver writes for its workers: opened as it was, and made again where a disk has spoilt it."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch

from ablations.run.contexts import context_files, load_context, make_context, save_context
from ablations.run.session import Session, Settings, open_session

CPU = torch.device("cpu")
NAME = "pairs_vit_tiny"


@pytest.fixture
def session(spec_path: Path, tmp_path: Path) -> Session:
    return open_session(Settings(out=tmp_path / "out", model=NAME, limit=10, batch=4, specs=(str(spec_path),)))


def spoil(path: Path) -> None:
    """Zeros in place of its second half."""
    size = path.stat().st_size
    with path.open("r+b") as file:
        file.seek(size // 2)
        file.write(bytes(size - size // 2))


@pytest.mark.parametrize("name", ["pixels", "weights"])
def test_a_worker_opens_what_the_driver_has_and_a_spoilt_file_is_written_again(name: str, session: Session) -> None:
    """The weights too are a file of the run: no node needs to reach the hub they came from."""
    made = make_context(session, CPU)
    saved = save_context(session, NAME)
    file = next(path for path in context_files(saved) if name in path.name)
    before = file.read_bytes()
    spoil(file)
    assert save_context(session, NAME) == saved and file.read_bytes() == before
    opened = load_context(saved, CPU)
    assert opened.facts == made.facts and opened.workload.digest == made.workload.digest
    np.testing.assert_array_equal(opened.workload.pixels, made.workload.pixels)
    assert json.loads(saved.read_text())["weights"].endswith(".safetensors")
    for key, tensor in made.model.state_dict().items():
        assert torch.equal(tensor, opened.model.state_dict()[key])


def test_a_file_that_is_whole_is_not_written_again(session: Session) -> None:
    make_context(session, CPU)
    files = [path for path in context_files(save_context(session, NAME)) if path.suffix != ".json"]
    times = [path.stat().st_mtime_ns for path in files]
    save_context(session, NAME)
    assert [path.stat().st_mtime_ns for path in files] == times


@pytest.mark.parametrize("damage", ["cut", "flipped", "text"])
def test_damaged_predictions_of_the_plain_model_are_made_again(
    damage: str, spec_path: Path, tmp_path: Path, ablate: Callable[..., int], capsys: pytest.CaptureFixture[str]
) -> None:
    assert ablate("run", "--specs", spec_path) == 0
    (path,) = (tmp_path / "out" / "cache").glob("dense-*.npz")
    content = bytearray(path.read_bytes())
    if damage == "flipped":
        content[len(content) // 2] ^= 0xFF
    path.write_bytes(b"text" if damage == "text" else content if damage == "flipped" else content[:300])
    next((tmp_path / "out" / "trials").iterdir()).unlink()
    assert ablate("run", "--specs", spec_path) == 0
    assert "1 to compute" in capsys.readouterr().out
