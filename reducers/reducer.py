"""What a reducer is: it decides, the runtime carries the decision out.

Every ordinary method overrides ``decide`` alone and says by its ``traits`` what it needs. The other steps of the
lifecycle are protocols, for methods that change the input, plan ahead, replace a block's computation, accumulate an
output, or are trained; a method that has a step just defines it. State travels by argument and is never kept on the
module.
"""

from __future__ import annotations

import inspect
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field, fields, replace
from functools import cache
from typing import TYPE_CHECKING, Any, ClassVar, Generic, Literal, Protocol, TypeVar, runtime_checkable

from torch import Tensor, nn

from reducers.budget import Budget
from reducers.errors import ReducerError
from reducers.lazy import cached_property

if TYPE_CHECKING:
    from reducers.decision import Decision
    from reducers.signals import Signals
    from reducers.tokens import TokenBatch
    from reducers.trace import Tracer

Site = Literal["attention", "input"]
Input = Literal["images", "clips"]
Searchable = Mapping[str, tuple[Any, ...]]  # the settings of a method worth trying, each with its default first
T = TypeVar("T")
V = TypeVar("V")


@dataclass(frozen=True)
class Traits:
    """What is true of a reducer as it is set up. An instance tells them; a stack has those of its members together."""

    adaptive: bool = False  # the number of tokens kept differs from image to image
    trained: bool = False  # works only after training
    site: Site = "attention"  # "input": before the block, with the features alone
    cuts_before_values: bool = False  # published order: attention rows are cut before they meet the values (ATS)
    needs_class_token: bool = False
    may_drop_class_token: bool = False
    needs_teacher: bool = False  # ``losses`` reads what the dense model says of the same images
    uses_random: bool = False
    uses_previous_attention: bool = False
    uses_positions: bool = False  # asks for ``positions``, which are not tracked otherwise
    pools: bool = False  # what it leaves are mixtures of all tokens, and at no place of their own
    needs_token_keys: bool = False  # traces or replaces attention from token to token, so keys must be the tokens
    control: bool = False  # a yardstick for methods: it looks at no image's content, or says what a choice is worth
    oracle: bool = False  # its cost leaves something out: what it knows could not be had at that price
    whole_clip: bool = (
        False  # decides on all patches of a clip at once, whatever its units; at the input site, unrandom
    )
    inputs: tuple[Input, ...] = ("images", "clips")  # what it acts on: images, or clips (of frames, or as a whole)

    @classmethod
    def merged(cls, members: Iterable[Traits]) -> Traits:
        """Of reducers that act at one block, first to last: what one of them needs, all need."""
        told = list(members)
        ours: dict[str, Any] = {
            each.name: any(getattr(one, each.name) for one in told)
            for each in fields(cls)
            if each.name not in ("site", "cuts_before_values", "inputs")
        }
        return cls(
            **ours,
            site="input" if all(one.site == "input" for one in told) else "attention",
            cuts_before_values=all(one.cuts_before_values for one in told),
            inputs=tuple(kind for kind in told[0].inputs if all(kind in one.inputs for one in told)),
        )


class ByReducer(dict["TokenReducer", V]):
    """Something for each reducer of one pass, by the reducer itself: it is held, so that no other can take its place.

    Files written for earlier versions ask by the reducer's ``id``, and are answered.
    """

    def __missing__(self, key: object) -> V:
        for reducer, value in self.items():
            if id(reducer) == key:
                return value
        raise KeyError(key)


@dataclass(frozen=True)
class State:
    """What a decision may know beyond the signals."""

    block: int  # 0-based
    depth: int
    initial: int  # patch tokens of an image (of a unit: ``reducers.tokens``) entering block 0
    grid: tuple[int, int] = (0, 0)  # rows and columns of its original patches, which ``Signals.positions`` count
    image_keys: Tensor | None = None  # (B,) int64, for methods that draw random numbers; units have keys of their own
    training: bool = False
    plans: Mapping[TokenReducer, Any] = field(default_factory=ByReducer)  # what each reducer's ``plan`` returned
    draw: int = 0  # how many reducers of the same block draw random numbers before this one
    tracer: Tracer | None = None  # while tracing: a reducer that replaces a block reports its maps and its cost here
    notes: dict[TokenReducer, list[Any]] = field(default_factory=dict)  # of this pass, for ``losses``
    steps: int = 1  # in time, of a clip; where it is decided on as one, their grids lie one below the other in ``grid``
    still: int = 0  # patch tokens of one step in time, entering block 0

    def note(self, reducer: TokenReducer, value: Any) -> None:
        """Put something aside that the reducer's ``losses`` will ask for; one entry a call, first to last."""
        self.notes.setdefault(reducer, []).append(value)

    def noted(self, reducer: TokenReducer) -> list[Any]:
        """What the reducer noted in this pass."""
        return self.notes.get(reducer, [])


