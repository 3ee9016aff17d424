"""PatchMerger: M learned queries attend to the patches and take their place (Renggli et al., 2022)."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from reducers.kit.learned_pooling import LearnedPooling, Pooler, softmax_over_tokens
from reducers.registry import register


class Merger(Pooler):
    """softmax(Q LN(x)^T) LN(x), without any scaling; queries Q (M, D) start from a normal distribution."""

    def __init__(self, width: int, count: int) -> None:
        super().__init__(count)
        self.norm = nn.LayerNorm(width)
        self.queries = nn.Parameter(torch.randn(count, width))

    def forward(self, x: Tensor, valid: Tensor, grid: tuple[int, int]) -> tuple[Tensor, Tensor]:
        x = self.norm(x)
        wide = torch.promote_types(x.dtype, torch.float32)
        with torch.autocast(x.device.type, enabled=False):  # without a scale they are large
            logits = self.queries.to(wide) @ x.to(wide).transpose(1, 2)
        weights = softmax_over_tokens(logits, valid)
        return weights, weights.to(x.dtype) @ x

    def macs(self, patches: Tensor) -> Tensor:
        return 2 * patches * self.queries.numel()  # logits, mix


@register("patch_merger")
class PatchMerger(LearnedPooling):
    """Replace the patch tokens by as many mixes of them as there are learned queries.

    Each query attends to the normed patches, without scaling, and the weights of its softmax over them mix the normed
    patches; so what leaves is normed, as published. One layer norm and the queries are learned at each block.
    Published: once, in the middle of the network, 8 tokens [R]: ``at(6, PatchMerger(Count(8)))``. Each new token stands
    for one. Acts before the block; the count is fixed. It cannot be the identity and works only after training.

    Args:
        budget: number that leaves, counted from the patches that enter the model, whatever enters the block; an image
            with no more than that is left as it is [D]. ``Ratio`` rounds down.
    """

    summary = "learned queries attend to the patches and take their place"
    source = "Renggli et al., 2022 (arXiv 2202.12015)"
    trained_as = "by the task loss, with the network from its beginning; by Haurum et al. 30 epochs from DeiT"

    def pooler(self, width: int, count: int) -> Merger:
        return Merger(width, count)
