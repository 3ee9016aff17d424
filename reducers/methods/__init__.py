"""The methods: one file each, registered here. A new method is one file and one line."""

from reducers.methods.ats import ATS
from reducers.methods.evit import EViT
from reducers.methods.identity import Identity
from reducers.methods.random_drop import RandomDrop
from reducers.methods.tome import ToMe
from reducers.methods.topk import TopK

__all__ = ["ATS", "EViT", "Identity", "RandomDrop", "ToMe", "TopK"]
