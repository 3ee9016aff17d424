"""A weights file with any bytes changed, cut out or added: read to finite weights, or refused with what to do."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from hypothesis import example, given, settings
from hypothesis import strategies as st
from safetensors.torch import save
from torch import nn

from ablations.models.weight_files import ModelError, load_into, read_shapes, read_weights
from reducers.digest import state_digest

MODEL = nn.Sequential(nn.Linear(3, 2), nn.LayerNorm(2))
WHOLE = save({name: tensor.contiguous() for name, tensor in MODEL.state_dict().items()})
HEADER = int.from_bytes(WHOLE[:8], "little")


def loaded(path: Path) -> nn.Module | None:
    """The model with the weights of the file, or None where they are refused."""
    model = nn.Sequential(nn.Linear(3, 2), nn.LayerNorm(2))
    try:
        read_shapes(path)
        load_into(model, read_weights(path), name="a model", source=str(path))
    except ModelError:
        return None
    return model


@st.composite
def damaged(draw: st.DrawFn) -> bytes:
    """The file with a few of its bytes changed, mostly in the header, where they mean most."""
    content = bytearray(WHOLE)
    for _ in range(draw(st.integers(1, 3))):
        place = draw(st.integers(0, 7 + HEADER) | st.integers(0, len(content)))
        given = draw(st.binary(max_size=4) | st.sampled_from([b'"', b"{", b"}", b"0", b"-1", b"9" * 20, b"F8_E4M3"]))
        match draw(st.sampled_from(["replace", "insert", "cut", "end"])):
            case "replace":
                content[place : place + len(given)] = given
            case "insert":
                content[place:place] = given
            case "cut":
                del content[place : place + draw(st.integers(1, 40))]
            case _:
                del content[place:]
    return bytes(content)


@settings(deadline=None, max_examples=100)
@given(damaged())
@example(WHOLE + b"more")
@example(WHOLE[:8])
@example((2**62).to_bytes(8, "little") + b"{}")
def test_damage_is_refused_or_leaves_finite_weights(tmp_path_factory: pytest.TempPathFactory, content: bytes) -> None:
    path = tmp_path_factory.getbasetemp() / "damaged.safetensors"
    path.write_bytes(content)
    model = loaded(path)
    if model is not None:
        assert all(bool(torch.isfinite(tensor).all()) for tensor in model.state_dict().values())
        changed = state_digest(model) != state_digest(MODEL)
        same_tensors = content[8 + int.from_bytes(content[:8], "little") :] == WHOLE[8 + HEADER :]
        assert changed or same_tensors, "other weights always have another digest"


def test_the_whole_file_is_read(tmp_path: Path) -> None:
    (tmp_path / "whole.safetensors").write_bytes(WHOLE)
    model = loaded(tmp_path / "whole.safetensors")
    assert model is not None
    assert state_digest(model) == state_digest(MODEL)


DTYPES = ["F64", "F32", "F16", "BF16", "I64", "I32", "I16", "I8", "U8", "U64", "BOOL", "C64"]
DTYPES += ["F8_E4M3", "F8_E5M2", "F8_E8M0", "F4"]


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("size", [1, 2, 4, 8])
def test_every_type_a_header_can_name_is_read_or_refused(tmp_path: Path, dtype: str, size: int) -> None:
    tensors = {"0.weight": [2, 3], "0.bias": [2], "1.weight": [2], "1.bias": [2]}
    header, end = {}, 0
    for name, shape in tensors.items():
        length = size * torch.Size(shape).numel()
        header[name] = {"dtype": dtype, "shape": shape, "data_offsets": [end, end + length]}
        end += length
    text = json.dumps(header).encode()
    path = tmp_path / "typed.safetensors"
    path.write_bytes(len(text).to_bytes(8, "little") + text + bytes(end))
    model = loaded(path)
    fits = {"F64": 8, "F32": 4, "F16": 2, "BF16": 2}.get(dtype) == size
    assert (model is not None) == fits, "floating point of its own size alone"
