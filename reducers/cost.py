"""Cost, counted once and honestly: multiply-adds for each image, from the rows that were really computed.

One multiply-add counts 1, the convention of every table in this field (their "GFLOPs" are giga multiply-adds).
Linear layers, convolutions and the two attention products count; norms, softmax, biases and sorting do not.
"""

from __future__ import annotations

import copy
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn


@dataclass(frozen=True)
class BlockCost:
    """Multiply-adds of one block, by the rows that each part of it computes."""

    query_row: int  # projection of one query
    key_row: int  # of one key and its value
    pair: int  # of a query with one key, and of that key's value into the sum: heads x head width
    output_row: int  # gate and projection of one token's sum
    mlp_row: int

    def macs(
        self, *, queries: Tensor, keys: Tensor, outputs: Tensor, mlp: Tensor, beside: Tensor | None = None
    ) -> Tensor:
        """Multiply-adds of one block, (B,) float64, from the rows each part computes (B,).

        ``queries`` rows get a query and a row of attention logits; ``keys`` rows a key and a value; ``outputs``
        rows are summed over the values, gated and projected; ``mlp`` rows pass the MLP. Each query also meets so many
        keys ``beside`` that are projected elsewhere.
        """
        queries, keys, outputs, mlp = queries.double(), keys.double(), outputs.double(), mlp.double()
        met = keys if beside is None else keys + beside
        logits = queries * (self.query_row + met * self.pair)
        summed = outputs * (self.output_row + met * self.pair)
        return logits + self.key_row * keys + summed + self.mlp_row * mlp


class CostMeter:
    """Adds up the cost of one forward pass, sample by sample. Exists only while tracing.

    It may be told in multiply-adds of each sample (B,) or of each unit (U,): those of a sample lie side by side.
    """

    def __init__(self, samples: int, device: torch.device) -> None:
        self.executed = torch.zeros(samples, dtype=torch.float64, device=device)
        self.reference = torch.zeros_like(self.executed)
        self.reducer = torch.zeros_like(self.executed)

    def both(self, macs: Tensor | float) -> None:
        """Work that the published order of computation has as well."""
        macs = self._of_samples(macs)
        self.executed = self.executed + macs
        self.reference = self.reference + macs

    def block(
        self,
        cost: BlockCost,
        *,
        entering: Tensor,
        keys: Tensor,
        queries: Tensor,
        leaving: Tensor,
        published_keys: Tensor | None = None,
        mlp: Tensor | None = None,
        cut_before_values: bool = False,
        beside: Tensor | None = None,
    ) -> None:
        """One block: as executed (``queries`` rows and ``keys`` computed), and in the published order of work.

        Published methods compute all queries and attention rows, then cut: ATS before the rows meet the values
        (``cut_before_values``), the others after the attention residual. ``published_keys``: theirs, where those are
        others; ``mlp``: the rows that the MLP computes, where those are not all that leave.
        """
        mlp = leaving if mlp is None else mlp
        executed = cost.macs(queries=queries, keys=keys, outputs=queries, mlp=mlp, beside=beside)
        self.executed = self.executed + self._of_samples(executed)
        outputs = leaving if cut_before_values else entering
        keys = keys if published_keys is None else published_keys
        reference = cost.macs(queries=entering, keys=keys, outputs=outputs, mlp=mlp, beside=beside)
        self.reference = self.reference + self._of_samples(reference)

    def spend(self, macs: Tensor | float) -> None:
        """A reducer's own work."""
        macs = self._of_samples(macs)
        self.reducer = self.reducer + macs
        self.executed = self.executed + macs

    def _of_samples(self, macs: Tensor | float) -> Tensor | float:
        """What was told of each unit, by sample."""
        samples = self.executed.shape[0]
        if not isinstance(macs, Tensor) or macs.dim() == 0 or macs.shape[0] == samples:
            return macs
        return macs.view(samples, -1).sum(1)


def linear_macs(module: nn.Module, *inputs: Tensor) -> int:
    """Multiply-adds for one image of all linear layers and convolutions in ``module``,
    by running a copy once on ``inputs`` (1, …).
    """
    total = 0

    def count(layer: Any, _: tuple[Tensor, ...], output: Tensor) -> None:
        nonlocal total
        total += output.numel() * layer.weight[0].numel()  # each output is one dot product with a row of weights

    module = copy.deepcopy(
        module
    ).eval()  # hooks and modes of the original are its user's, and other threads may run it
    layers = [layer for layer in module.modules() if isinstance(layer, (nn.Linear, nn.Conv1d, nn.Conv2d, nn.Conv3d))]
    for layer in layers:
        layer.register_forward_hook(count)
    with torch.no_grad():
        module(*inputs)
    return total
