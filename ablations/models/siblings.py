"""The small siblings of CvT, PS-ViT, Swin and STViT-R that read the embedded scenes, with weights that belong to the
package.

All read the digit pairs, 64 x 64 grey pixels. CvT and PS-ViT show a reducer 64 tokens and a class token; Swin and
STViT-R have no class token, and 8 x 8 tokens in their last stage. transformers, which has CvT, is imported when that
one is asked for.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from torch import nn

from ablations.models.weight_files import ModelError

CLASSES = 10
CLASSIFIER = {"digits_cvt_tiny": "classifier", "digits_swin_tiny": "head.fc"}  # where it is not called "head"
CVT, PS_VIT = "digits_cvt_tiny", "digits_ps_vit_tiny"
SWIN, STVIT_R = "digits_swin_tiny", "digits_stvit_r_tiny"


def _cvt() -> nn.Module:
    """transformers' CvT: 16 x 16 tokens, then 8 x 8, then ten blocks on 8 x 8 with a class token, width 64."""
    try:
        from transformers import CvtConfig, CvtForImageClassification
    except ImportError as error:
        raise ModelError(
            f"{CVT} is a model of transformers, which is not installed: pip install 'sievit[hf]'"
        ) from error
    configured: Any = CvtConfig  # its fields are not known to type checkers
    config = configured(
        num_channels=1,
        patch_sizes=[7, 3, 3],
        patch_stride=[4, 2, 1],
        patch_padding=[2, 1, 1],
        embed_dim=[32, 64, 64],
        num_heads=[1, 2, 2],
        depth=[1, 2, 10],
        mlp_ratio=[4.0, 4.0, 4.0],
        attention_drop_rate=[0.0, 0.0, 0.0],
        drop_rate=[0.0, 0.0, 0.0],
        drop_path_rate=[0.0, 0.0, 0.0],
        num_labels=CLASSES,
        image_size=64,  # a CvT has none of its own, and its host goes by this
    )
    return CvtForImageClassification(config)


def _ps_vit() -> nn.Module:
    """8 x 8 points on a map of 16 x 16: four sampling layers, then eight with a class token, width 64."""
    from reducers.backbones.ps_vit import PSViT

    return PSViT(
        img_size=64, points=8, in_chans=1, num_classes=CLASSES, embed_dim=64, depth=12, num_heads=2, stem=(32, 32, 64)
    )


def _swin() -> nn.Module:
    """timm's Swin: 32 x 32, 16 x 16 and 8 x 8 tokens in windows of 4 x 4, two, two and six blocks, width 16 to 64."""
    from timm.models.swin_transformer import SwinTransformer

    return SwinTransformer(
        img_size=64, patch_size=2, in_chans=1, num_classes=CLASSES, embed_dim=16, depths=(2, 2, 6), num_heads=(1, 2, 4),
        window_size=4, drop_path_rate=0.0,
    )  # fmt: skip


def _stvit_r() -> nn.Module:
    """The same with a stem of convolutions and one unit of six blocks at 8 x 8: 2 x 2 semantic tokens a window."""
    from reducers.backbones.stvit_r import stvit_r_swin_toy

    return stvit_r_swin_toy(width=16)


def without_classifier(model: Any) -> None:
    """Take the classifier away: what is left gives the features that it reads."""
    if hasattr(model, "reset_classifier"):
        model.reset_classifier(0)
    else:
        model.classifier = nn.Identity()


SIBLINGS: dict[str, Callable[[], nn.Module]] = {CVT: _cvt, PS_VIT: _ps_vit, SWIN: _swin, STVIT_R: _stvit_r}
