"""Placement files: a placement that was recommended for a model, as a YAML file that can be read, loaded and run again.

Such a file is a spec of one arm with a block of its own on what was found::

    name: recommended_0_60
    title: 0.60 of the dense cost
    recommended:
      version: 1
      model: deit_small_patch16_224
      weights_digest: 3f9c…
      depth: 12
      patches: 196
      cost: 0.6
      accuracy: 0.79
    arms:
    - variant: ToMe, late 2
      stages:
      - {at: [1, 2], stack: [{name: tome, budget: {drop: 3}}]}

``version``, of the form of the file, and ``model`` must be there; ``weights_digest``, ``depth`` and ``patches`` are
compared with a model where they are; what else stands there is kept and not looked at, but for::

      trained:
        reducers: {file: 0.60.reducers.safetensors, digest: 8e1b…}
        model: {file: 0.60.model.safetensors, digest: 77f0…}
      host: {fill: zero}

The reducers' trained tensors, a file beside this one, are put into the placement; the model is to be loaded with the
weights of the other, where it was trained as well. ``host`` is how the model is to be driven (``reduce_tokens``).
"""

from __future__ import annotations

import os
import re
import warnings
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from torch import nn

from reducers.checks import whole_number
from reducers.digest import state_digest, tensors_digest
from reducers.errors import ReducerError
from reducers.hosts import host_of
from reducers.placement import Placement, check_blocks, parse_blocks, placement_from
from reducers.runtime import ReducedViT

VERSION = 1  # of the form of these files
MAX_BYTES = 64 * 1024
_MOST_STAGES, _MOST_BLOCKS, _MOST_PLACED = 64, 1000, 4096  # of a placement: more is a slip, or meant to take long
_MOST_NESTED = 32  # levels; a placement has about ten, and PyYAML's time grows with their square
_NAME = re.compile(r"\w[\w.-]{0,200}\.safetensors")  # of a file in the same folder
_REMEDY = "write it again with `sievit recommend`, or undo the edit"


@dataclass(frozen=True)
class PlacementFile:
    """What a placement file says."""

    path: Path
    placement: Placement
    recommended: Mapping[str, Any]  # what was found, for which model, and how sure it is


def load(path: str | os.PathLike[str], model: nn.Module | None = None) -> Placement:
    """The placement that a file written by ``sievit recommend`` holds: ``reduce_tokens(model, load(path, model))``.

    With a ``model``, a warning says if the file was written for another one (other weights, or another number of
    patches): the placement works, and what the file promises of cost and accuracy is not promised of that model. A
    warning says as well where ``reduce_tokens`` must be told how to drive the model.

    Where what was recommended was trained, its reducers come with their trained tensors, from the file beside this one,
    on the model's device; they are made for a model, which must then be given, with the weights that were trained with
    them.

    Raises:
        ReducerError: there is no such file, it holds no placement, was written by a later version, or the model has
            another number of blocks; or trained tensors are not there, are others, or do not fit.
    """
    file = read_placement_file(path)
    trained = _trained(file.recommended)
    if model is None:
        if trained:
            raise ReducerError(f"{file.path} comes with trained weights, which are put into a model: load(path, model)")
        return file.placement
    host = model.host if isinstance(model, ReducedViT) else host_of(model)
    about, name = file.recommended, file.recommended["model"]
    if about.get("depth", host.depth) != host.depth:
        raise ReducerError(
            f"{file.path}: it is for {name}, of {about['depth']} blocks, and this model has {host.depth}; load it with "
            "that model, or ask `sievit recommend` about this one"
        )
    others: list[str] = []
    wanted, others_are = about.get("weights_digest", ""), "this model has other weights"
    if "model" in trained:
        wanted = trained["model"].digest
        others_are = (
            f"this model has not the weights that were trained, {trained['model'].file} beside it "
            "(model.load_state_dict(safetensors.torch.load_file(…)) before it is reduced)"
        )
    if wanted not in ("", state_digest(host.model)):
        others.append(others_are)
    if "patches" in about and about["patches"] != host.patches:
        others.append(f"its {host.patches} patches are not the {about['patches']} that counts were found for")
    if others:
        warnings.warn(
            f"{file.path} is for {name}: {' and '.join(others)}. What it says of cost and accuracy may not hold; ask "
            "`sievit recommend` about this model",
            stacklevel=2,
        )
    if any(host.chosen.get(name) != value for name, value in about.get("host", {}).items()):
        warnings.warn(
            f"{file.path} was found with the model driven in another way than it is by itself: "
            f"reduce_tokens(model, placement, host={about['host']!r})",
            stacklevel=2,
        )
    patches = host.patches if file.placement.is_scheduled else None
    placement = file.placement.resolve(host.depth, host.first_free, patches=patches)
    return _with_tensors(placement, host.model, file.path, trained["reducers"]) if "reducers" in trained else placement


