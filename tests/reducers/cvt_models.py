"""Small CvTs of both implementations, with every parameter and every statistic of BatchNorm away from neutral."""

from __future__ import annotations

from typing import Any

import torch
from torch import nn

DEPTHS = (1, 2, 4)  # of the three stages: blocks 0 to 2 are embedded, reducers act at 3 to 6
FIRST, DEPTH = 3, 7
WIDTHS, HEADS, CLASSES = (8, 16, 24), (1, 2, 3), 7
SIDE = 64  # images: grids of 16, 8 and, by an embedding of stride 1, 8
KINDS = ("transformers", "authors")


def make_cvt(
    kind: str = "transformers", *, stride: int = 1, dtype: torch.dtype = torch.float64, bare: bool = False,
    seed: int = 0, **changes: Any,
) -> Any:  # fmt: skip
    """A random model, in evaluation mode. ``stride``: of the last embedding; ``bare``: transformers' without a head."""
    torch.manual_seed(seed)
    if kind == "authors":
        from reducers.backbones.cvt import CvT

        model: Any = CvT(
            DEPTHS, width=WIDTHS, heads=HEADS, stride=(4, 2, stride), mlp_ratio=2.0, img_size=SIDE, num_classes=CLASSES,
            drop_path=0.0, **changes,
        )  # fmt: skip
    else:
        import transformers as tf

        settings = {
            "depth": list(DEPTHS), "embed_dim": list(WIDTHS), "num_heads": list(HEADS), "mlp_ratio": [2.0] * 3,
            "patch_stride": [4, 2, stride], "drop_path_rate": [0.0] * 3, "num_labels": CLASSES, **changes,
        }  # fmt: skip
        config = tf.CvtConfig(**settings, image_size=SIDE)
        model = (tf.CvtModel if bare else tf.CvtForImageClassification)(config)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.2 * torch.randn_like(parameter))
        for name, parameter in model.named_parameters():
            if name.endswith(("projection_query.weight", "proj_q.weight")):
                parameter.mul_(6)  # attention that prefers some cells
        for module in model.modules():
            if isinstance(module, nn.BatchNorm2d):
                module.running_mean.copy_(0.3 * torch.randn_like(module.running_mean))
                module.running_var.copy_(0.5 + torch.rand_like(module.running_var))
    return model.to(dtype).eval()


def logits_of(answer: Any) -> Any:
    """Of either implementation."""
    return answer if isinstance(answer, torch.Tensor) else answer.logits
