"""Which images an update sees: a seeded order, from any update on, through torch's loader."""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import DataLoader

from ablations.trial.recipe import Recipe, RecipeError
from ablations.workloads.photographs import sample_seed
from ablations.workloads.training import TrainingImages


def images_per_epoch(recipe: Recipe, available: int) -> int:
    """Images of one epoch, a whole number of updates; what is left over has its turn in a later epoch."""
    wanted = recipe.images or available
    step = recipe.batch * recipe.accumulate
    if wanted < step:
        raise RecipeError(
            f"an epoch of {wanted} images is less than one update of batch {recipe.batch} x accumulate "
            f"{recipe.accumulate}: lower one of them, or give more images"
        )
    return wanted // step * step


def epoch_order(epoch: int, *, images: int, available: int, seed: int) -> np.ndarray:
    """The images of an epoch, (images,) int64. None comes twice before all have been seen.

    All epochs together walk through one shuffle of everything after the other: an epoch of 4096 out of 24 576 images
    is the next sixth of the present shuffle.
    """
    places = np.arange(epoch * images, (epoch + 1) * images)
    order = np.empty(images, dtype=np.int64)
    for number in np.unique(places // available):
        shuffle = np.random.RandomState(sample_seed("order", seed, number)).permutation(available)
        here = places // available == number
        order[here] = shuffle[places[here] % available]
    return order


class _Batches:
    """What torch's loader is to fetch: lists of (epoch, image), from a batch of an epoch on."""

    def __init__(self, order: np.ndarray, *, epoch: int, batch: int, first: int) -> None:
        self._order, self._epoch, self._batch, self._first = order, epoch, batch, first

    def __len__(self) -> int:
        return len(self._order) // self._batch - self._first

    def __iter__(self) -> Iterator[list[tuple[int, int]]]:
        for start in range(self._first * self._batch, len(self._order), self._batch):
            yield [(self._epoch, int(index)) for index in self._order[start : start + self._batch]]


def epoch_batches(
    images: TrainingImages, recipe: Recipe, *, epoch: int, first: int, workers: int, pin: bool
) -> Iterator[tuple[Tensor, Tensor]]:
    """The micro-batches of an epoch from number ``first`` on: images (b, C, H, W) and labels (b,)."""
    order = epoch_order(epoch, images=images_per_epoch(recipe, len(images)), available=len(images), seed=recipe.seed)
    loader = DataLoader(
        images,
        batch_sampler=_Batches(order, epoch=epoch, batch=recipe.batch, first=first),
        num_workers=workers,
        pin_memory=pin,
        generator=torch.Generator().manual_seed(0),  # else each epoch would draw from the training's own generator
    )
    yield from loader