# --- the optional steps: who defines one has it, and None says that it has not ----------------------------------------


@runtime_checkable
class Prepares(Protocol):
    """Changes the images before they enter the model."""

    def prepare(self, images: Tensor, host: Any) -> Tensor:
        """images (B, C, H, W) -> others, of any height and width the model takes."""


@runtime_checkable
class Selects(Protocol):
    """Decides on patches by the images themselves, before any block."""

    def select_patches(self, images: Tensor, host: Any, batch: TokenBatch) -> Decision | None:
        """What becomes of the embedded patches, all of which are there (``TokenBatch.lattice``); None: nothing.

        ``batch``: as the first block would get it. In a clip whose frames are units a map may go from one to another.
        """


@runtime_checkable
class Plans(Protocol):
    """Plans all blocks ahead."""

    def plan(self, images: Tensor, host: Any) -> Any:
        """Whatever its other steps will ask for as ``state.plans[self]``."""


@runtime_checkable
class PlansTraining(Protocol):
    """Works something out before each pass of a training, for its ``losses`` alone: no decision follows from it."""

    def plan_training(self, images: Tensor, host: Any) -> Any:
        """What ``losses`` will ask for as ``state.plans[self]``."""


@runtime_checkable
class RunsBlocks(Protocol):
    """Replaces the computation of the blocks it is placed at."""

    def block(self, block: Any, batch: TokenBatch, state: State) -> TokenBatch:
        """The tokens that leave the block. It reports its maps and its cost to ``state.tracer``."""


@runtime_checkable
class Finishes(Protocol):
    """Has an output of its own, such as an accumulated one."""

    def finish(self, batch: TokenBatch, state: State) -> TokenBatch:
        """What the final norm and the head read in place of the tokens that left the last block."""


@runtime_checkable
class Attaches(Protocol):
    """Has parameters whose sizes are the model's."""

    def attach(self, host: Any, blocks: tuple[int, ...]) -> None:
        """Make them, for the model and the blocks it is placed at."""


@runtime_checkable
class HasLosses(Protocol):
    """Adds losses to a training."""

    def losses(self, state: State, outputs: Any, targets: Tensor, teacher: Any) -> dict[str, Tensor]:
        """Name -> loss, already weighted. ``teacher``: what the dense model says, where the traits need it."""


@runtime_checkable
class TrainsInPhases(Protocol):
    """Has a curriculum."""

    def train_phase(self, share: float, base: Any) -> None:
        """Before each update; ``share`` of the training is done, in [0, 1)."""


@dataclass(frozen=True)
class Steps:
    """Which of the optional steps a reducer has. Protocols take long to ask, and are asked once."""

    prepares: bool
    selects: bool
    plans: bool
    plans_training: bool
    runs_blocks: bool
    finishes: bool
    attaches: bool
    has_losses: bool
    trains_in_phases: bool

    @classmethod
    def of(cls, reducer: object) -> Steps:
        def has(protocol: type, step: str) -> bool:
            return isinstance(reducer, protocol) and getattr(reducer, step) is not None  # a property may say None

        return cls(
            prepares=has(Prepares, "prepare"),
            selects=has(Selects, "select_patches"),
            plans=has(Plans, "plan"),
            plans_training=has(PlansTraining, "plan_training"),
            runs_blocks=has(RunsBlocks, "block"),
            finishes=has(Finishes, "finish"),
            attaches=has(Attaches, "attach"),
            has_losses=has(HasLosses, "losses"),
            trains_in_phases=has(TrainsInPhases, "train_phase"),
        )

    @property
    def looks_first(self) -> bool:
        """It looks at the images in its own way before any block, so that no other pass can lend it its tokens."""
        return self.prepares or self.selects or self.plans

    @property
    def only_decides(self) -> bool:
        return not (self.prepares or self.selects or self.plans or self.runs_blocks or self.finishes)


# --- traits by their own names, as reducers said them before there were ``Traits`` ------------------------------------


class _Trait(Generic[T]):
    """One trait as an attribute: to read it is to read ``traits``, to set it is to set another ``traits``."""

    def __set_name__(self, owner: type, name: str) -> None:
        self.name = name

    def __get__(self, instance: TokenReducer | None, owner: type[TokenReducer]) -> T:
        traits = owner.traits if instance is None else instance.traits
        value: T = getattr(traits, self.name)
        return value

    def __set__(self, instance: TokenReducer, value: T) -> None:
        own = vars(instance)
        told: Traits = own.get("traits") or own.get("_traits") or type(instance).traits  # without asking a property
        said: dict[str, Any] = {self.name: value}
        instance.traits = replace(told, **said)


