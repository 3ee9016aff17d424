"""ToMe: merge the most similar token pairs (Bolya et al., ICLR 2023)."""

from __future__ import annotations

from typing import ClassVar

from reducers.decision import Decision
from reducers.kit.pairs import PairMerging
from reducers.reducer import Searchable, State
from reducers.registry import register
from reducers.signals import Signals


@register("tome")
class ToMe(PairMerging):
    """Merge the r most similar pairs of neighbouring sets at each block.

    Metric: cosine of the head-mean keys. Even places form one set, odd ones the other, over the whole sequence, prefix
    tokens excluded from matching. At most half the tokens can merge in one block: a larger request is cut to that, with
    a warning.

    Args:
        budget: ``Drop(r)``, the paper's form (``Drop(13)`` in every block is its r = 13), or what stays; ``Ratio``
            rounds that up.
        proportional: later attention is weighted by size, as the authors do off the shelf for supervised models.
    """

    summary = "merge the most similar token pairs"
    source = "Bolya et al., ICLR 2023 (arXiv 2210.09461)"
    searchable: ClassVar[Searchable] = {"proportional": (True, False)}

    def decide(self, signals: Signals, state: State) -> Decision | None:
        merge = self.matched(signals, state)
        return None if merge is None else Decision(merge, proportional=self.proportional)
