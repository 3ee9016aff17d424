"""Write a reducer: it decides, the runtime carries it out. In the suite it would be one file in reducers/methods."""

import timm
import torch

from reducers import Decision, Ratio, TokenReducer, at, reduce_tokens
from reducers.budget import Budget
from reducers.kit.selection import keep_count, keep_highest


class KeepLongestKeys(TokenReducer):
    """Keep the patches whose keys are longest."""

    name = "longest_keys"
    summary = "keep the patches of largest key norm"

    def __init__(self, budget: Budget) -> None:
        super().__init__()
        self.budget = budget

    def decide(self, signals, state):
        scores = signals.keys().flatten(1).norm(dim=1)  # (T,), packed: all images' tokens one after another
        kept = keep_highest(signals.layout, scores, keep_count(signals.layout, self.budget, state, "floor"))
        return None if kept is None else Decision(kept)


model = timm.create_model("deit_tiny_patch16_224").eval()
with torch.inference_mode():
    _, trace = reduce_tokens(model, at([3, 6, 9], KeepLongestKeys(Ratio(0.7)))).trace(torch.randn(1, 3, 224, 224))
print("tokens entering each block", trace.tokens[0].tolist())
