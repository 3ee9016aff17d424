"""What is timed on: models by timm name, and images, real ones where there are some."""

from __future__ import annotations

import logging
from pathlib import Path
from typing import Any

import timm
import torch
from safetensors.torch import load_file
from timm.data import IMAGENET_DEFAULT_MEAN, IMAGENET_DEFAULT_STD
from timm.layers import resample_abs_pos_embed
from torch import Tensor

log = logging.getLogger(__name__)

_SUFFIXES = {".jpeg", ".jpg", ".png", ".webp"}
_CROP = 0.9  # share of the shorter side that DeiT's evaluation crops


def create(name: str, *, size: int | None, weights: Path | None) -> tuple[Any, bool]:
    """The model for square images of ``size`` pixels (None: its own), in eval mode, and whether it got the weights.

    A weights file serves the models of its width; the others get random weights, the same in every run.
    """
    torch.manual_seed(0)
    sized: dict[str, Any] = {} if size is None else {"img_size": size}
    model: Any = timm.create_model(name, **sized).eval()
    if hasattr(model, "layers"):
        fuse(model)
    if weights is None:
        return model, False
    state = load_file(weights)
    if state["pos_embed"].shape[-1] != model.embed_dim or len(model.blocks) != _depth(state):
        log.warning("%s: %s is of another width or depth, so the weights are random", name, weights.name)
        return model, False
    if state["pos_embed"].shape != model.pos_embed.shape:
        state["pos_embed"] = resample_abs_pos_embed(
            state["pos_embed"], list(model.patch_embed.grid_size), num_prefix_tokens=model.num_prefix_tokens
        )
    model.load_state_dict(state)
    return model, True


def _depth(state: dict[str, Tensor]) -> int:
    return 1 + max(int(key.split(".")[1]) for key in state if key.startswith("blocks."))


def fuse(model: Any) -> Any:
    """The same with fused attention in every block: timm leaves that of windows written out unless it is asked."""
    for module in model.modules():
        if hasattr(module, "fused_attn"):
            module.fused_attn = True
    return model


def check_fused(model: Any) -> None:
    """The dense model must run on fused attention: against anything slower every reducer looks good."""
    if not all(module.fused_attn for module in model.modules() if hasattr(module, "fused_attn")):
        raise SystemExit("the dense model does not use fused attention; unset TIMM_FUSED_ATTN and try again")


def images(count: int, *, size: int, data: Path | None) -> Tensor:
    """(count, 3, size, size) float32: real images spread evenly over the folder, or noise where there is none."""
    if data is None:
        return torch.randn(count, 3, size, size, generator=torch.Generator().manual_seed(0))
    files = spread(sorted(file for file in data.rglob("*") if file.suffix.lower() in _SUFFIXES), count)
    if not files:
        raise SystemExit(f"{data} holds no images ({', '.join(sorted(_SUFFIXES))}), in it or in folders below it")
    decoded = torch.stack([decode(file, size) for file in files])
    repeats = -(-count // len(files))  # a folder may hold fewer than are asked for
    return decoded.repeat(repeats, 1, 1, 1)[:count]


def spread(files: list[Path], count: int) -> list[Path]:
    """``count`` of the files at even distances, or all where there are no more."""
    if len(files) <= count:
        return files
    return [files[index * len(files) // count] for index in range(count)]


def decode(file: Path, size: int) -> Tensor:
    """One image as DeiT is given it: the shorter side to size / 0.9, a crop from the middle, ImageNet's mean and
    deviation. Images cut to about ``size`` already are only cropped.
    """
    import numpy as np
    from PIL import Image

    with Image.open(file) as opened:
        picture = opened.convert("RGB")
    shorter, wanted = min(picture.size), round(size / _CROP)
    if not size <= shorter < wanted:
        scale = wanted / shorter
        picture = picture.resize(
            (max(size, round(picture.width * scale)), max(size, round(picture.height * scale))),
            Image.Resampling.BICUBIC,
        )
    left, top = (picture.width - size) // 2, (picture.height - size) // 2
    return _normalised(np.array(picture.crop((left, top, left + size, top + size))))


def whole(file: Path, patch: int) -> Tensor:
    """One image at its own size, cut in the middle to whole patches; normalised by ImageNet's mean and deviation."""
    import numpy as np
    from PIL import Image

    with Image.open(file) as opened:
        picture = opened.convert("RGB")
    width, height = (side // patch * patch for side in picture.size)
    left, top = (picture.width - width) // 2, (picture.height - height) // 2
    return _normalised(np.array(picture.crop((left, top, left + width, top + height))))


def _normalised(pixels: Any) -> Tensor:
    """An array (H, W, 3) of bytes -> (3, H, W) float32."""
    values = torch.from_numpy(pixels).permute(2, 0, 1).float() / 255
    mean, deviation = (torch.tensor(v).view(3, 1, 1) for v in (IMAGENET_DEFAULT_MEAN, IMAGENET_DEFAULT_STD))
    return (values - mean) / deviation
