"""The pages on the methods, made from their docstrings and the registry: ``sievit docs``.

Nothing is written twice: whoever changes a docstring makes the pages again, and a test holds that they are current.
Needs torch and timm alone.
"""

from __future__ import annotations

import re
import sys
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from types import FunctionType, ModuleType
from typing import NamedTuple

import torch
from torch import Tensor, nn

from ablations.catalogue import families
from ablations.catalogue.docstrings import described, functions, markdown, parted, statements, tagged
from ablations.catalogue.methods import (
    ADAPTIVE,
    TRAINED,
    Properties,
    classes_of,
    example_placement,
    placement_code,
    properties_of,
)
from ablations.models.loading import create_model
from ablations.records.files import atomic
from ablations.spec.written import example_stages
from reducers import Placement, TokenReducer, available, reduce_tokens
from reducers.backbones.xvit import XViT

FOLDER = Path(__file__).parents[2] / "docs"
PLACE = "methods/"  # of the pages on methods, in that folder
INDEX = f"{PLACE}README.md"
_FAMILIES = "families.md"
_MODEL, _DEPTH = "deit_tiny_patch16_224", 12  # on which a method's own work and weights are counted
_FRAMES = 8  # of an X-ViT of that model's size, for methods that read clips alone
_METHODS = "reducers.methods."  # a method that somebody registers beside them is not the package's
_KIT = "reducers.kit."
_MADE = "<!-- made by `sievit docs`: change the docstrings of {source} instead -->\n"
_SITES = {
    "attention": "after the attention residual of its blocks, before their MLP",
    "input": "before its blocks, with the features alone",
    "image": "on the input image",
    "pixels": "on embedded patches, by the input's pixels, before the first block",
}


@dataclass(frozen=True)
class Work:
    """What a method adds to a model at its example's placement."""

    share: float  # its own multiply-adds, of the dense model's
    parameters: int


def pages() -> dict[str, str]:
    """Name of a file in docs/ -> text: a page for each method of the package, their index, and the page on models."""
    own = {name: cls for name, cls in available().items() if cls.__module__.startswith(_METHODS)}
    about = {name: properties_of(name, cls) for name, cls in own.items()}
    texts = {f"{PLACE}{name}.md": _page(cls, about[name]) for name, cls in own.items()}
    return {INDEX: _index(list(about.values())), **texts, _FAMILIES: families.page()}


def stale(folder: Path = FOLDER) -> list[str]:
    """The files that ``write`` would change, add or remove."""
    return _differing(folder, pages())


def _differing(folder: Path, wanted: dict[str, str]) -> list[str]:
    known = {*wanted, *(path.relative_to(folder).as_posix() for path in folder.glob(f"{PLACE}*.md"))}
    return sorted(name for name in known if _read(folder / name) != wanted.get(name))


def _read(path: Path) -> str | None:
    return path.read_text(encoding="utf-8") if path.is_file() else None


def write(folder: Path = FOLDER) -> list[str]:
    """Make all pages; the names of those that changed."""
    (folder / PLACE).mkdir(parents=True, exist_ok=True)
    wanted = pages()
    changed = _differing(folder, wanted)
    for name in changed:
        if name not in wanted:
            (folder / name).unlink()
            continue
        with atomic(folder / name) as temporary:
            temporary.write_text(wanted[name], encoding="utf-8")
    return changed


# --- the index --------------------------------------------------------------------------------------------------------


def _index(methods: list[Properties]) -> str:
    trained = [method for method in methods if method.weights == TRAINED]
    adaptive = [method for method in methods if method.count == ADAPTIVE]
    rows = [
        [f"[`{m.name}`]({m.name}.md)", m.summary, m.count, m.weights, m.site, "yes" if m.stacks else "no", m.source]
        for m in methods
    ]
    return "\n".join(
        [
            _MADE.format(source="reducers/methods"),
            "# Methods",
            "",
            f"{len(methods)} methods behind one interface; {len(adaptive)} keep another number of tokens in each "
            f"image, {len(trained)} must be trained (`make train METHOD=name`). *Stacks*: with any other method that "
            "stacks, at one block; at different blocks, all can be placed beside each other.",
            "",
            *_table(["method", "what it does", "count", "weights", "site", "stacks", "source"], rows),
            "",
        ]
    )


