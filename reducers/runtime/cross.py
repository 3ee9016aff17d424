"""A block whose queries come from one sequence and whose keys and values come from another.

With both the same it is the plain block: all its parts are honoured as in ``run_block``.
"""

from __future__ import annotations

from dataclasses import replace

import torch
from torch import Tensor
from torch.nn import functional as F

from reducers.hosts.protocol import HostBlock
from reducers.runtime.attention import PackedAttention
from reducers.tokens import TokenBatch


def cross_block(
    block: HostBlock,
    asking: Tensor,
    asked: Tensor,
    residual: Tensor | None = None,
    *,
    patches: int = 0,
    of: TokenBatch | None = None,
) -> Tensor:
    """Attention of ``asking`` (B, Q, D) over ``asked`` (B, K, D), then the MLP: (B, Q, D).

    ``residual`` (B, Q, D) is what the attention is added to; left out, it is ``asking``. The last ``patches`` of what
    is asked are all patches of the image in their places, no other token has one; where the batch ``of`` which all is
    made knows places, the block is told.
    """
    own, other = (
        PackedAttention(block.core(_batch(x, placed, of)), None) for x, placed in ((asking, 0), (asked, patches))
    )
    x = (asking if residual is None else residual).flatten(0, 1)
    x = block.after_attention(x, own.rows_out(None, own.layout, of=other), own.layout)
    return block.after_mlp(x, own.layout).view(asking.shape)


def _batch(x: Tensor, patches: int, of: TokenBatch | None) -> TokenBatch:
    batch = TokenBatch.from_images(x, prefix=0, has_class_token=False, track=False)
    if of is None or of.pos is None:
        return batch
    places = F.pad(torch.arange(patches, device=x.device), (x.shape[1] - patches, 0), value=-1)
    return replace(batch, pos=places.repeat(len(x)), tables=of.tables)
