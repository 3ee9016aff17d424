"""How a model is finetuned: a frozen, validated recipe, and the defaults of each kind of workload.

The defaults follow the papers: 30 epochs and a cosine schedule (ATS, EViT), EViT's finetuning rates, DeiT's
augmentation. The embedded workload has short ones of its own, fitted to minutes on a core.
"""

from __future__ import annotations

import dataclasses
import difflib
import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

from ablations.trial.free_settings import StageList, filled, free_kinds
from ablations.trial.labels import with_nested
from ablations.trial.stages import DENSE, Stages, Training
from reducers import Placement, ReducerError, build
from reducers.checks import checked_choice, checked_whole, checked_within

_ADDED_LATER: dict[str, Any] = {"freeze": 0.0, "target": None}  # settings, and what says nothing

Augment = Literal["none", "light", "strong"]
Amp = Literal["none", "bfloat16", "float16"]

_WHOLE = {"epochs": 1, "images": 1, "batch": 1, "accumulate": 1, "holdout": 0, "seed": 0}  # the least
_SHARE, _POSITIVE, _NOT_BELOW = {"low": 0.0, "high": 1.0}, {"low": 0.0, "above": True}, {"low": 0.0}
_WITHIN: dict[str, Any] = {
    "alpha": _SHARE, "tau": _POSITIVE, "lr": _POSITIVE, "clip": _POSITIVE,
    "target": {**_SHARE, "above": True}, "ema": {**_SHARE, "above": True},
    "smoothing": _SHARE, "drop_path": _SHARE, "freeze": _SHARE, "min_lr": _NOT_BELOW, "weight_decay": _NOT_BELOW,
    "warmup": _NOT_BELOW, "reducer_lr_scale": _NOT_BELOW, "keep_start": _NOT_BELOW, "keep_shrink": _NOT_BELOW,
    "mixup": _NOT_BELOW, "cutmix": _NOT_BELOW,
}  # fmt: skip
_CHOICES = {"augment": Augment, "amp": Amp}
_MAY_BE_NONE = ("images", "clip", "ema", "target")


class RecipeError(ValueError):
    """A recipe that cannot be followed; the message names the setting and the remedy."""


@dataclass(frozen=True)
class Distillation:
    """Learning from the dense model the training starts from: alpha tau^2 KL(teacher || student) + (1 - alpha) task.

    Both distributions are softened by the temperature ``tau`` (Hinton et al., 2015).
    """

    alpha: float = 0.5
    tau: float = 1.0

    def __post_init__(self) -> None:
        _check(self, lambda name, value: checked_within(value, f"distill.{name}", **_WITHIN[name]))


