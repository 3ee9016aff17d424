"""What the runtime asks of a model: the one door between it and a library.

A ``Host`` is made once for a model and holds nothing of a pass; a ``HostBlock`` is a view of one of its blocks, made
when it is asked for; a ``Core`` is what that block's attention is over one batch. A library's models come in by one
file that implements these three, and one line in the table of ``reducers.hosts``. ``docs/hosts.md`` writes one.

Everything here reads the model as it is now, so that what its user changes after wrapping counts at the next call.
Defaults do nothing and cost nothing.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any, ClassVar, Literal

import torch
from torch import Tensor, nn

from reducers.cost import BlockCost
from reducers.errors import ReducerError
from reducers.maps import TokenMap
from reducers.recording import recording
from reducers.reducer import Input, TokenReducer
from reducers.tokens import Decided, Layout, TokenBatch, Units

Grid = tuple[int, int]
OVER: Mapping[str, Decided] = {"frame": "each", "clip": "together", "tube": "alike"}
"""Of clips whose frames are units: what the option ``over`` says that a budget counts -> what reducers decide on."""
Spread = Literal["share", "mean"]
Places = Literal["heaviest", "mean"]
"""The place of a token that stands for several: that of the heaviest of them, or the mean of their coordinates."""


@dataclass(frozen=True)
class Stage:
    """Blocks in a row that work at one width, on one grid."""

    first: int
    last: int  # the last of them, not the one behind
    grid: Grid | None  # rows and columns of patches; None where the model has no image size of its own
    width: int  # D, features of a token
    heads: int
    prefix: int  # class, distillation and register tokens that lead each image
    has_class_token: bool


def stage_of(block: int, stages: tuple[Stage, ...]) -> Stage:
    """The stage that a block belongs to."""
    return next(stage for stage in stages if block <= stage.last)


class Core(ABC):
    """One block's attention over one batch, as far as it is the model's own; the runtime does the rest.

    Parts are numbered query 0, key 1, value 2, and have the shape (T, H, d). ``x`` are the normed features (T, D).
    """

    own_key: ClassVar[bool] = True  # each token has a key of its own, in order and before all others of its unit

    def __init__(self, x: Tensor, layout: Layout) -> None:
        self.x = x
        self.layout = layout

    @property
    @abstractmethod
    def scale(self) -> float:
        """What logits are multiplied by."""

    @property
    def dropout(self) -> float:
        """The share of attention weights that is dropped now."""
        return 0.0

    @abstractmethod
    def project(self, x: Tensor, first: int, last: int) -> tuple[Tensor, ...]:
        """Parts ``first`` … ``last - 1`` of the given rows of ``x``, norms of queries and keys included.

        Keys and values are those of ``keys_layout``, whatever rows they come from.
        """

    @abstractmethod
    def out(self, summed: Tensor, rows: Tensor | None) -> Tensor:
        """From the values summed for the given packed rows (or all), (Tq, H d), to what the block adds: (Tq, D)."""

    def turn(self, part: Tensor, rows: Tensor | None) -> Tensor:
        """Queries or keys of the given packed rows (or all) as the logits take them: turned by their places (rope).

        What reducers are shown as keys is not turned: a similarity must not see places.
        """
        return part

    def mix(self, keys: Tensor, values: Tensor) -> tuple[Tensor, Tensor]:
        """Keys and values after an exchange between tokens (a shift in time); reducers see what comes of it."""
        return keys, values

    def pair_bias(self) -> Tensor | None:
        """Added to the logits of each pair: (B or 1, H or 1, L, L) padded, rows are queries; relative places."""
        return None

    @property
    def keys_layout(self) -> Layout:
        """Where keys and values lie, where they are not the tokens' own (cells of a coarser grid)."""
        return self.layout

    def to_tokens(self, cells: Tensor, how: Spread) -> Tensor:
        """From keys (K, ...) to tokens (T, ...): a cell's attention shared out, its key or value averaged."""
        return cells

    def biases(self, by_token: Tensor) -> Tensor:
        """What is added to the logits of each key (K,), from what attention to each token (T,) is weighted by."""
        return by_token

    def seen(self, alive: Tensor) -> Tensor | None:
        """(K,) in [0, 1] how far each key is seen, where a training mask leaves so much of each token, alive (T,);
        None: every key is seen whole.
        """
        return alive