@dataclass(frozen=True)
class _Weights:
    """Trained weights beside a placement file."""

    file: str  # its name
    digest: str


def _trained(about: Mapping[str, Any]) -> dict[str, _Weights]:
    """The trained weights that a file comes with, by "reducers" and "model"."""
    return {what: _Weights(each["file"], each["digest"]) for what, each in about.get("trained", {}).items()}


def _with_tensors(placement: Placement, model: nn.Module, path: Path, weights: _Weights) -> Placement:
    """The placement with trained tensors in its reducers, on the model's device.

    Raises:
        ReducerError: they are not there, are others, or do not fit.
    """
    import safetensors

    beside = path.parent / weights.file
    again = f"copy it there from where `sievit recommend` wrote {path.name}, or write both again"
    if beside.is_symlink() or not beside.is_file():
        raise ReducerError(f"{path} comes with {weights.file}, which is no file beside it: {again}")
    reduced = ReducedViT(model, placement)  # makes the parameters that the tensors go into
    wanted = reduced.reducers.state_dict()
    try:
        with safetensors.safe_open(beside, framework="pt") as file:
            shapes = {name: tuple(file.get_slice(name).get_shape()) for name in file.keys()}  # noqa: SIM118
            unlike = [name for name, tensor in wanted.items() if shapes.get(name) != tuple(tensor.shape)]
            if unlike:
                raise ReducerError(f"{beside} does not fit the placement of {path.name} ({unlike[0]}): {again}")
            tensors = {name: file.get_tensor(name) for name in sorted(shapes)}
    except (safetensors.SafetensorError, OSError) as error:
        raise ReducerError(f"{beside} cannot be read ({error!s:.200}): {again}") from error
    if tensors_digest(tensors) != weights.digest:
        raise ReducerError(f"{beside} holds other weights than those that {path.name} was written with: {again}")
    reduced.reducers.load_state_dict({name: tensors[name] for name in wanted})
    device = next(model.parameters()).device
    return Placement({int(block): reducer.to(device) for block, reducer in reduced.reducers.items()})  # type: ignore[misc]


def read_placement_file(path: str | os.PathLike[str]) -> PlacementFile:
    """A placement file with what it says beside the placement.

    Raises:
        ReducerError: as of ``load``.
    """
    path = Path(path)
    text = _text(path)
    try:
        data = _plain_data(text)
        recommended = _recommended(data)
        placement = _placement(data, recommended)
    except (ValueError, TypeError, LookupError, AttributeError, ArithmeticError, RecursionError) as error:
        reason = str(error) if isinstance(error, ValueError) else f"a value of the wrong kind ({error})"
        raise ReducerError(f"{path} is no placement file: {reason:.500}; {_REMEDY}") from error
    return PlacementFile(path, placement, recommended)


def _plain_data(text: str) -> Any:
    """What a text says as plain data, without aliases: a few of them can stand for more than memory holds.

    Raises:
        ValueError: it is no YAML, or holds more than plain data; the message says what and in which line.
    """
    import yaml

    try:
        levels, wrong = 0, ""
        for event in yaml.parse(text, Loader=yaml.SafeLoader):
            levels += isinstance(event, yaml.CollectionStartEvent) - isinstance(event, yaml.CollectionEndEvent)
            if levels > _MOST_NESTED:
                wrong = "nested too deeply"
            elif isinstance(event, yaml.AliasEvent):
                wrong = "aliases (*name) are not read; repeat the value"
            if wrong:
                wrong = f"line {event.start_mark.line + 1 if event.start_mark else '?'}: {wrong}"
                break
        data = None if wrong else yaml.safe_load(text)
    except yaml.MarkedYAMLError as error:
        mark = error.problem_mark or error.context_mark
        raise ValueError(
            f"{f'line {mark.line + 1}: ' if mark else ''}{error.problem or 'not valid YAML':.300}"
        ) from error
    except (yaml.YAMLError, ValueError, ArithmeticError, LookupError, AttributeError, TypeError) as error:
        # beyond YAMLError: PyYAML's own slips on values such as `!!int ""`, numbers that are too long
        raise ValueError(f"not valid YAML ({type(error).__name__}: {error!s:.200})") from error
    if wrong:
        raise ValueError(wrong)
    return data


