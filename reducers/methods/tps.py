"""TPS: what is pruned is squeezed into the tokens that stay (Wei et al., CVPR 2023).

Each pruned patch goes to the kept patch it resembles most, its host, by cosine of their features. A host becomes the
mean of itself, at weight e, and its guests, at weight exp(cosine): a guest that is its equal counts as much as itself.
dTPS prunes by DynamicViT's predictors, eTPS by EViT's class attention.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor
from torch.nn import functional as F

from reducers.decision import Decision
from reducers.kit.keep_predictor import PredictedKeep
from reducers.kit.selection import Ranked
from reducers.maps import Keep, Mask, Merge
from reducers.reducer import Searchable, State
from reducers.registry import register
from reducers.signals import Signals
from reducers.tokens import Layout


def _unit(x: Tensor) -> Tensor:
    """Features of length 1, at least float32."""
    return F.normalize(x.to(torch.promote_types(x.dtype, torch.float32)), dim=-1)


@torch.no_grad()
def nearest_host(guests: Tensor, hosts: Tensor, valid: Tensor) -> Tensor:
    """The host of highest cosine for each guest, of equals the first; no gradient passes through the choice.

    guests (B, Q, D), hosts (B, K, D), valid (B, K) bool: which of the hosts are any -> (B, Q) int64
    """
    if hosts.shape[1] == 0:  # no image has a patch left
        return torch.zeros(guests.shape[:2], dtype=torch.int64, device=guests.device)
    with torch.autocast(guests.device.type, enabled=False):
        cosine = _unit(guests) @ _unit(hosts).transpose(1, 2)
        return cosine.masked_fill(~valid[:, None], -torch.inf).argmax(dim=2)


def affinity(guests: Tensor, hosts: Tensor) -> Tensor:
    """exp(cosine) of each guest and its own host, (R, D) each -> (R,); gradients reach both."""
    return (_unit(guests) * _unit(hosts)).sum(dim=1).clamp(max=1).exp()


def left_out(kept: Keep) -> Keep:
    """The patches that a selection of patches leaves out, as a selection of its own."""
    old, new = kept.old, kept.new
    out = kept.destination < 0
    if old.uniform is not None and new.uniform is not None:
        count = old.uniform[0] - new.uniform[0]
        place = (~out).view(old.images, old.uniform[0]).long().sort(dim=1, stable=True).indices[:, :count]
        rows = (place + old.starts[:, None]).flatten()
        return Keep(old, Layout.alike(old.images, count, 0, rows.device), rows)
    counts = [before - after for before, after in zip(old.counts, new.counts, strict=True)]
    rest = Layout(
        old.lengths - new.lengths, torch.zeros_like(old.prefix), sum(counts), None, (counts, [0] * old.images)
    )
    return Keep(old, rest, out.nonzero_static(size=rest.rows).squeeze(1))


@dataclass(frozen=True, eq=False)
class Squeeze(Merge):
    """Groups in which the host lives on, even where a guest that is its equal weighs as much."""

    hosts: Tensor | None = None  # (M,) packed old row of each new one's host

    @property
    def source(self) -> Tensor:
        assert self.hosts is not None
        return self.hosts


def squeeze(kept: Keep, x: Tensor) -> Squeeze | Keep:
    """The pruned patches squeezed into their hosts, as a map; x (T, D): the features that are compared.

    Every row of its weights sums to 1.
    """
    pruned = left_out(kept)
    if pruned.new.rows == 0:
        return kept
    new, guests, stay = kept.new, pruned.apply(x), kept.apply(x)
    nearest = nearest_host(pruned.new.pad(guests), new.pad_patches(stay), new.valid_patches)
    host = pruned.new.unpad(nearest + (new.starts + new.prefix)[:, None])  # (R,) packed new row
    group = kept.destination.scatter(0, pruned.rows, host)
    share = affinity(guests, stay.index_select(0, host))
    weight = share.new_full((kept.old.rows,), math.e).scatter(0, pruned.rows, share)
    total = weight.new_zeros(new.rows).index_add(0, group, weight)
    shares = weight / total.index_select(0, group)
    return Squeeze(kept.old, new, group, shares, drops_none=True, hosts=kept.rows)


@dataclass(frozen=True, eq=False)
class SqueezeMask(Mask):
    """Training only: what is masked here went to a host, which from now on stands for it too."""

    host: Tensor  # (T,) packed row of each token's host
    guests: Tensor  # (T,) bool: who went

    def total(self, values: Tensor) -> Tensor:
        return values.index_add(0, self.host, torch.where(self.guests, values, torch.zeros_like(values)))


def squeeze_masked(layout: Layout, x: Tensor, before: Tensor, keep: Tensor) -> Decision:
    """The same while every token stays: those dropped here go to hosts that are alive; x (T, D).

    before, keep (T,): 1 for what was not dropped so far, and for what this stage keeps. The weight of a guest is
    multiplied by how much of it was dropped here, which is 1 and lets the gradient reach the decision [D]. Tokens
    dropped earlier are neither guests nor hosts; where no patch is alive nobody is squeezed.
    """
    alive = before * keep
    hosts = (alive > 0.5) & ~layout.is_prefix
    guests = (before > 0.5) & ~(alive > 0.5)
    padded, may_host = layout.pad_patches(x), layout.pad_patches(hosts)
    nearest = nearest_host(padded, padded, may_host)
    host = layout.spread(nearest + (layout.starts + layout.prefix)[:, None], prefix=0)
    guests = guests & may_host.any(dim=1)[layout.row_image]
    share = affinity(x, x.index_select(0, host)) * (before - alive)
    share = torch.where(guests, share, torch.zeros_like(share))
    wide = x.to(share.dtype)
    received = torch.zeros_like(share).index_add(0, host, share)
    summed = (math.e * wide).index_add(0, host, share[:, None] * wide)
    squeezed = summed / (math.e + received)[:, None]
    features = torch.where((received > 0)[:, None], squeezed, wide).to(x.dtype)
    return Decision(SqueezeMask(layout, layout, keep, host, guests), features)


def spend_squeeze(signals: Signals, kept: Keep) -> None:
    """Book the cosines and the sums."""
    if signals.counting:
        patches, stay = kept.old.patches.double(), kept.new.patches.double()
        width = signals.output().shape[1]
        signals.spend((kept.new.patches < kept.old.patches).double() * ((patches - stay) * (stay + 1) + stay) * width)


@register("tps")
class DTPS(PredictedKeep):
    """dTPS: DynamicViT's choice of patches; those it drops are squeezed into the kept patch that resembles them most.

    Acts before the block. Predictors, stages and counts are DynamicViT's; the teacher of its losses is the dense model.
    Training squeezes what it drops as well, and masks it after. Trained alone, with one reducer at all its blocks.
    Later attention is not weighted by size. Without training the predictors are random; ``etps`` needs none.

    Args:
        budget: ``Ratio(rho)`` keeps floor(N rho^s) of the N patches at the s-th block it is placed at.
        threshold: keep every patch whose probability to be kept is above it, as in DynamicViT.
        ratio_weight: of the squared error of the kept share.
        distill_weight: of KL(teacher || student) of the logits.
    """

    summary = "learned predictors choose, dropped patches are squeezed into kept ones"
    source = "Wei et al., CVPR 2023 (arXiv 2304.10716)"
    trained_as = (
        "30 epochs from DeiT with the dense model as teacher; predictors at a learning rate of 2.5e-4 for 128 images a "
        "GPU, the model at a hundredth of it"
    )

    def dropped(self, signals: Signals, kept: Keep) -> Decision:
        spend_squeeze(signals, kept)
        return Decision(squeeze(kept, signals.output()))

    def masked(self, signals: Signals, before: Tensor, keep: Tensor) -> Decision:
        return squeeze_masked(signals.layout, signals.output(), before, keep)


@register("etps")
class ETPS(Ranked):
    """Keep the most attended patches as EViT does; squeeze each other one into the kept patch that resembles it most.

    Acts after the attention residual, before the MLP, where features are compared too. It has no parameters: it works
    without training and gains by it, as EViT; gradients reach the weights of the squeezing. Later attention is not
    weighted by size.

    Args:
        budget: patches kept, of those entering the block, as EViT's [D]; ``Ratio`` rounds up.
        score: by which patches are ranked.
        seed: of ``score="random"``.
    """

    summary = "keep the most attended patches, squeeze the rest into them"
    source = "Wei et al., CVPR 2023 (arXiv 2304.10716)"
    searchable: ClassVar[Searchable] = {
        "score": ("class_attention", "class_attention_value_norm", "attention_received", "value_norm"),
    }

    def decide(self, signals: Signals, state: State) -> Decision | None:
        kept = self.highest(signals, state, "ceil")
        if kept is None:
            return None
        spend_squeeze(signals, kept)
        return Decision(squeeze(kept, signals.output()))