@dataclass(frozen=True)
class Recipe:
    """Everything that decides the trained weights, beside the initial weights and the images.

    Two equal recipes on equal weights and images give equal weights (bit for bit on a CPU with as many threads).
    """

    stages: Stages = DENSE  # the placement that is active in training; none: the dense model
    target: float | None = None  # what a free budget in stages is sought for: share of the plain model's multiply-adds
    epochs: int = 30
    images: int | None = None  # images an epoch sees; None: all of them
    batch: int = 128  # images computed at once …
    accumulate: int = 1  # … and how many such batches make one update
    opt: str = "adamw"  # any optimiser of timm's factory
    lr: float = 2e-5  # of an update, not scaled by the batch
    min_lr: float = 2e-6
    weight_decay: float = 1e-6
    warmup: float = 0.0  # epochs of linear warm-up from a tenth of lr
    reducer_lr_scale: float = 1.0  # of the reducers' own parameters, relative to lr
    freeze: float = 0.0  # share of the training during which the plain model's weights stand still; 1: to the end
    clip: float | None = None  # largest norm of the gradient
    keep_start: float = 0.0  # EViT's warm-up of the keep rate: 1 for so many epochs …
    keep_shrink: float = 0.0  # … then down a cosine to the budget over so many
    distill: Distillation | None = None
    augment: Augment = "strong"
    mixup: float = 0.8
    cutmix: float = 1.0
    smoothing: float = 0.1
    drop_path: float = 0.0  # of the last block; falls linearly to 0 at the first
    ema: float | None = None  # decay of the moving average of the weights, which then is the result
    amp: Amp = "bfloat16"
    holdout: int = 512  # training-side images, never trained on nor evaluated, for the accuracy after each epoch
    seed: int = 0

    def __post_init__(self) -> None:
        _check(self, _check_setting)
        self._check_together()

    def _check_together(self) -> None:
        free = free_kinds(self.stages.data)
        if free and self.target is None:
            raise RecipeError(
                f"a training needs a budget: write a number in place of {{{free.pop()}: auto}}, or name the cost that "
                "it is sought for, such as target: 0.5 for half of the plain model's multiply-adds"
            )
        if self.min_lr > self.lr:
            raise RecipeError(f"min_lr {self.min_lr:g} is above lr {self.lr:g}: the rate falls from lr to min_lr")
        if self.warmup >= self.epochs:
            raise RecipeError(f"a warmup of {self.warmup:g} epochs leaves nothing of {self.epochs}; give fewer")
        if self.keep_start + self.keep_shrink > self.epochs:
            raise RecipeError(
                f"the keep rate reaches its budget after keep_start + keep_shrink = "
                f"{self.keep_start + self.keep_shrink:g} epochs, the training ends after {self.epochs}"
            )
        if self.mixes and self.batch % 2:
            raise RecipeError(f"mixup and cutmix pair the images of a batch: make batch {self.batch} even")

    @property
    def mixes(self) -> bool:
        return self.mixup > 0 or self.cutmix > 0

    def placement(self, depth: int) -> Placement:
        """A fresh set of the reducers that are active in training; every budget must be known (``aim.settled``)."""
        if free_kinds(self.stages.data):
            raise RecipeError("a budget of this training is auto: it is sought when a spec runs; write a number here")
        return self.stages.placement(depth)

    def spec(self) -> dict[str, Any]:
        """The whole recipe as plain data, which ``parse_recipe`` reads back.

        A setting that was added later and says nothing is left out: finished trainings keep their digests.
        """
        whole = dataclasses.asdict(self) | {"stages": self.stages.plain()}
        asked = asked_of_training(self.stages.data)
        return {
            name: value
            for name, value in whole.items()
            if name in asked or name not in _ADDED_LATER or value != _ADDED_LATER[name]
        }

    def training(self) -> Training:
        """The recipe as trials name it."""
        return Training.of(self.spec())


_SCENES: dict[str, Any] = {
    "epochs": 3, "images": 2048, "batch": 64, "lr": 3e-4, "min_lr": 1e-6, "weight_decay": 0.01, "warmup": 0.25,
    "clip": 1.0, "augment": "light", "mixup": 0.0, "cutmix": 0.0, "smoothing": 0.05, "amp": "none",
    "holdout": 256,
}  # fmt: skip
_CLIPS: dict[str, Any] = {**_SCENES, "images": 1024, "batch": 32}  # eight frames each
DEFAULTS: dict[str, dict[str, Any]] = {"embedded": _SCENES, "embedded:v1": _SCENES, "moving_digits": _CLIPS}
"""What a workload changes in the defaults above."""


def parse_recipe(training: Training | str | Mapping[str, Any], *, workload: str) -> Recipe:
    """A trial's ``training`` (or JSON, or the mapping itself) with the defaults filled in.

    Those of the workload, and over them what the reducers in ``stages`` ask for (``TokenReducer.schedule``).
    """
    given = _mapping(training)
    fields = {field.name for field in dataclasses.fields(Recipe)}
    for name in given:
        if name not in fields:
            near = difflib.get_close_matches(str(name), fields, n=1)
            hint = f"; did you mean {near[0]!r}?" if near else ""
            raise RecipeError(f"unknown setting {name!r} of a training{hint}; there are {', '.join(sorted(fields))}")
    stages = given.get("stages", ())
    if not isinstance(stages, list | tuple) or not all(isinstance(stage, Mapping) for stage in stages):
        raise RecipeError(f"stages is a list such as [{{at: [3, 6, 9], stack: [...]}}]; got {stages!r:.80}")
    schedule = _schedule(asked_of_training(stages), given)
    values = {**DEFAULTS.get(workload, {}), **schedule, **given, "stages": stages}
    distill = values.get("distill")
    if distill is not None:
        values["distill"] = _distillation(distill)
    return Recipe(**values)