def placement_text(
    placement: Placement, recommended: Mapping[str, Any], *, name: str, title: str, variant: str = "recommended",
    question: str = "",
) -> str:  # fmt: skip
    """The text of a placement file. ``recommended``: plain data with at least ``model``; its version is put in front,
    and its ``host``, where there is one, is that of the arm. ``name``, ``title``, ``variant`` and ``question`` are
    those of a spec.
    """
    import yaml

    class Dumper(yaml.SafeDumper):
        def ignore_aliases(self, data: Any) -> bool:
            return True  # they are not read

    data: dict[str, Any] = {
        "name": name,
        "title": title,
        **({"question": question} if question else {}),
        "recommended": {"version": VERSION, **recommended},
        "arms": [
            {
                "variant": variant,
                "stages": placement.spec(),
                **({"host": dict(recommended["host"])} if recommended.get("host") else {}),
            }
        ],
    }
    text: str = yaml.dump(data, Dumper=Dumper, sort_keys=False, allow_unicode=True, default_flow_style=None, width=120)
    return text


def _text(path: Path) -> str:
    if not path.is_file():
        raise ReducerError(f"{path}: there is no such file; `sievit recommend` writes one, OUT/recommended/0.60.yaml")
    try:
        with path.open("rb") as file:
            raw = file.read(MAX_BYTES + 1)
    except OSError as error:
        raise ReducerError(f"{path}: cannot be read ({error.strerror or error}); check its rights") from error
    if len(raw) > MAX_BYTES:
        raise ReducerError(f"{path} is no placement file: it has more than {MAX_BYTES} bytes; {_REMEDY}")
    try:
        return raw.decode("utf-8")
    except UnicodeDecodeError as error:
        raise ReducerError(f"{path} is no placement file: it is not UTF-8 text; {_REMEDY}") from error


def _recommended(data: Any) -> Mapping[str, Any]:
    """The block on what was found, its known values checked."""
    if not isinstance(data, dict) or not isinstance(data.get("recommended"), dict):
        raise ValueError("it has no block `recommended:` with a version and a model")
    about: dict[str, Any] = data["recommended"]
    version = whole_number(about.get("version"))
    if version != VERSION:
        later = version is not None and version > VERSION
        raise ValueError(
            f"its version is {about.get('version')!r:.40}, and this is read: {VERSION}"
            + ("; it was written by a later sievit, update this one" if later else "")
        )
    for name in ("model", "weights_digest"):
        if not isinstance(about.get(name, "" if name != "model" else None), str):
            raise ValueError(f"recommended.{name} must be text; got {about.get(name)!r:.80}")
    _check_trained(about.get("trained", {}))
    if not _is_texts(about.get("host", {})):
        raise ValueError(f"recommended.host is written {{fill: zero}}; got {about['host']!r:.80}")
    for name, most in (("depth", _MOST_BLOCKS), ("patches", 10**9)):
        number = whole_number(about.get(name, 1))
        if number is None or not 1 <= number <= most:
            raise ValueError(f"recommended.{name} must be a whole number from 1 to {most}; got {about[name]!r:.80}")
    return about


def _check_trained(trained: Any) -> None:
    if not isinstance(trained, dict) or not trained.keys() <= {"reducers", "model"}:
        raise ValueError(f"recommended.trained has reducers and model; got {trained!r:.80}")
    for what, each in trained.items():
        if not _is_texts(each) or each.keys() != {"file", "digest"}:
            raise ValueError(f"recommended.trained.{what} has a file and its digest; got {each!r:.80}")
        if not _NAME.fullmatch(each["file"]):
            raise ValueError(f"recommended.trained.{what}.file is a file beside this one; got {each['file']!r:.80}")


def _is_texts(data: Any) -> bool:
    """A mapping of texts."""
    return isinstance(data, dict) and all(isinstance(part, str) for pair in data.items() for part in pair)


def _placement(data: Mapping[str, Any], about: Mapping[str, Any]) -> Placement:
    arms = data.get("arms")
    if not isinstance(arms, list) or len(arms) != 1 or not isinstance(arms[0], dict):
        raise ValueError("it has one arm, and this has none or several")
    stages = arms[0].get("stages")
    if not isinstance(stages, list) or len(stages) > _MOST_STAGES:
        raise ValueError("its arm has no list of stages, or too many")
    depth, placed = about.get("depth", _MOST_BLOCKS), 0
    for stage in stages:
        stack = stage.get("stack") if isinstance(stage, dict) else None
        if not isinstance(stack, list) or "at" not in stage:
            raise ValueError(f"a stage is written {{at: [3], stack: [{{name: ats, …}}]}}; got {stage!r:.80}")
        blocks = parse_blocks(stage["at"], depth)
        check_blocks(blocks, depth)
        placed += len(blocks) * len(stack)
        if placed > _MOST_PLACED:
            raise ValueError("it places too many reducers")
    return placement_from(stages)