# --- a page -----------------------------------------------------------------------------------------------------------


def _page(cls: type[TokenReducer], about: Properties) -> str:
    modules = _modules(cls)
    shared = _shared(modules)
    source = f"{cls.__module__.replace('.', '/')}.py"
    placement = example_placement(about.name, depth=_DEPTH)
    parts = [
        _MADE.format(source=source),
        f"# `{about.name}`",
        f"{about.summary[:1].upper()}{about.summary[1:]}.",
        "\n".join(_table(["", ""], _facts(cls, about, placement, source))),
        markdown(parted(cls.__doc__ or "")[0]),
        "## Settings",
        _settings(cls),
        "## Example",
        _example(about, placement),
    ]
    said = dict.fromkeys(statement for module in modules for statement in statements(module))
    said |= dict.fromkeys(tagged(function.__doc__ or "" for function in shared))
    if said:
        parts += [
            "## What it rests on",
            "[R]: from memory of the paper, not checked against its text. [D]: our decision, where the source is "
            "silent or a plain ViT forces a choice.",
            "\n".join(f"* {statement}" for statement in said),
        ]
    mathematics = [part for module in modules for part in functions(module)]
    mathematics += [part for function in shared for part in described(function)]
    if mathematics:
        parts += ["## The mathematics, function by function", *mathematics]
    return "\n\n".join(part.strip("\n") for part in parts) + "\n"


def _modules(cls: type[TokenReducer]) -> list[ModuleType]:
    """The method's own file, and those of the parts that it builds on."""
    names = [base.__module__ for base in cls.__mro__ if base.__module__.startswith((_METHODS, _KIT))]
    return [sys.modules[name] for name in dict.fromkeys(names)]


def _shared(modules: list[ModuleType]) -> list[FunctionType]:
    """The mathematics that the method's own file takes from the kit; how many tokens are kept is none."""
    beside = {module.__name__ for module in modules} | {f"{_KIT}selection"}
    taken = (each for each in vars(modules[0]).values() if isinstance(each, FunctionType))
    return [each for each in taken if each.__module__.startswith(_KIT) and each.__module__ not in beside]


def _facts(cls: type[TokenReducer], about: Properties, placement: Placement, source: str) -> list[list[str]]:
    reducer = next(iter(placement.blocks.values()))
    work = work_of(placement)
    counted_on = "DeiT-Ti" if "images" in about.inputs else f"an X-ViT of DeiT-Ti's size on {_FRAMES} frames"
    needs = [
        words
        for words, asked in (
            ("a class token", reducer.traits.needs_class_token),
            ("the attention of the block before", reducer.traits.uses_previous_attention),
            ("the place of each patch", reducer.traits.uses_positions),
            ("random numbers, of the seed and the image", reducer.traits.uses_random),
        )
        if asked
    ]
    facts = [
        ["source", about.source],
        ["tokens left", "another number in each image" if about.count == ADAPTIVE else "the same number in each image"],
        ["weights", _weights(about)],
        ["trained as published", cls.trained_as],
        ["asks of its training", ", ".join(f"`{name}` {value}" for name, value in reducer.schedule.items())],
        ["teacher", "the dense model" if reducer.traits.needs_teacher else ""],
        ["acts", _SITES[about.site]],
        ["needs", ", ".join(needs)],
        ["in one block with others", "yes, with any other that stacks" if about.stacks else f"no: {about.why_not}"],
        ["at other blocks than others", "yes"],
        ["reads", "" if about.inputs == ("images", "clips") else f"{' and '.join(about.inputs)} alone"],
        ["weights of its own", f"{work.parameters:,} ({counted_on}, the example)" if work.parameters else "none"],
        ["work of its own", f"{_percent(work.share)} ({counted_on}, the example)" if work.share else "none"],
        ["code", f"[`{source}`](../../{source})"],
    ]
    return [fact for fact in facts if fact[1]]


def _weights(about: Properties) -> str:
    if about.weights == TRAINED:
        return f"must be trained: `make train METHOD={about.name}`"
    return "works off the shelf, on any trained model"


