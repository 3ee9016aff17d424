"""What placements have in common on one batch of images: the dense model's tokens on their way through the blocks."""

from __future__ import annotations

from torch import Tensor, nn

from reducers.errors import ReducerError
from reducers.noise import image_keys
from reducers.tokens import TokenBatch


class Shared:
    """The plain model's tokens entering a block, for one model and one batch of images.

    Every placement that leaves the first blocks alone computes the same there. Handed from one reduced model's
    ``trace`` to the next, a ``Shared`` spares them that work and changes no bit of any result. Hand it on in ascending
    order of ``first_block``: each model then goes on from where the one before it started to reduce. It holds one
    tensor (T, D) for each different first block; drop it with the images.
    """

    def __init__(self) -> None:
        self._owner: tuple[nn.Module, Tensor] | None = None
        self._entering: dict[int, TokenBatch] = {}
        self._keys: Tensor | None = None

    def claim(self, base: nn.Module, images: Tensor) -> None:
        """Say whose tokens these are; another model or other images are refused."""
        if base.training:
            raise ReducerError(
                "Shared holds tokens of a model in eval mode: in training, dropout makes every pass another"
            )
        if self._owner is None:
            self._owner = base, images
        elif self._owner[0] is not base or self._owner[1] is not images:
            raise ReducerError("this Shared holds tokens of another model or of other images; make one for each batch")

    def image_keys(self, images: Tensor) -> Tensor:
        """The images' keys for random numbers, computed once."""
        if self._keys is None:
            self._keys = image_keys(images)
        return self._keys

    def put(self, block: int, batch: TokenBatch) -> None:
        """Remember the tokens that enter a block, nothing having been reduced before it."""
        self._entering.setdefault(block, batch)

    def latest(self, block: int) -> tuple[int, TokenBatch] | None:
        """The deepest block up to the given one whose entering tokens are known."""
        known = [index for index in self._entering if index <= block]
        return (max(known), self._entering[max(known)]) if known else None
