"""Weights from safetensors files: read without running anything that is in them, and checked before they are used.

Pickled checkpoints can run code when they are opened, so no other format is read.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor, nn

_FLOATS = (torch.float16, torch.bfloat16, torch.float32, torch.float64)
_SHOWN = 5  # names in one message

_OTHER_FORMATS = (  # (first bytes, what the file is instead)
    (b"PK\x03\x04", "a zip archive, such as a PyTorch checkpoint"),
    (b"\x80", "a Python pickle, such as an old PyTorch checkpoint"),
    (b"version https://git-lfs", "a Git LFS pointer: fetch the file itself with `git lfs pull`"),
    (b"\x89HDF", "an HDF5 file"),
    (b"<", "a web page, as a failed download leaves it"),
)

# modules that hold another one, by the names they give it: torch.compile, FSDP, checkpoint_wrapper; DataParallel, DDP
_INNER = ("_orig_mod", "_fsdp_wrapped_module", "_checkpoint_wrapped_module")
_OUTER = "module"
_OF_AVERAGES = "n_averaged"  # AveragedModel counts in it


class ModelError(ValueError):
    """The model or its weights cannot be used as asked; the message names the cause and the remedy."""


def read_shapes(path: Path) -> dict[str, tuple[int, ...]]:
    """Name and shape of every tensor, from the file's header alone."""
    _check_file(path)
    try:
        with safe_open(path, framework="pt") as file:
            names = bare_names(file.keys())
            return {bare: tuple(file.get_slice(name).get_shape()) for name, bare in names.items()}
    except (SafetensorError, OSError) as error:
        raise _no_safetensors(path, str(error)) from error


def read_weights(path: Path) -> dict[str, Tensor]:
    """Every tensor of the file, on the CPU and as stored."""
    _check_file(path)
    try:
        with safe_open(path, framework="pt") as file:
            return {bare: file.get_tensor(name) for name, bare in bare_names(file.keys()).items()}
    except (SafetensorError, OSError) as error:
        raise _no_safetensors(path, str(error)) from error


def bare_names(names: Iterable[str]) -> dict[str, str]:
    """Each name, and what the bare model calls it where the weights were saved from a wrapper around it or around its
    parts: torch.compile, DataParallel, DistributedDataParallel, FSDP, AveragedModel.
    """
    listed = list(names)
    bare = {name: ".".join(part for part in name.split(".") if part not in _INNER) for name in listed}
    rest = {name: known for name, known in bare.items() if known != _OF_AVERAGES}
    while rest and all(known.startswith(f"{_OUTER}.") for known in rest.values()):
        bare = rest = {name: known.removeprefix(f"{_OUTER}.") for name, known in rest.items()}
    # two tensors of one name: no wrapper's doing, so it is left to be refused as it stands
    return bare if len(set(bare.values())) == len(bare) else dict(zip(listed, listed, strict=True))


def load_into(model: nn.Module, weights: Mapping[str, Tensor], *, name: str, source: str) -> None:
    """Put weights into the model, half precision widened to its float32; refuses whatever does not fit exactly."""
    expected = model.state_dict()
    missing = [f"{key} {_shape(expected[key])}" for key in expected if key not in weights]
    unexpected = [f"{key} {_shape(weights[key])}" for key in weights if key not in expected]
    shared = [key for key in expected if key in weights]
    misshapen = [
        f"{key} is {_shape(weights[key])}, the model's {_shape(expected[key])}"
        for key in shared
        if weights[key].shape != expected[key].shape
    ]
    problems = [
        _listed("missing", missing),
        _listed("unexpected", unexpected),
        _listed("of another shape", misshapen),
    ]
    if any(problems):
        raise ModelError(
            f"the weights in {source} do not fit {name}: {'; '.join(filter(None, problems))}. "
            f"{_remedy(weights, expected, name)}"
        )
    _check_values(weights, shared, expected, source)
    model.load_state_dict(dict(weights))


def check_finite(tensors: Mapping[str, Tensor], source: str) -> None:
    """Refuse weights of which one is NaN or infinite."""
    for key, tensor in tensors.items():
        if not bool(torch.isfinite(tensor).all()):
            raise ModelError(f"{key} of {source} is not finite: give WEIGHTS=file.safetensors")


def _check_file(path: Path) -> None:
    if path.is_dir():
        raise ModelError(f"WEIGHTS {path} is a folder: name the .safetensors file in it")
    if not path.is_file():
        raise ModelError(f"WEIGHTS {path} does not exist: give a .safetensors file, or WEIGHTS=random")
    try:
        with path.open("rb") as file:
            start = file.read(32)
    except OSError as error:
        raise ModelError(f"WEIGHTS {path} cannot be read ({error.strerror}): check its permissions") from error
    looks_like = next((what for first, what in _OTHER_FORMATS if start.startswith(first)), None)
    # a safetensors file begins with the length of its header (8 bytes) and the brace of a JSON object
    if start[8:9] != b"{":
        raise _no_safetensors(path, f"it is {looks_like}" if looks_like else "its header is missing")


def _no_safetensors(path: Path, reason: str) -> ModelError:
    return ModelError(
        f"WEIGHTS {path} is no safetensors file, the only format that is read ({reason}). "
        "Save the model's state dict with safetensors.torch.save_file and give that file"
    )


def _check_values(
    weights: Mapping[str, Tensor], names: Iterable[str], expected: Mapping[str, Tensor], source: str
) -> None:
    for key in names:
        tensor = weights[key]
        if expected[key].is_floating_point() and tensor.dtype not in _FLOATS:
            raise ModelError(
                f"{key} in {source} is stored as {tensor.dtype}: quantised weights are not read, store floating point"
            )
        # as the model will hold it: a float64 can be too large for a float32
        held = tensor.to(expected[key].dtype) if expected[key].is_floating_point() else tensor
        if held.is_floating_point() and not bool(torch.isfinite(held).all()):
            count = int((~torch.isfinite(held)).sum())
            raise ModelError(
                f"{key} in {source} holds {count} values that are NaN or infinite (or too large for {held.dtype}): "
                "the training diverged or the file is damaged; give other weights"
            )


def _shape(tensor: Tensor) -> str:
    return str(tuple(tensor.shape))


def _listed(what: str, entries: list[str]) -> str:
    if not entries:
        return ""
    more = f", and {len(entries) - _SHOWN} more" if len(entries) > _SHOWN else ""
    return f"{len(entries)} {what} ({', '.join(entries[:_SHOWN])}{more})"


_HEADS = {"head", "head_dist", "fc", "classifier"}  # as libraries call what gives the logits


def _remedy(weights: Mapping[str, Tensor], expected: Mapping[str, Tensor], name: str) -> str:
    prefix = next((p for p in ("module.", "model.", "base.") if any(key.startswith(p) for key in weights)), None)
    if prefix and any(key.removeprefix(prefix) in expected for key in weights):
        return f"The names begin with {prefix!r}: save the state dict of the bare model"
    missing = {key.partition(".")[0] for key in expected if key not in weights}
    if missing and missing <= _HEADS and not any(key not in expected for key in weights):
        return "They hold no classifier: give some that do, or ask for features alone with TASK=embed (--task embed)"
    return f"Is {name} the MODEL these weights were trained for?"
