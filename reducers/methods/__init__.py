"""The methods: one file each, registered here. A new method is one file and one line."""

from reducers.methods.atc import ATC
from reducers.methods.ats import ATS
from reducers.methods.back_tracking import BackTracking
from reducers.methods.dpc_knn import DPCKNN
from reducers.methods.evit import EViT
from reducers.methods.fixed_pattern import FixedPattern
from reducers.methods.gtp import GTP
from reducers.methods.hvt_pool import HVTPool
from reducers.methods.identity import Identity
from reducers.methods.kmedoids import KMedoids
from reducers.methods.pitome import PiToMe
from reducers.methods.random_drop import RandomDrop
from reducers.methods.small_input import SmallInput
from reducers.methods.tofu import ToFu
from reducers.methods.token_pooling import TokenPooling
from reducers.methods.tome import ToMe
from reducers.methods.topk import TopK
from reducers.methods.zero_tprune import ZeroTPrune

__all__ = [
    "ATC", "ATS", "BackTracking", "DPCKNN", "EViT", "FixedPattern", "GTP", "HVTPool", "Identity", "KMedoids", "PiToMe",
    "RandomDrop", "SmallInput", "ToFu", "ToMe", "TokenPooling", "TopK", "ZeroTPrune",
]  # fmt: skip
