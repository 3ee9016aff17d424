"""A block whose queries come from one sequence and whose keys and values come from another.

With both the same it is the plain block: all its parts are honoured as in ``run_block``.
"""

from __future__ import annotations

from timm.layers.attention import Attention
from timm.models.vision_transformer import Block
from torch import Tensor

from reducers.runtime.attention import PackedAttention
from reducers.runtime.block import drop_path
from reducers.tokens import Layout


def cross_block(block: Block, asking: Tensor, asked: Tensor, residual: Tensor | None = None) -> Tensor:
    """Attention of ``asking`` (B, Q, D) over ``asked`` (B, K, D), then the MLP: (B, Q, D).

    ``residual`` (B, Q, D) is what the attention is added to; left out, it is ``asking``.
    """
    attn = block.attn
    assert isinstance(attn, Attention)  # check_model saw to it
    queries, keys = (Layout.alike(x.shape[0], x.shape[1], 0, x.device) for x in (asking, asked))
    own, other = (
        PackedAttention(attn, block.norm1(x.flatten(0, 1)), layout, None)
        for x, layout in ((asking, queries), (asked, keys))
    )
    x = (asking if residual is None else residual).flatten(0, 1)
    x = x + drop_path(block.drop_path1, block.ls1(own.rows_out(None, queries, of=other)), queries)
    x = x + drop_path(block.drop_path2, block.ls2(block.mlp(block.norm2(x))), queries)
    return x.view(asking.shape)
