"""What is known of every registered method, read off its class and an instance: for lists and the documentation."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from ablations.spec.written import example_stages
from ablations.trial.labels import with_nested
from reducers import Budget, Placement, TokenReducer, available, build, placement_from
from reducers.stack import Stack

FIXED, ADAPTIVE = "fixed", "adaptive"
OFF_THE_SHELF, TRAINED = "off the shelf", "trained"

_STEPS = {
    "prepares": "it changes the input image",
    "selects": "it chooses by the input's pixels, before any block",
    "plans": "it plans all blocks ahead",
    "runs_blocks": "it replaces the computation of its blocks",
    "finishes": "it has an output of its own",
}


@dataclass(frozen=True)
class Properties:
    """One method in words."""

    name: str
    settings: str  # as the constructor takes them, with defaults
    count: str  # of tokens left: FIXED by the budget, or ADAPTIVE, another in each image
    weights: str  # OFF_THE_SHELF: any trained model will do; TRAINED: works only after training
    stacks: bool  # with others at one block
    why_not: str  # … and what stands against it
    site: str  # "attention" | "input" | "image" | "pixels"
    summary: str
    source: str
    inputs: tuple[str, ...]  # what it reads: "images", "clips"


def properties() -> list[Properties]:
    """Every registered method, by name."""
    return [properties_of(name, cls) for name, cls in available().items()]


def properties_of(name: str, cls: type[TokenReducer]) -> Properties:
    """One method, as its example in the shipped specs has it."""
    reducer = example(name)
    settings = [p.name if p.default is p.empty else f"{p.name}={_default(p.default)}" for p in cls.settings()]
    why_not = " and ".join(reason for step, reason in _STEPS.items() if getattr(reducer.steps, step))
    return Properties(
        name=name,
        settings=", ".join(settings),
        count=ADAPTIVE if reducer.traits.adaptive else FIXED,
        weights=TRAINED if reducer.traits.trained else OFF_THE_SHELF,
        stacks=reducer.only_decides,
        why_not="" if reducer.only_decides else why_not,
        site="image" if reducer.steps.prepares else "pixels" if reducer.steps.selects else reducer.traits.site,
        summary=cls.summary,
        source=cls.source,
        inputs=reducer.traits.inputs,
    )


def example(name: str) -> TokenReducer:
    """The method as its first arm in the shipped specs sets it, for inference."""
    (part,) = [part for stage in example_stages(name)[:1] for part in stage["stack"]]
    return build(part).eval()


def example_placement(name: str, *, depth: int) -> Placement:
    """The whole placement of that arm."""
    return placement_from(example_stages(name), depth=depth)


# --- as code ----------------------------------------------------------------------------------------------------------


def placement_code(placement: Placement) -> str:
    """``at([3, 6, 9], EViT(Ratio(0.7)))``: what a person would type."""
    groups: dict[int, tuple[TokenReducer, list[int]]] = {}
    for block, reducer in sorted(placement.blocks.items()):
        groups.setdefault(id(reducer), (reducer, []))[1].append(block)
    return " | ".join(f"at({_blocks(blocks)}, {reducer_code(reducer)})" for reducer, blocks in groups.values())


def reducer_code(reducer: TokenReducer) -> str:
    """``EViT(Ratio(0.7), fuse=False)``: defaults left out."""
    if isinstance(reducer, Stack):
        return f"Stack({', '.join(map(reducer_code, reducer.members))})"
    arguments: list[str] = []
    for parameter in reducer.settings():
        value = getattr(reducer, parameter.name)
        if parameter.default is not parameter.empty and value == parameter.default:
            continue
        plain = parameter.kind is parameter.POSITIONAL_OR_KEYWORD and not arguments
        arguments.append(_value(value) if plain else f"{parameter.name}={_value(value)}")
    return f"{type(reducer).__name__}({', '.join(arguments)})"


def classes_of(placement: Placement) -> tuple[list[str], list[str]]:
    """The names an example imports: of budgets, and of methods."""
    code = placement_code(placement)
    budgets = [name for name in ("Count", "Drop", "Ratio") if f"{name}(" in code]
    methods = sorted(
        {type(member).__name__ for reducer in placement.blocks.values() for member in with_nested(reducer)}
    )
    return budgets, methods


def _value(value: Any) -> str:
    if isinstance(value, Budget):
        return _budget(value)
    return reducer_code(value) if isinstance(value, TokenReducer) else repr(value)


def _default(value: Any) -> str:
    """A default, a number in few digits: 0.333 for a third."""
    return f"{value:.3g}" if isinstance(value, float) else _value(value)


def _budget(budget: Budget) -> str:
    (kind, value), *options = budget.spec().items()
    return f"{kind.capitalize()}({', '.join([repr(value), *(f'{key}={given!r}' for key, given in options)])})"


def _blocks(blocks: list[int]) -> str:
    if len(blocks) == 1:
        return str(blocks[0])
    if len(blocks) > 2 and blocks == list(range(blocks[0], blocks[-1] + 1)):
        return f"range({blocks[0]}, {blocks[-1] + 1})"
    return str(blocks)


REDUCER_COLUMNS = ["name", "settings", "count", "weights", "stacks", "site", "what it does", "source"]


def reducer_rows() -> list[list[str]]:
    """Every registered reducer: name, settings, properties, summary and source; ``REDUCER_COLUMNS`` names them."""
    return [
        [about.name, about.settings, about.count, about.weights, "yes" if about.stacks else "no", about.site,
         about.summary, about.source]
        for about in properties()
    ]  # fmt: skip
