"""The methods: one file each, registered here. A new method is one file and one line."""

from reducers.methods.atc import ATC
from reducers.methods.ats import ATS
from reducers.methods.avit import AViT
from reducers.methods.back_tracking import BackTracking
from reducers.methods.bat import BAT
from reducers.methods.diffrate import DiffRate
from reducers.methods.dpc_knn import DPCKNN
from reducers.methods.dynamicvit import DynamicViT
from reducers.methods.evit import EViT
from reducers.methods.evs import EVS
from reducers.methods.fewer_frames import FewerFrames
from reducers.methods.fixed_pattern import FixedPattern
from reducers.methods.gtp import GTP
from reducers.methods.hvt_pool import HVTPool
from reducers.methods.ia_red2 import IARED2
from reducers.methods.identity import Identity
from reducers.methods.kmedoids import KMedoids
from reducers.methods.patch_merger import PatchMerger
from reducers.methods.pitome import PiToMe
from reducers.methods.random_drop import RandomDrop
from reducers.methods.rlt import RLT
from reducers.methods.shrinking_pattern import ShrinkingPattern
from reducers.methods.sinkhorn import Sinkhorn
from reducers.methods.sit import SiT
from reducers.methods.small_input import SmallInput
from reducers.methods.sttabt import STTABT
from reducers.methods.stvit import STViT
from reducers.methods.stvit_r import STViTR
from reducers.methods.tofu import ToFu
from reducers.methods.token_learner import TokenLearner
from reducers.methods.token_pooling import TokenPooling
from reducers.methods.tome import ToMe
from reducers.methods.topk import TopK
from reducers.methods.tps import DTPS, ETPS
from reducers.methods.vidcom2 import VidCom2
from reducers.methods.zero_tprune import ZeroTPrune

__all__ = [
    "ATC", "ATS", "AViT", "BackTracking", "BAT", "DPCKNN", "DTPS", "DiffRate", "DynamicViT", "ETPS", "EVS", "EViT",
    "FewerFrames", "FixedPattern", "GTP", "HVTPool", "IARED2", "Identity", "KMedoids", "PatchMerger", "PiToMe", "RLT",
    "RandomDrop", "STTABT", "STViT", "STViTR", "ShrinkingPattern", "Sinkhorn", "SiT", "SmallInput", "ToFu",
    "TokenLearner", "TokenPooling", "ToMe", "TopK", "VidCom2", "ZeroTPrune",
]  # fmt: skip