@dataclass(frozen=True, eq=False)
class Grouping:
    """What attends among itself in one block, where that is not what the batch has as its units: windows."""

    rows: Tensor  # (T,) packed rows of the batch, unit by unit
    layout: Layout  # of the units
    pos: Tensor  # (T,) the place of each of these rows in its unit
    units: Units
    grid: Grid  # rows and columns of places in a unit
    patches: int  # tokens of the largest unit before anything was reduced


class HostBlock(ABC):
    """A view of one block: what is computed, in parts between which reducers decide."""

    keys_are_tokens: ClassVar[bool] = True  # else their number is not told by the number of tokens alone

    def __init__(self, module: nn.Module) -> None:
        self.module = module

    @property
    @abstractmethod
    def cost(self) -> BlockCost:
        """The widths that its cost depends on."""

    def grouping(self, batch: TokenBatch) -> Grouping | None:
        """The units of this block; None: those of the batch. In all that follows, the batch is one of these."""
        return None

    def allow(self, reducer: str, token_map: TokenMap) -> None:
        """Refuse what a reducer, by its name, decides in this block and the model cannot go on with."""
        return

    def fixed_macs(self, batch: TokenBatch) -> Tensor | None:
        """Multiply-adds beside attention and MLP, (B,) float64: ``before``, convolutions; None: there are none."""
        return None

    def key_counts(self, batch: TokenBatch) -> Tensor:
        """(B,) keys of each image, as ``Core.keys_layout`` would have them."""
        return batch.layout.lengths

    def mlp_rows(self, batch: TokenBatch) -> Tensor:
        """(B,) rows of each image that the MLP computes: all, but for copies of tokens that units share."""
        return batch.layout.lengths

    def keys_beside(self, batch: TokenBatch) -> Tensor | None:
        """(B,) keys that a query of each image meets beside those, and that cost no projection: the masked ones of a
        window. They count, as in every published cost.
        """
        return None

    def published_keys(self, batch: TokenBatch) -> Tensor:
        """(B,) keys of each image in the published order of work, where the runtime computes fewer."""
        return self.key_counts(batch)

    def arrive(self, batch: TokenBatch) -> TokenBatch:
        """The tokens as they come to the block, before any reducer of it acts (what is shown where they will be gone).
        Booked as nothing.
        """
        return batch

    def before(self, batch: TokenBatch) -> TokenBatch:
        """Work that no reducer at the attention site sees (attention over time)."""
        return batch

    @abstractmethod
    def core(self, batch: TokenBatch) -> Core:
        """The attention over the tokens that enter it."""

    @abstractmethod
    def after_attention(self, x: Tensor, added: Tensor, layout: Layout) -> Tensor:
        """x (T, D) and what attention adds: residual, its scale, stochastic depth. May write into ``added``."""

    def settle(self, batch: TokenBatch) -> TokenBatch:
        """After the reducers' decisions, before the MLP (class tokens that several frames share made equal)."""
        return batch

    @abstractmethod
    def after_mlp(self, x: Tensor, layout: Layout) -> Tensor:
        """x (T, D) through the MLP, residual included."""

    @property
    @abstractmethod
    def mlp(self) -> nn.Module:
        """The module that ``after_mlp`` calls token by token; STTABT masks its linear layers."""


class WholeBlock(ABC):
    """A block that no reducer enters and that takes all tokens to others at once: semantic tokens that ask a map."""

    @abstractmethod
    def run(self, batch: TokenBatch) -> TokenBatch:
        """What leaves the block."""

    @abstractmethod
    def macs(self, batch: TokenBatch) -> Tensor:
        """Multiply-adds for each image, (B,) float64, from the tokens that enter it."""


