"""Cost, counted once and honestly: multiply-adds for each image, from the rows that were really computed.

One multiply-add counts 1, the convention of every table in this field (their "GFLOPs" are giga multiply-adds).
Linear layers, convolutions and the two attention products count; norms, softmax, biases and sorting do not
(methods 0.4).
"""

from __future__ import annotations

import copy
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn


@dataclass(frozen=True)
class BlockShape:
    """The widths of one block that its cost depends on."""

    width: int  # D
    attention_width: int  # heads x head width
    gated: bool
    mlp_row: int  # multiply-adds of the MLP for one token

    @classmethod
    def of(cls, block: Any) -> BlockShape:
        """Read off a timm block."""
        attention = block.attn
        mlp_row = sum(layer.weight.numel() for layer in block.mlp.modules() if isinstance(layer, nn.Linear))
        return cls(attention.qkv.in_features, attention.attn_dim, attention.gate is not None, mlp_row)

    def macs(self, *, queries: Tensor, keys: Tensor, outputs: Tensor, mlp: Tensor) -> Tensor:
        """Multiply-adds of one block, (B,) float64, from the rows each part computes (B,).

        ``queries`` rows get a query and a row of attention logits; ``keys`` rows a key and a value; ``outputs``
        rows are summed over the values, gated and projected; ``mlp`` rows pass the MLP.
        """
        queries, keys, outputs, mlp = queries.double(), keys.double(), outputs.double(), mlp.double()
        linear = self.width * self.attention_width
        logits = queries * (linear + keys * self.attention_width)
        summed = outputs * (linear * (2 if self.gated else 1) + keys * self.attention_width)
        return logits + 2 * linear * keys + summed + self.mlp_row * mlp


class CostMeter:
    """Adds up the cost of one forward pass, image by image. Exists only while tracing."""

    def __init__(self, images: int, device: torch.device) -> None:
        self.executed = torch.zeros(images, dtype=torch.float64, device=device)
        self.reference = torch.zeros_like(self.executed)
        self.reducer = torch.zeros_like(self.executed)

    def both(self, macs: Tensor | float) -> None:
        """Work that the published order of computation has as well."""
        self.executed = self.executed + macs
        self.reference = self.reference + macs

    def block(
        self, shape: BlockShape, *, entering: Tensor, queries: Tensor, leaving: Tensor, cut_before_values: bool
    ) -> None:
        """One block: as executed (``queries`` rows computed), and in the published order of work.

        Published methods compute all queries and attention rows, then cut: ATS before the rows meet the values
        (``cut_before_values``), the others after the attention residual.
        """
        self.executed = self.executed + shape.macs(queries=queries, keys=entering, outputs=queries, mlp=leaving)
        outputs = leaving if cut_before_values else entering
        self.reference = self.reference + shape.macs(queries=entering, keys=entering, outputs=outputs, mlp=leaving)

    def spend(self, macs: Tensor) -> None:
        """A reducer's own work."""
        self.reducer = self.reducer + macs
        self.executed = self.executed + macs


def linear_macs(module: nn.Module, *inputs: Tensor) -> int:
    """Multiply-adds for one image of all linear layers and convolutions in ``module``, by running a copy once on
    ``inputs`` (1, …).
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
