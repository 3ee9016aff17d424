"""What changes from update to update: the learning rate by timm's scheduler, the keep rate by EViT's warm-up."""

from __future__ import annotations

import math
from fractions import Fraction
from typing import Any

from timm.optim import create_optimizer_v2, param_groups_weight_decay
from timm.scheduler import create_scheduler_v2
from timm.scheduler.scheduler import Scheduler
from torch import nn
from torch.optim import Optimizer

from ablations.trial.recipe import Recipe
from reducers import Budget, Count, Drop, Ratio

_WARMUP_FROM = 0.1  # of the learning rate


def make_optimizer(model: nn.Module, reducers: nn.Module, recipe: Recipe) -> Optimizer:
    """timm's optimiser over the model's parameters and the reducers' own, biases and norms without weight decay."""
    exempt: Any = getattr(model, "no_weight_decay", set)  # position embedding and class token, as timm has it
    groups: list[dict[str, Any]] = list(
        param_groups_weight_decay(model, recipe.weight_decay, no_weight_decay_list=exempt())
    )
    for group in param_groups_weight_decay(reducers, recipe.weight_decay, no_weight_decay_list=undecayed(reducers)):
        if group["params"]:
            groups.append({**group, "lr_scale": recipe.reducer_lr_scale})  # timm's schedulers multiply by it
    return create_optimizer_v2(groups, opt=recipe.opt, lr=recipe.lr, weight_decay=recipe.weight_decay)


def undecayed(reducers: nn.Module) -> set[str]:
    """The names of the parameters that reducers ask, as timm's models do, to leave without weight decay."""
    found: set[str] = set()
    for place, module in reducers.named_modules():
        if hasattr(module, "no_weight_decay"):
            own: Any = module.no_weight_decay
            found |= {f"{place}.{name}" for name in own()}
    return found


def make_scheduler(optimizer: Optimizer, recipe: Recipe, *, updates_per_epoch: int) -> Scheduler:
    """timm's cosine with linear warm-up, set by ``step_update(update)``: a pure function of the update's number."""
    scheduler, _ = create_scheduler_v2(
        optimizer,
        sched="cosine",
        num_epochs=recipe.epochs,
        min_lr=recipe.min_lr,
        warmup_lr=recipe.lr * _WARMUP_FROM,
        warmup_epochs=recipe.warmup,  # type: ignore[arg-type]  # only ever multiplied by updates_per_epoch
        step_on_epochs=False,
        updates_per_epoch=updates_per_epoch,
    )
    assert scheduler is not None, "a cosine was asked for"
    return scheduler


def warm_share(epoch: float, *, start: float, shrink: float) -> float:
    """How much of the reduction is still held back: 1 up to ``start``, then half a cosine to 0 over ``shrink`` epochs.

    EViT (Liang et al., 2022): its keep rate is r + (1 - r) times this, updated every iteration.
    """
    if epoch < start:
        return 1.0
    if shrink <= 0 or epoch >= start + shrink:
        return 0.0
    return 0.5 * (1 + math.cos(math.pi * (epoch - start) / shrink))


def warmed(budget: Budget, share: float, *, patches: int) -> Budget:
    """A budget with ``share`` of its reduction held back; at 1 everything stays, at 0 it is the budget itself."""
    if share <= 0:
        return budget
    if isinstance(budget, Ratio):
        rate = float(budget.value) + (1 - float(budget.value)) * share
        return Ratio(Fraction(min(1.0, rate)), budget.of, budget.rounding, budget.count_prefix)
    if isinstance(budget, Count):
        return Count(max(budget.value, round(budget.value + (patches - budget.value) * share)))
    if isinstance(budget, Drop):
        return Drop(round(budget.value * (1 - share)))
    return budget


class KeepSchedule:
    """The keep-rate warm-up of every budget below some reducers, selectors and members of stacks included."""

    def __init__(self, reducers: nn.Module, recipe: Recipe, *, patches: int) -> None:
        self._start, self._shrink, self._patches = recipe.keep_start, recipe.keep_shrink, patches
        found = ((module, getattr(module, "budget", None)) for module in reducers.modules())
        self._budgets = [(module, budget) for module, budget in found if isinstance(budget, Budget)]

    def set(self, epoch: float) -> float:
        """Give every reducer its budget for this moment; the share of the reduction that is held back."""
        share = warm_share(epoch, start=self._start, shrink=self._shrink)
        for reducer, budget in self._budgets:
            setattr(reducer, "budget", warmed(budget, share, patches=self._patches))  # noqa: B010  (a Module to mypy)
        return share

    def finish(self) -> None:
        """Give every reducer the budget it is meant to have."""
        for reducer, budget in self._budgets:
            setattr(reducer, "budget", budget)  # noqa: B010