@dataclass(frozen=True)
class StochasticDepth:
    """A whole image's branch is dropped at once."""

    rate: float
    scale_by_keep: bool = True
    units: int = 1  # of an image, which share its fate

    def __call__(self, x: Tensor, layout: Layout) -> Tensor:
        keep = 1 - self.rate
        images = torch.empty(layout.images // self.units, dtype=x.dtype, device=x.device).bernoulli_(keep)
        if keep > 0 and self.scale_by_keep:
            images = images / keep
        if self.units > 1:
            images = images.repeat_interleave(self.units)
        return x * images[layout.row_image, None]


class PreNormBlock(HostBlock):
    """``x + s0(core(norm0 x)); x + s1(mlp(norm1 x))``, the one place where it is written.

    A host maps its library's names onto ``norm``, ``scale`` (LayerScale, gamma), ``depth`` and ``mlp``. Branch 0 is the
    attention, branch 1 the MLP.
    """

    trusted: ClassVar[tuple[str, ...]] = ("torch.nn.modules.",)  # modules of these packages keep none of their output

    @abstractmethod
    def norm(self, branch: int) -> nn.Module:
        """Before the branch."""

    def scale(self, branch: int) -> Callable[[Tensor], Tensor] | None:
        """Of what the branch adds; None: as it is."""
        return None

    def depth(self, branch: int) -> StochasticDepth | None:
        """What drops the branch of some images now."""
        return None

    @abstractmethod
    def attention(self, x: Tensor, batch: TokenBatch) -> Core:
        """Over the normed features x (T, D) of a batch."""

    @abstractmethod
    def attention_ends(self) -> tuple[nn.Module, ...]:
        """The modules one of which gave what ``Core.out`` returned."""

    def core(self, batch: TokenBatch) -> Core:
        return self.attention(self.norm(0)(batch.x), batch)

    def after_attention(self, x: Tensor, added: Tensor, layout: Layout) -> Tensor:
        return self._add(0, x, added, layout, self.attention_ends())

    def after_mlp(self, x: Tensor, layout: Layout) -> Tensor:
        mlp = self.mlp
        return self._add(1, x, mlp(self.norm(1)(x)), layout, (mlp,))

    def _add(self, branch: int, x: Tensor, added: Tensor, layout: Layout, ends: tuple[nn.Module, ...]) -> Tensor:
        scale, drop = self.scale(branch), self.depth(branch)
        if scale is not None:
            added = scale(added)
            if isinstance(scale, nn.Module):
                ends = (*ends, scale)
        if drop is not None:
            added = drop(added, layout)
        return add_residual(x, added, ends, self.trusted)


def add_residual(x: Tensor, added: Tensor, sources: tuple[nn.Module, ...], trusted: tuple[str, ...]) -> Tensor:
    """x + added, in the memory of ``added`` where no one can ask for it again: no gradient, and none of ``sources``,
    whose output it is.
    """
    if recording() or added.dtype != x.dtype:  # autocast: the sum keeps the wider type
        return x + added
    if torch.compiler.is_compiling() or any(_may_keep(source, trusted) for source in sources):
        return x + added
    return added.add_(x)


def _may_keep(module: nn.Module, trusted: tuple[str, ...]) -> bool:
    """Whether a hook on the module, or code of its user's own in it, may hold on to its output."""
    if module._forward_hooks or module._forward_pre_hooks or "forward" in module.__dict__:
        return True
    if not type(module).__module__.startswith(trusted):
        return True
    return any(_may_keep(part, trusted) for part in module._modules.values() if part is not None)


@dataclass(frozen=True)
class Call:
    """One call of a model as its library has it."""

    images: Tensor
    restore: str | None = None  # by which rule tokens are put back in their places, where the answer holds them
    resized: bool = False  # the images have another size than the model's, and positions are interpolated
    options: Mapping[str, Any] = field(default_factory=dict)  # the library's own, for ``Host.answer``


@dataclass(frozen=True)
class Family:
    """Models of a library that a host drives: a row of docs/families.md."""

    name: str  # as the library's module has it
    about: str
    travels: str = "nothing beside the features"  # what a token takes along for the model's sake
    refused: Mapping[str, tuple[str, ...]] = field(default_factory=dict)  # why -> entry points


class Host(ABC):
    """A model of a library, as the runtime drives it and as reducers may ask of it."""

    library: ClassVar[str] = ""
    families: ClassVar[tuple[Family, ...]] = ()
    inputs: ClassVar[Input] = "images"
    """What the model reads: images (B, C, H, W), or clips (B, F, C, H, W). What is said of images here is said of clips
    then. Patches of a clip are numbered frame by frame, each frame's row by row. Where a clip is one unit, its grid is
    the frames' grids one below the other."""
    options: ClassVar[Mapping[str, tuple[str, ...]]] = {}
    """What a user may choose of how the model is driven: name -> values, the first one its default."""

    @classmethod
    def entry_points(cls, family: Family) -> list[str]:
        """The models of a family by the names under which the library makes them, refused ones included."""
        return []

    def __init__(
        self, model: nn.Module, *, places: Places = "heaviest", options: Mapping[str, str] | None = None
    ) -> None:
        self.model: Any = model
        self.places = places
        self.chosen = {name: values[0] for name, values in self.options.items()} | dict(options or {})

    # --- whether it can be driven ---

    @abstractmethod
    def check(self) -> None:
        """Refuse a model that could not be run exactly, with ``UnsupportedModel``: the cause, and what is supported.

        Asked when the model is wrapped and again at each call, as its user may change it in between.
        """

    @property
    def mean_places(self) -> str | None:
        """Why this model cannot be asked for ``places="mean"``; None: it can."""
        return "its blocks ask no token for its place"

    # --- facts ---

    @property
    @abstractmethod
    def stages(self) -> tuple[Stage, ...]:
        """The blocks, first to last; most models have one stage."""

    @property
    def depth(self) -> int:
        """Blocks at which a reducer may be placed, through all stages."""
        return self.stages[-1].last + 1

    @property
    def embedded(self) -> int:
        """How many blocks, from block 0 on, are a part of ``embed``: the runtime starts behind them, and no reducer
        acts there. They keep their numbers, and their cost is that of ``embed_macs``.
        """
        return 0

    @property
    def embedded_as(self) -> str:
        """Why no reducer acts in those, for messages."""
        return "they are a part of the embedding"

    @property
    def regroups(self) -> bool:
        """Whether blocks have units of their own (``HostBlock.grouping``). Then what a block costs does not follow from
        the number of tokens alone, and a method that runs blocks itself is refused.
        """
        return False

    @property
    def between_units(self) -> str | None:
        """What blocks do between units by the places of their tokens (``HostBlock.before``), in words for messages;
        None: nothing. Then the same holds as where they regroup.
        """
        return None

    @property
    def shares_class_token(self) -> bool:
        """Whether the units of a sample have copies of one class token (``Units.shared``), which no reducer drops."""
        return False

    @property
    def first_free(self) -> int:
        """The first block at which a reducer may act; all later ones take one too, but for those that are closed."""
        return self.embedded

    @property
    def closed(self) -> Mapping[int, str]:
        """Later blocks that take no reducer, each with the reason, in words for messages."""
        return {}

    def unfit(self, reducer: TokenReducer) -> str | None:
        """Why this model has no use for a reducer, by what its traits and steps tell; None: it may act."""
        return None

    @property
    @abstractmethod
    def classes(self) -> int:
        """Logits of an image."""

    @property
    @abstractmethod
    def final_norm(self) -> nn.Module:
        """What tokens pass between the last block and the head, each by itself."""

    @property
    @abstractmethod
    def read_prefix(self) -> int | None:
        """How many prefix tokens the head reads, the first ones, where it reads no patch; None where it does."""

    @property
    def head_words(self) -> str:
        """What the head reads, in the library's words: for messages."""
        return "its head reads " + ("patches" if self.read_prefix is None else "prefix tokens")

    @property
    @abstractmethod
    def channels(self) -> int:
        """Of an image."""

    @property
    @abstractmethod
    def image_size(self) -> tuple[int, int]:
        """Height and width that the model was made for."""

    @property
    def frames(self) -> int:
        """Of a clip that the model was made for; of an image 1."""
        return 1

    @property
    def steps(self) -> int:
        """How many grids of patches a clip has: its frames, or fewer where a patch is several frames deep."""
        return self.frames

    @property
    def tubelet(self) -> tuple[int, int, int]:
        """Frames, rows and columns of pixels of a patch; told of clips alone."""
        raise ReducerError(f"{type(self.model).__name__} does not tell how many frames and pixels a patch has")

    @property
    def units(self) -> int:
        """How many units a sample has from the embedding on: the frames of a clip, where each attends by itself."""
        return 1

    @property
    def decided(self) -> Decided:
        """What reducers decide on (``Units.decided``)."""
        return "each"

    @property
    def entry(self) -> Stage:
        """The stage of the first block that the runtime runs: what ``embed`` gives belongs to it."""
        return stage_of(self.embedded, self.stages)

    @property
    def width(self) -> int:
        """Features of a token of ``embed``."""
        return self.entry.width

    @property
    def heads(self) -> int:
        return self.entry.heads

    @property
    def prefix(self) -> int:
        """Prefix tokens of ``embed``."""
        return self.entry.prefix

    @property
    def has_class_token(self) -> bool:
        return self.entry.has_class_token

    @property
    def grid(self) -> Grid:
        """Rows and columns of the patches of ``embed`` that the model was made for."""
        grid = self.entry.grid
        if grid is None:
            raise ReducerError("the model has no image size of its own; create it with img_size=…")
        return grid

    @property
    def map_grid(self) -> Grid:
        """Rows and columns of the map that leaves the last block, patches restored: those of the last stage."""
        return self.stages[-1].grid or self.grid

    @property
    def patches(self) -> int:
        """Patch tokens of ``embed`` at the size the model was made for."""
        rows, columns = self.grid
        return rows * columns

    @property
    def reads_prefix_alone(self) -> bool:
        """The head reads prefix tokens (class, distillation) and no patch."""
        return self.read_prefix is not None

    @property
    def like(self) -> Tensor:
        """A parameter of the model: its dtype and device are those of parameters a reducer adds."""
        parameter: Tensor = next(self.model.parameters())
        return parameter

    @property
    def shape(self) -> tuple[Any, ...]:
        """What a reducer's parameters may depend on."""
        return self.width, self.heads, self.depth, self.prefix, self.grid

    @property
    def checkpoints(self) -> bool:
        """Whether the model's user asked for gradient checkpointing."""
        return False

    # --- images ---

    def blank(self) -> Tensor:
        """One image of zeros, or clip, of the model's own size."""
        size = (self.frames, self.channels) if self.inputs == "clips" else (self.channels,)
        return self.like.new_zeros(1, *size, *self.image_size)

    @abstractmethod
    def grid_of(self, images: Tensor) -> Grid:
        """Rows and columns of patches of these images, which may have another size."""

    def whole_patches(self, images: Tensor) -> tuple[Grid, Grid]:
        """Rows and columns of patches of images that are to be resized, and the pixels of a patch; images that the
        model does not take are refused.
        """
        raise ReducerError(f"images cannot be resized for {type(self.model).__name__}")

    def lattice_of(self, images: Tensor) -> tuple[int, int, int]:
        """Steps in time, rows and columns of patches of these clips, which may have another size; of images 1 step."""
        return 1, *self.grid_of(images)

    def whole_steps(self, images: Tensor) -> tuple[int, int]:
        """Steps in time of clips that are to be made shorter, and of how many a length must be a multiple; clips that
        the model does not take are refused.
        """
        raise ReducerError(f"clips cannot be made shorter for {type(self.model).__name__}")

    def shortened(self, images: Tensor) -> Host:
        """This host for clips of fewer frames (``reducers.frames``), for one pass: it says that it was made for so
        many. Of images and clips as the model takes them it is never asked.
        """
        raise ReducerError(f"clips cannot be made shorter for {type(self.model).__name__}")

    @abstractmethod
    def embed(self, images: Tensor, *, resized: bool = False, track: bool = False) -> TokenBatch:
        """Images -> the tokens that enter the first block that is no part of this (``embedded``). ``resized``: a
        reducer made them smaller, so positions must be interpolated; ``track``: each token's place is asked for. A host
        whose blocks ask for places always tracks them.
        """

    def relocated(self, tables: Any, original: Tensor, patches: int) -> Any:
        """``TokenBatch.tables`` of resized images, when places come to be counted among the ``patches`` of the images
        as they were given; original: (N,) the number there of each place of ``embed``.
        """
        return tables

    @abstractmethod
    def embed_macs(self, images: Tensor, *, resized: bool = False) -> int:
        """Multiply-adds of ``embed`` for one image."""

    # --- blocks ---

    @abstractmethod
    def block(self, index: int) -> HostBlock:
        """A view of a block as it is now."""

    def whole(self, index: int) -> WholeBlock | None:
        """The block, where it is closed and computes by itself; None: it is one of those that ``block`` gives."""
        return None

    def plain(self, first: int, last: int, batch: TokenBatch) -> TokenBatch | None:
        """Blocks ``first`` … ``last - 1`` of one stage by the library's own code; None where it would not compute the
        same. Asked only where all images are alike and nothing but features and places travels.
        """
        return None

    @property
    def borders(self) -> list[int]:
        """First blocks of the stages that the runtime enters (``enter``)."""
        return [stage.first for stage in self.stages if stage.first > self.embedded]

    @property
    def fill(self) -> str:
        """The rule of ``reducers.restore`` by which the whole map is put together where a later stage begins."""
        return self.chosen.get("fill", "last")

    def enter(self, block: int, batch: TokenBatch, whole: Callable[[], Tensor]) -> TokenBatch:
        """What lies before the first block of a later stage: the tokens of its own grid, all of them. ``whole`` gives
        the map of patches it is made of, (B, N0, D), with features in the places of those that were dropped.
        """
        return batch

    def parents(self, block: int, batch: TokenBatch) -> Tensor | None:
        """(N0,) int64: the patch of that stage in which each of the stage before has its part; None: the grid stays."""
        return None

    def enter_macs(self, block: int, batch: TokenBatch) -> Tensor | float:
        """Multiply-adds of it for each image, (B,) float64 or one number."""
        return 0.0

    # --- the head ---

    @abstractmethod
    def classify(self, batch: TokenBatch) -> Any:
        """Logits (B, classes) of the tokens that leave the last block: final norm, pool and head."""

    def pooled(self, batch: TokenBatch) -> Tensor:
        """(B, D) what the head reads of the tokens that leave the last block, before its classifier."""
        raise ReducerError(f"what the head of {type(self.model).__name__} reads is not told; ask its logits")

    def token_features(self, x: Tensor) -> Tensor:
        """Tokens (..., D) that leave the last block as the library hands them out: most pass the final norm first."""
        features: Tensor = self.final_norm(x)
        return features

    def asked(self, images: Tensor | None, named: Mapping[str, Any]) -> Call:
        """What a call of the reduced model asks, in the library's own words (``pixel_values=…``).

        Raises:
            TypeError: an argument that the library does not know.
        """
        if named or images is None:
            wrong = f"got an unexpected argument {next(iter(named))!r}" if named else "needs the images"
            raise TypeError(f"a reduced {type(self.model).__name__} {wrong}: call it as fast(images)")
        return Call(images)

    def answer(self, batch: TokenBatch, call: Call, tokens: Callable[[], Tensor] | None) -> Any:
        """What the library's own forward returns; ``tokens`` gives all of them (B, P + N0, D), patches restored, and
        is there where ``Call.restore`` asks for them.
        """
        return self.classify(batch)

    def head_macs(self, layout: Layout) -> Tensor:
        """Multiply-adds of pool and head for each image, (B,) float64."""
        macs = float(self.classifier_macs)
        return torch.full((layout.images,), macs, dtype=torch.float64, device=layout.lengths.device)

    @property
    @abstractmethod
    def classifier_macs(self) -> int:
        """Multiply-adds of the linear layers that make logits, for one image."""

    @abstractmethod
    def behind(self, block: int) -> Iterable[nn.Module]:
        """The modules that compute from this block on: blocks, final norm, pool and head."""
