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
compared with a model where they are; what else stands there is kept and not looked at.
"""

from __future__ import annotations

import os
import warnings
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from torch import nn

from reducers.checks import whole_number
from reducers.digest import state_digest
from reducers.errors import ReducerError
from reducers.hosts import host_of
from reducers.placement import Placement, check_blocks, parse_blocks, placement_from
from reducers.runtime import ReducedViT

VERSION = 1  # of the form of these files
MAX_BYTES = 64 * 1024
_MOST_STAGES, _MOST_BLOCKS, _MOST_PLACED = 64, 1000, 4096  # of a placement: more is a slip, or meant to take long
_MOST_NESTED = 32  # levels; a placement has about ten, and PyYAML's time grows with their square
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
    patches): the placement works, and what the file promises of cost and accuracy is not promised of that model.

    Raises:
        ReducerError: there is no such file, it holds no placement, was written by a later version, or the model has
            another number of blocks.
    """
    file = read_placement_file(path)
    if model is None:
        return file.placement
    host = host_of(model.base if isinstance(model, ReducedViT) else model)
    about, name = file.recommended, file.recommended["model"]
    if about.get("depth", host.depth) != host.depth:
        raise ReducerError(
            f"{file.path}: it is for {name}, of {about['depth']} blocks, and this model has {host.depth}; load it with "
            "that model, or ask `sievit recommend` about this one"
        )
    others = []
    if about.get("weights_digest", "") not in ("", state_digest(host.model)):
        others.append("this model has other weights")
    if "patches" in about and about["patches"] != host.patches:
        others.append(f"its {host.patches} patches are not the {about['patches']} that counts were found for")
    if others:
        warnings.warn(
            f"{file.path} is for {name}: {' and '.join(others)}. What it says of cost and accuracy may not hold; ask "
            "`sievit recommend` about this model",
            stacklevel=2,
        )
    patches = host.patches if file.placement.is_scheduled else None
    return file.placement.resolve(host.depth, host.first_free, patches=patches)


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
    """The text of a placement file. ``recommended``: plain data with at least ``model``; its version is put in front.
    ``name``, ``title``, ``variant`` and ``question`` are those of a spec.
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
        "arms": [{"variant": variant, "stages": placement.spec()}],
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
    for name, most in (("depth", _MOST_BLOCKS), ("patches", 10**9)):
        number = whole_number(about.get(name, 1))
        if number is None or not 1 <= number <= most:
            raise ValueError(f"recommended.{name} must be a whole number from 1 to {most}; got {about[name]!r:.80}")
    return about


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
