"""Token reduction for vision transformers: one interface, unmodified timm models, exact cost.

>>> import timm
>>> from reducers import ATS, Ratio, at, reduce_tokens
>>> model = timm.create_model("deit_tiny_patch16_224").eval()
>>> fast = reduce_tokens(model, at(range(3, 12), ATS(Ratio(0.5, of="initial"))))
"""

from reducers.budget import Budget, Count, Drop, Ratio, parse_budget
from reducers.decision import Decision
from reducers.errors import ReducerError, UnsupportedModel
from reducers.maps import Keep, Merge, Mix, TokenMap
from reducers.methods import ATS, EViT, Identity, RandomDrop, ToMe, TopK
from reducers.placement import Placement, at, every, parse_blocks, placement_from
from reducers.placement_file import load
from reducers.reducer import State, TokenReducer
from reducers.registry import available, build, register
from reducers.runtime import ReducedViT, Shared, reduce_tokens
from reducers.schedule import Early, Exponential, Flat, Late, Linear, Listed, Schedule, parse_schedule
from reducers.scores import SCORES
from reducers.stack import Stack
from reducers.tokens import Layout, TokenBatch
from reducers.trace import Trace

__all__ = [
    "ATS", "Budget", "Count", "Decision", "Drop", "EViT", "Early", "Exponential", "Flat", "Identity", "Keep", "Late",
    "Layout", "Linear", "Listed", "Merge", "Mix", "Placement", "RandomDrop", "Ratio", "ReducedViT", "ReducerError",
    "SCORES", "Schedule", "Shared", "Stack", "State", "ToMe", "TokenBatch", "TokenMap", "TokenReducer", "TopK", "Trace",
    "UnsupportedModel", "at", "available", "build", "every", "load", "parse_blocks", "parse_budget", "parse_schedule",
    "placement_from", "reduce_tokens", "register",
]  # fmt: skip