def parse_settings(pairs: Sequence[str]) -> dict[str, Any]:
    """``lr=1e-4 distill.tau=2`` of a command line as nested data; values are JSON, or text where they are none."""
    settings: dict[str, Any] = {}
    for pair in pairs:
        name, separator, text = pair.partition("=")
        if not separator:
            raise RecipeError(f"--set takes NAME=VALUE, such as lr=1e-4; got {pair!r}")
        try:
            value = json.loads(text)
        except ValueError:
            value = text
        outer, _, inner = name.partition(".")
        if inner:
            settings.setdefault(outer, {})[inner] = value
        else:
            settings[outer] = value
    return settings


def asked_of_training(stages: StageList) -> dict[str, dict[str, Any]]:
    """Setting -> method -> value: what the reducers of a placement ask of the recipe they are trained by."""
    known = {field.name for field in dataclasses.fields(Recipe)} - {"stages"}
    asked: dict[str, dict[str, Any]] = {}
    for stage in filled(stages):
        for part in stage["stack"] if "stack" in stage else [stage.get("reducer", {})]:
            for reducer in with_nested(build(part)):
                for name, value in reducer.schedule.items():
                    if name not in known:
                        raise RecipeError(
                            f"{reducer.name} asks for a training with {name!r}, which is no setting of one; in its "
                            f"schedule may stand {', '.join(sorted(known))}"
                        )
                    asked.setdefault(name, {})[reducer.name] = value
    return asked


def _schedule(asked: Mapping[str, Mapping[str, Any]], given: Mapping[str, Any]) -> dict[str, Any]:
    """One value for each setting that is asked for; where methods disagree, the training itself must decide."""
    for name, wishes in asked.items():
        values = list(wishes.values())
        if name not in given and any(value != values[0] for value in values):
            said = ", ".join(f"{method} {value!r}" for method, value in wishes.items())
            raise RecipeError(f"methods that are trained together ask for different {name} ({said}); give {name}")
    return {name: next(iter(wishes.values())) for name, wishes in asked.items()}


def _mapping(training: Training | str | Mapping[str, Any]) -> dict[str, Any]:
    training = training.plain() if isinstance(training, Training) else training
    if isinstance(training, str):
        try:
            training = json.loads(training)
        except ValueError as error:
            raise RecipeError(f"the training {training!r:.80} is no JSON ({error})") from error
    if not isinstance(training, Mapping):
        raise RecipeError(f"a training is a mapping such as {{epochs: 5, lr: 0.0001}}; got {training!r:.80}")
    return dict(training)


def _stages(data: Any) -> Stages:
    try:
        return Stages.of(data)
    except (TypeError, ValueError) as error:
        raise RecipeError(f"the stages of a training are plain data, as JSON has it ({error})") from error


def _distillation(value: object) -> Distillation:
    known = {field.name for field in dataclasses.fields(Distillation)}
    if not isinstance(value, Mapping) or not set(value) <= known:
        raise RecipeError(f"distill is written {{alpha: 0.5, tau: 1}}, or left out; got {value!r:.80}")
    return Distillation(**value)


def _check(settings: Any, checked: Callable[[str, Any], Any]) -> None:
    """Every setting as ``checked`` gives it: a number of another package as a plain one."""
    try:
        for field in dataclasses.fields(settings):
            object.__setattr__(settings, field.name, checked(field.name, getattr(settings, field.name)))
    except ReducerError as error:
        raise RecipeError(str(error)) from error


def _check_setting(name: str, value: Any) -> Any:
    if name == "stages":
        return value if isinstance(value, Stages) else _stages(value)
    if value is None and name in _MAY_BE_NONE:
        return None
    if name in _WHOLE:
        return checked_whole(value, name, least=_WHOLE[name])
    if name in _WITHIN:
        return checked_within(value, name, **_WITHIN[name])
    return checked_choice(value, _CHOICES[name], f"{name} …") if name in _CHOICES else value
