"""A second opinion on cost: fvcore's tracer, taught the two things it gets wrong on current timm.

Out of the box it has no handler for fused attention and reports 4.25 G for DeiT-S instead of 4.60, a mistake found
in print; and it counts LayerNorm, which the field's convention does not.
"""

from __future__ import annotations

import logging
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from reducers.runtime.driver import ReducedViT


def _attention_macs(inputs: list[Any], outputs: list[Any]) -> int:
    """Handle for ``scaled_dot_product_attention``: query-key and attention-value products. q (…, Nq, d),
    k and v (…, Nk, d).
    """
    query, key = inputs[0].type().sizes(), inputs[1].type().sizes()
    value = inputs[2].type().sizes()
    rows = 1
    for extent in query[:-1]:
        rows *= extent
    return int(rows * key[-2] * (query[-1] + value[-1]))


def _nothing(inputs: list[Any], outputs: list[Any]) -> int:
    """Handle for what the convention does not count; None would leave fvcore's own handler in place."""
    return 0


def fvcore_macs(model: nn.Module, images: Tensor) -> int:
    """Multiply-adds of one forward pass as fvcore traces it, for the whole batch given. Needs the fvcore package.

    Tracing freezes one data-dependent path, so trace one image at a time and never a padded batch.
    """
    from fvcore.nn import FlopCountAnalysis

    logging.getLogger("fvcore").setLevel(logging.ERROR)  # norms and softmax have no handler, and need none
    analysis = FlopCountAnalysis(_Watched(model) if isinstance(model, ReducedViT) else model, images)
    analysis.set_op_handle("aten::scaled_dot_product_attention", _attention_macs)
    for ignored in ("aten::layer_norm", "aten::rms_norm", "aten::batch_norm"):
        analysis.set_op_handle(ignored, _nothing)
    analysis.unsupported_ops_warnings(False).uncalled_modules_warnings(False)
    with torch.no_grad(), _hooks_as_before(model):
        return int(analysis.total())


class _Watched(nn.Module):
    """A reduced model as it runs on the images at hand: adaptive ones too, which refuse to be traced for others."""

    def __init__(self, model: ReducedViT) -> None:
        super().__init__()
        self.model = model
        self.training = model.training

    def forward(self, images: Tensor) -> Tensor:
        return self.model.unchecked(images)


@contextmanager
def _hooks_as_before(model: nn.Module) -> Iterator[None]:
    """Take away the hooks that fvcore leaves behind where the model cannot be traced."""
    kinds = ("_forward_hooks", "_forward_pre_hooks")
    before = [(getattr(module, kind), set(getattr(module, kind))) for module in model.modules() for kind in kinds]
    try:
        yield
    finally:
        for hooks, known in before:
            for added in set(hooks) - known:
                del hooks[added]