class _Live:
    """The ``traits`` of a class that tells some of them by properties."""

    def __init__(self, traits: Traits, names: frozenset[str]) -> None:
        self.traits = traits
        self.names = names

    def __get__(self, instance: TokenReducer | None, owner: type) -> Traits:
        if instance is None:
            return self.traits
        told: Traits = instance.__dict__.get("_traits", self.traits)
        return replace(told, **{name: getattr(instance, name) for name in self.names})

    def __set__(self, instance: TokenReducer, value: Traits) -> None:
        instance.__dict__["_traits"] = value


def _gather_traits(cls: type[TokenReducer]) -> None:
    """Put the traits that a class says one by one into its ``traits``, over those of the class it is made from."""
    said = {each.name: vars(cls)[each.name] for each in fields(Traits) if each.name in vars(cls)}
    if not said:
        return
    before = next(vars(each)["traits"] for each in cls.__mro__ if "traits" in vars(each))
    plain = {name: value for name, value in said.items() if not hasattr(value, "__get__")}
    live = said.keys() - plain.keys()
    if isinstance(before, _Live):
        live |= before.names - plain.keys()
    for name in plain:
        delattr(cls, name)
    told = replace(cls.traits, **plain)
    cls.traits = _Live(told, frozenset(live)) if live else told  # type: ignore[assignment]  # reads as Traits


class TokenReducer(nn.Module):
    """A token-reduction method with its settings. Subclasses keep each constructor argument under its own name."""

    name: ClassVar[str] = ""  # as registered
    summary: ClassVar[str] = ""  # one line
    source: ClassVar[str] = ""  # paper
    traits: Traits = Traits()  # of the method; an instance whose settings say otherwise sets its own

    scheduled_as: ClassVar[Literal["drop", "count"] | None] = "count"
    """What a schedule makes of its share at a block: ``Drop`` of the tokens that go, for methods that match pairs, or
    the ``Count`` of those that are left; None where the method has no count of its own at each block.
    """
    budgets: ClassVar[tuple[str, ...]] = ("count", "ratio", "drop")  # kinds its budget may be of, the natural one first
    searchable: ClassVar[Searchable] = {}  # what of a method that works off the shelf a search may try

    # what a method that must be trained declares; the finetuning does the rest
    schedule: ClassVar[Mapping[str, Any]] = {}  # settings of the training recipe that the method's publication asks for
    trained_as: ClassVar[str] = ""  # the published training in a sentence
    keeps_class_token_by: ClassVar[str] = "keep_class_token=True"  # the setting, where one may drop the class token

    adaptive = _Trait[bool]()
    trained = _Trait[bool]()
    site = _Trait[Site]()
    cuts_before_values = _Trait[bool]()
    needs_class_token = _Trait[bool]()
    may_drop_class_token = _Trait[bool]()
    needs_teacher = _Trait[bool]()
    uses_random = _Trait[bool]()
    uses_previous_attention = _Trait[bool]()
    uses_positions = _Trait[bool]()

    def __init_subclass__(cls, **named: Any) -> None:
        super().__init_subclass__(**named)
        _gather_traits(cls)

    def decide(self, signals: Signals, state: State) -> Decision | None:
        """What becomes of the tokens at this block; None leaves them alone."""
        raise NotImplementedError(f"{type(self).__name__} must say what it decides")

    @cached_property
    def steps(self) -> Steps:
        """Which of the optional steps it has."""
        return Steps.of(self)

    @property
    def only_decides(self) -> bool:
        """Reducers that only decide stack freely."""
        return self.steps.only_decides

    _attached: tuple[Any, ...] | None = None

    def join(self, host: Any, blocks: tuple[int, ...]) -> None:
        """Make the parameters for the model and the blocks it is placed at, once; ``reduce_tokens`` calls this."""
        if not self.steps.attaches:
            return
        about = (*host.shape, blocks)
        if self._attached is None:
            assert isinstance(self, Attaches)
            self.attach(host, blocks)
            self.to(device=host.like.device, dtype=host.like.dtype)
            self._attached = about
        elif self._attached != about:
            raise ReducerError(
                f"this {self.name} has parameters for another model or other blocks ({self._attached[-1]}, now "
                f"{blocks}); make a new one, or load the weights that were trained for these"
            )

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
