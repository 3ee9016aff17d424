"""What a reducer is: it decides, the runtime carries the decision out.

Every ordinary method overrides ``decide`` alone. The other steps of the lifecycle are for methods that change the
input, plan ahead, replace a block's computation, or accumulate an output; state travels by argument and is never
kept on the module.
"""

from __future__ import annotations

import inspect
from collections.abc import Mapping
from dataclasses import dataclass, field
from functools import cache
from typing import TYPE_CHECKING, Any, ClassVar, Literal

from torch import Tensor, nn

from reducers.budget import Budget
from reducers.errors import ReducerError

if TYPE_CHECKING:
    from reducers.decision import Decision
    from reducers.signals import Signals
    from reducers.trace import Tracer


@dataclass(frozen=True)
class State:
    """What a decision may know beyond the signals."""

    block: int  # 0-based
    depth: int
    initial: int  # patch tokens entering block 0
    grid: tuple[int, int] = (0, 0)  # rows and columns of the original patches, which ``Signals.positions`` count
    image_keys: Tensor | None = None  # (B,) int64, for methods that draw random numbers
    training: bool = False
    plans: Mapping[int, Any] = field(default_factory=dict)  # what each reducer's ``plan`` returned, by id
    draw: int = 0  # how many reducers of the same block draw random numbers before this one
    tracer: Tracer | None = None  # while tracing: a reducer that replaces a block reports its maps and its cost here
    notes: dict[int, list[Any]] = field(default_factory=dict)  # of this pass, for ``losses``; by id of the reducer

    def note(self, reducer: TokenReducer, value: Any) -> None:
        """Put something aside that the reducer's ``losses`` will ask for; one entry a call, first to last."""
        self.notes.setdefault(id(reducer), []).append(value)

    def noted(self, reducer: TokenReducer) -> list[Any]:
        """What the reducer noted in this pass."""
        return self.notes.get(id(reducer), [])


class TokenReducer(nn.Module):
    """A token-reduction method with its settings. Subclasses keep each constructor argument under its own name."""

    name: ClassVar[str] = ""  # as registered
    summary: ClassVar[str] = ""  # one line
    source: ClassVar[str] = ""  # paper
    adaptive: ClassVar[bool] = False  # the number of tokens kept differs from image to image
    trained: ClassVar[bool] = False  # works only after training
    site: ClassVar[Literal["attention", "input"]] = "attention"  # "input": before the block, with the features alone
    cuts_before_values: bool = False  # published order: attention rows are cut before they meet the values (ATS)
    needs_class_token: bool = False
    uses_random: bool = False
    uses_previous_attention: bool = False
    uses_positions: bool = False  # asks for ``positions``, which are not tracked otherwise

    def decide(self, signals: Signals, state: State) -> Decision | None:
        """What becomes of the tokens at this block; None leaves them alone."""
        raise NotImplementedError(f"{type(self).__name__} must say what it decides")

    # The rest of the lifecycle is optional. ``None`` tells the runtime that a step is not used.
    prepare: ClassVar[Any] = None  # (images, host) -> images: a smaller input image
    plan: ClassVar[Any] = None  # (images, host) -> Any: all blocks ahead; reaches decide as state.plans[id(self)]
    block: ClassVar[Any] = None  # (block, batch, state) -> TokenBatch: replaces a block's computation
    finish: ClassVar[Any] = None  # (batch, state) -> TokenBatch: an accumulated output
    losses: ClassVar[Any] = None  # (state, outputs, targets, teacher) -> {name: Tensor}: training losses

    # What a method that must be trained declares; the finetuning does the rest.
    attach: ClassVar[Any] = None  # (host, blocks) -> None: makes the parameters, whose sizes are the model's
    train_phase: ClassVar[Any] = None  # (share, base) -> None: before each update; share of the training done, [0, 1)
    needs_teacher: ClassVar[bool] = False  # ``losses`` reads what the dense model says of the same images
    schedule: ClassVar[Mapping[str, Any]] = {}  # settings of the training recipe that the method's publication asks for
    trained_as: ClassVar[str] = ""  # the published training in a sentence

    _attached: tuple[Any, ...] | None = None

    def join(self, host: Any, blocks: tuple[int, ...]) -> None:
        """Make the parameters for the model and the blocks it is placed at, once; ``reduce_tokens`` calls this."""
        if self.attach is None:
            return
        about = (*host.shape, blocks)
        if self._attached is None:
            self.attach(host, blocks)
            self.to(device=host.like.device, dtype=host.like.dtype)
            self._attached = about
        elif self._attached != about:
            raise ReducerError(
                f"this {self.name} has parameters for another model or other blocks ({self._attached[-1]}, now "
                f"{blocks}); make a new one, or load the weights that were trained for these"
            )

    @property
    def only_decides(self) -> bool:
        """Reducers that only decide stack freely."""
        return all(getattr(self, step) is None for step in ("prepare", "plan", "block", "finish"))

    keeps_class_token_by: ClassVar[str] = "keep_class_token=True"  # the setting, where one may drop the class token

    @property
    def may_drop_class_token(self) -> bool:
        return False

    @classmethod
    def settings(cls) -> list[inspect.Parameter]:
        """What the method can be given by name, as its constructor says it."""
        return list(_settings(cls))  # type: ignore[arg-type]  # mypy takes the class for one of its instances

    def spec(self) -> dict[str, Any]:
        """The reducer as plain data, defaults left out: ``build`` reads it back."""
        data: dict[str, Any] = {"name": self.name}
        for parameter in self.settings():
            value = getattr(self, parameter.name)
            if parameter.default is not inspect.Parameter.empty and value == parameter.default:
                continue
            data[parameter.name] = value.spec() if isinstance(value, (Budget, TokenReducer)) else value
        return data

    def extra_repr(self) -> str:
        return ", ".join(f"{key}={value}" for key, value in self.spec().items() if key != "name")


@cache
def _settings(cls: type[TokenReducer]) -> tuple[inspect.Parameter, ...]:
    """Reading a signature takes longer than making the reducer, and a plan makes tens of thousands."""
    named = (inspect.Parameter.POSITIONAL_OR_KEYWORD, inspect.Parameter.KEYWORD_ONLY)
    return tuple(p for p in inspect.signature(cls).parameters.values() if p.kind in named)