def work_of(placement: Placement) -> Work:
    """Counted on one image of noise in a DeiT-Ti with random weights, in float64 so that all machines agree; of what
    reads clips alone, on one clip in an X-ViT of the same size.
    """
    subject = _subject(of_clips=any("images" not in reducer.traits.inputs for reducer in placement.blocks.values()))
    with torch.random.fork_rng(devices=[]), torch.inference_mode(False), torch.no_grad():
        torch.set_rng_state(subject.random)  # reducers draw their parameters as if the model had just been made
        fast = reduce_tokens(subject.model, placement).eval()
        trace = fast.trace(subject.images)[1]
    own = {id(parameter): parameter.numel() for parameter in fast.reducers.parameters()}
    return Work(float(trace.reducer_macs[0] / subject.macs), sum(own.values()))


class _Subject(NamedTuple):
    model: nn.Module
    images: Tensor  # (1, 3, 224, 224), or a clip of such frames
    macs: float  # of the dense model
    random: Tensor  # the state of the random numbers once both were drawn


@cache
def _subject(*, of_clips: bool) -> _Subject:
    """What work is counted on: the same for every method of a kind, and made once."""
    with torch.random.fork_rng(devices=[]), torch.inference_mode(False), torch.no_grad():
        torch.manual_seed(0)
        model = XViT(num_frames=_FRAMES, embed_dim=192, num_heads=3) if of_clips else create_model(_MODEL)
        model = model.double().eval()
        images = torch.randn(1, *([_FRAMES] if of_clips else []), 3, 224, 224, dtype=torch.float64)
        state = torch.get_rng_state()
        dense = reduce_tokens(model, Placement()).eval().trace(images)[1]
    return _Subject(model, images, float(dense.macs[0]), state)


def _percent(share: float) -> str:
    """Two digits, of the dense model's multiply-adds."""
    percent = 100 * share
    text = "less than 0.01" if percent < 0.01 else f"{percent:.0f}" if percent >= 10 else f"{percent:.2g}"
    return f"{text} % of the dense model's multiply-adds"


def _settings(cls: type[TokenReducer]) -> str:
    parameters = cls.settings()
    if not parameters:
        return "None."
    meanings = parted(cls.__doc__ or "")[1]
    rows = []
    for parameter in parameters:
        default = "" if parameter.default is parameter.empty else f"`{parameter.default!r}`"
        annotation = parameter.annotation
        kind = annotation if isinstance(annotation, str) else getattr(annotation, "__name__", str(annotation))
        meaning = markdown(meanings.get(parameter.name, ""))
        rows.append([f"`{parameter.name}`", f"`{kind}`", default or "needed", meaning])
    return "\n".join(_table(["setting", "type", "default", "meaning"], rows))


def _example(about: Properties, placement: Placement) -> str:
    budgets, methods = classes_of(placement)
    stages = "\n".join(f"  - {_flow(stage)}" for stage in example_stages(about.name))
    names = ", ".join(sorted([*budgets, "at", "reduce_tokens"], key=lambda name: (name.islower(), name)))
    return "\n".join(
        [
            "```python",
            f"from reducers import {names}",
            f"from reducers.methods import {', '.join(methods)}",
            "",
            f"fast = reduce_tokens(model, {placement_code(placement)})",
            "```",
            "",
            "and in a spec:",
            "",
            "```yaml",
            "stages:",
            stages,
            "```",
        ]
    )


def _flow(value: object) -> str:
    """Plain data as one line of YAML."""
    if isinstance(value, dict):
        return "{" + ", ".join(f"{key}: {_flow(item)}" for key, item in value.items()) + "}"
    if isinstance(value, list):
        return "[" + ", ".join(map(_flow, value)) + "]"
    if isinstance(value, bool) or value is None:
        return {True: "true", False: "false", None: "null"}[value]
    if isinstance(value, str) and not re.fullmatch(r"[A-Za-z][\w-]*|\d+-\d+", value):
        return f"'{value}'"
    return str(value)


def _table(header: list[str], rows: list[list[str]]) -> list[str]:
    cells = [[cell.replace("|", "\\|").replace("\n", " ") for cell in row] for row in rows]
    return [f"| {' | '.join(row)} |" for row in (header, ["---"] * len(header), *cells)]


__all__ = ["FOLDER", "Work", "pages", "stale", "work_of", "write"]
