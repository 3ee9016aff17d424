"""Train the small models of moving digits again: ``python -m ablations.workloads.train_clips --out FOLDER``.

The recipe, and why: every frame begins as ``digits_vit_tiny`` reads an image, its positions interpolated to the
smaller grid. What is new learns fast, what was known slowly, or the digits are lost before motion is found. Attention
over time stands behind a linear layer of zeros, and looks, half of its heads, at the frame before, the other half at
the frame after: nothing else in a TimeSformer knows before from after. Begun as a copy of attention over space, with
time embeddings of any kind, it learned along which line the digit moves and took every second clip for its reverse,
still after ten thousand of them. X-ViT, whose shift looks at the frames beside, begins with small random time
embeddings, without which frames could not be told apart. Clutter grows over the first part of the training: motion is
found sooner where little else moves. Besides the direction each patch of each frame is told the direction of the digit
in it, or background (token labelling), and the clip its digit; those two heads are thrown away. AdamW, float32,
cosine; no token is dropped in training. Clips are drawn on the fly from the training split, by a process of their own.
"""

from __future__ import annotations

import argparse
import json
import logging
import math
import time
from collections.abc import Mapping
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from timm.layers import resample_abs_pos_embed
from torch import Tensor, nn
from torch.nn import functional as F

from ablations.models.clips import CLIP_CANVAS, CLIPS, DIRECTIONS, FRAMES, HEADS, TIMESFORMER, XVIT
from ablations.models.digits import CLASSES, MEAN, PATCH, STD, WEIGHTS, save_weights
from ablations.models.weight_files import read_weights
from ablations.records.files import user_path
from ablations.workloads import moving_digits
from ablations.workloads.digits import Split, mask_patches
from ablations.workloads.drawing_ahead import drawn_ahead
from ablations.workloads.embedded import moving_workload
from ablations.workloads.trained_rows import trained_rows
from ablations.workloads.training_state import Curve, keep, restore

log = logging.getLogger(__name__)

TRAINED_ON = {TIMESFORMER: 14_400, XVIT: 17_600}  # clips
CLUTTER_GROWS = 0.4  # share of the training in which clutter comes to be all there is
BATCH = 32
OLD_LR, NEW_LR = 5e-4, 2e-3  # of weights that digits_vit_tiny has, and of those it has not
WARMUP = 20  # steps
WEIGHT_DECAY = 0.05
DIGIT_LOSS, TOKEN_LOSS = 0.2, 1.0
TIME_STD = 0.05  # of X-ViT's time embeddings at the start
NEIGHBOUR = 32**0.5  # TimeSformer's first logit of the frame beside, times the variance of a token's channels
ELSE_STD = 0.02  # of what else there is in TimeSformer's queries and keys over time
DEVELOPMENT_SEED, EVALUATED = 5, 240  # held-out clips of the curve; others than those of the workload
WIDTH = 64
_NEW = ("time", "temporal", "head.", "classifier")  # in names of what the start has no values for
_OF_TIMESFORMER = {  # timm's name of a part of a block -> transformers' names
    "norm1": ("layernorm_before", "temporal_layernorm"),
    "attn.qkv": ("attention.attention.qkv", "temporal_attention.attention.qkv"),
    "attn.proj": ("attention.output.dense", "temporal_attention.output.dense"),
    "norm2": ("layernorm_after",),
    "mlp.fc1": ("intermediate.dense",),
    "mlp.fc2": ("output.dense",),
}


def started(name: str, images: Mapping[str, Tensor]) -> nn.Module:
    """A model of clips that reads its frames as a ViT with the weights ``images`` (timm's names) reads images."""
    model: Any = CLIPS[name]()
    grid = CLIP_CANVAS // PATCH
    known = {key: value.float() for key, value in images.items() if not key.startswith("head.")}
    known["pos_embed"] = resample_abs_pos_embed(known["pos_embed"], [grid, grid], num_prefix_tokens=1)
    if name == TIMESFORMER:
        known = dict(_for_timesformer(known))
    missing, unexpected = model.load_state_dict(known, strict=False)
    assert not unexpected and all(_is_new(key) for key in missing), (missing, unexpected)
    with torch.no_grad():
        for key, parameter in model.named_parameters():
            if key.endswith("time_embed"):
                nn.init.normal_(parameter, std=TIME_STD)
            elif "temporal_dense" in key:
                nn.init.zeros_(parameter)
    if name == TIMESFORMER:
        look_beside(model)
    return model


@torch.no_grad()
def look_beside(model: Any) -> None:
    """Begin the attention over time of a TimeSformer: the first half of its heads looks one frame back, the others one
    ahead, from the ends of a clip at the end itself.

    Time embeddings begin orthogonal, each of length 1, in the directions in which patch embeddings vary least; queries
    and keys read off them which frame a token is of. Layers add to tokens and leave the embeddings as they are, so in
    later layers the look is less sharp.
    """
    tower = model.timesformer
    directions = torch.linalg.svd(tower.embeddings.patch_embeddings.projection.weight.flatten(1))[0]
    times = directions[:, -FRAMES:].T
    tower.embeddings.time_embeddings.copy_(times[None])
    for layer in tower.encoder.layer:
        normed = layer.temporal_layernorm.weight * (times - times.mean(dim=1, keepdim=True))
        frame_of = NEIGHBOUR**0.5 * torch.linalg.pinv(normed.T)  # (F, D): a token's features to the frame it is of
        qkv = layer.temporal_attention.attention.qkv
        queries, keys, _ = qkv.weight.unflatten(0, (3, HEADS, -1))  # (heads, channels, D)
        nn.init.normal_(queries, std=ELSE_STD)
        nn.init.normal_(keys, std=ELSE_STD)
        qkv.bias[: 2 * WIDTH].zero_()
        keys[:, :FRAMES] = frame_of
        for head in range(HEADS):
            step = -1 if head < HEADS / 2 else 1
            beside = (torch.arange(FRAMES) + step).clamp(0, FRAMES - 1)
            queries[head, :FRAMES] = F.one_hot(beside, FRAMES).T.float() @ frame_of


def _for_timesformer(known: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The same under transformers' names; attention over time gets a copy of that over space."""
    inside = "timesformer.embeddings"
    found = {
        f"{inside}.cls_token": known["cls_token"],
        f"{inside}.position_embeddings": known["pos_embed"],
    }
    for kind in ("weight", "bias"):
        found[f"{inside}.patch_embeddings.projection.{kind}"] = known[f"patch_embed.proj.{kind}"]
        found[f"timesformer.layernorm.{kind}"] = known[f"norm.{kind}"]
    for key, value in known.items():
        if key.startswith("blocks."):
            _, index, rest = key.split(".", 2)
            part, kind = rest.rsplit(".", 1)
            for other in _OF_TIMESFORMER[part]:
                found[f"timesformer.encoder.layer.{index}.{other}.{kind}"] = value
    return found


def _is_new(key: str) -> bool:
    return any(part in key for part in _NEW)


def told(model: Any, clips: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Logits (B, directions), what the clip's class tokens say (B, D), and the normed patches (B, F, N, D)."""
    if hasattr(model, "timesformer"):
        tokens = model.timesformer(clips).last_hidden_state  # (B, 1 + N F, D), all frames of a place side by side
        patches = tokens[:, 1:].unflatten(1, (-1, clips.shape[1])).transpose(1, 2)
        return model.classifier(tokens[:, 0]), tokens[:, 0], patches
    tokens = model.forward_features(clips)
    return model.forward_head(tokens), tokens[:, :, 0].mean(1), tokens[:, :, 1:]


def draw(
    split: Split, first: int, count: int, seed: int, max_clutter: int = moving_digits.MAX_CLUTTER
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Clips (n, F, 1, H, W) as models read them, directions (n,), digits (n,), and what each patch shows (n, F, N): the
    direction of the digit in it, or DIRECTIONS where there is none.
    """
    scenes = [moving_digits.render(split, first + i, seed=seed, max_clutter=max_clutter) for i in range(count)]
    clips = torch.from_numpy(np.stack([scene.frames for scene in scenes])).unsqueeze(2).float()
    directions, digits = (
        torch.tensor([getattr(scene, what) for scene in scenes]) for what in ("direction", "digit")
    )  # fmt: skip
    shown = torch.from_numpy(mask_patches(np.stack([scene.masks for scene in scenes]), PATCH))
    patches = torch.where(shown, directions[:, None, None], DIRECTIONS)
    return (clips / 255 - MEAN) / STD, directions, digits, patches


def learning_rate(step: int, steps: int) -> float:
    """As a share of the peak: up, then down along a cosine."""
    return min(1.0, (step + 1) / WARMUP) * 0.5 * (1 + math.cos(math.pi * step / steps))


def clutter(step: int, steps: int) -> int:
    """How many pieces there are at most: one more at a time, until all are there."""
    return min(moving_digits.MAX_CLUTTER, int((moving_digits.MAX_CLUTTER + 1) * step / (CLUTTER_GROWS * steps)))


def train(name: str, clips: int, out: Path, *, seed: int = 0, resume: bool = False, log_every: int = 40) -> None:
    """Train one of the models on so many clips; writes weights, curve and what ``resume`` needs to ``out`` as it
    goes.
    """
    torch.manual_seed(seed)
    model = started(name, read_weights(WEIGHTS / "digits_vit_tiny.safetensors"))
    heads = nn.ModuleDict({"digit": nn.Linear(WIDTH, CLASSES), "token": nn.Linear(WIDTH, DIRECTIONS + 1)})
    trained = nn.ModuleList([model, heads])
    old = [value for key, value in model.named_parameters() if not _is_new(key)]
    new = [value for key, value in model.named_parameters() if _is_new(key)]
    peaks = (OLD_LR, NEW_LR)
    optimizer = torch.optim.AdamW(
        [{"params": old}, {"params": [*new, *heads.parameters()]}], lr=NEW_LR, weight_decay=WEIGHT_DECAY
    )
    steps, first = clips // BATCH, 0
    curve: Curve = []
    state = out / f"{name}.state.safetensors"
    if resume and state.is_file():
        first, curve = restore(state, trained, optimizer)
    held_out = draw("test", 0, EVALUATED, DEVELOPMENT_SEED)
    before = curve[-1] if curve else {"minutes": 0.0, "cpu_minutes": 0.0}
    begun, cpu = time.monotonic(), time.process_time()
    trained.train()
    calls = (partial(draw, "train", at * BATCH, BATCH, seed, clutter(at, steps)) for at in range(first, steps))
    for step, (x, directions, digits, patches) in enumerate(drawn_ahead(calls), first):
        for group, peak in zip(optimizer.param_groups, peaks, strict=True):
            group["lr"] = peak * learning_rate(step, steps)
        logits, summary, tokens = told(model, x)
        task = F.cross_entropy(logits, directions)
        digit = F.cross_entropy(heads["digit"](summary), digits)
        token = F.cross_entropy(heads["token"](tokens).flatten(0, 2), patches.flatten())
        optimizer.zero_grad()
        (task + DIGIT_LOSS * digit + TOKEN_LOSS * token).backward()
        nn.utils.clip_grad_norm_(trained.parameters(), 1.0)
        optimizer.step()
        if (step + 1) % log_every and step + 1 < steps:
            continue
        top1, digit_top1 = _accuracies(model, heads["digit"], held_out)
        spent = (time.process_time() - cpu) / 60
        point = {
            "clips": (step + 1) * BATCH,
            "minutes": round(before["minutes"] + (time.monotonic() - begun) / 60, 2),
            "cpu_minutes": round(before["cpu_minutes"] + spent, 2),
            "loss": round(float(task.detach()), 4),
            "token_loss": round(float(token.detach()), 4),
            "top1": top1,
            "digit_top1": digit_top1,
        }
        curve.append(point)
        log.info(
            "%s: %6d of %d clips, loss %.3f, tokens %.3f, direction %.3f, digit %.3f, %.1f CPU minutes, %.0f to go",
            name, point["clips"], steps * BATCH, point["loss"], point["token_loss"], top1, digit_top1,
            point["cpu_minutes"], spent * (steps - step - 1) / (step + 1 - first),
        )  # fmt: skip
        save_weights(model, name, out)
        record = {"model": name, "clips": steps * BATCH, "seed": seed, "curve": curve}
        (out / f"{name}.training.json").write_text(json.dumps(record, indent=1) + "\n", encoding="utf-8")
        keep(state, trained, optimizer, step + 1, curve)


@torch.no_grad()
def _accuracies(model: nn.Module, digit_head: nn.Module, held_out: tuple[Tensor, ...]) -> tuple[float, float]:
    """Of direction and digit, on held-out clips."""
    model.eval()
    right = torch.zeros(2)
    for x, directions, digits in zip(*(part.split(BATCH) for part in held_out[:3]), strict=True):
        logits, summary, _ = told(model, x)
        right[0] += (logits.argmax(1) == directions).sum()
        right[1] += (digit_head(summary).argmax(1) == digits).sum()
    model.train()
    direction, digit = (right / len(held_out[0])).tolist()
    return round(direction, 4), round(digit, 4)


_CARD = """\
# The small models of moving digits

They read clips of 8 frames of 48 x 48 grey pixels, in which a handwritten digit moves among pieces of others that move
as well, over a torus; the label is the direction, one of 8. Weights: safetensors, float16. This page is written by
`python -m ablations.workloads.train_clips`; no number in it is typed by hand.

`digits_timesformer_tiny` is transformers' TimeSformer with divided attention, `digits_xvit_tiny` an X-ViT
(`reducers.backbones.xvit`): twelve blocks of width 64 each, 36 patches and a class token in each frame.

## Recipe

Every frame begins as `digits_vit_tiny` reads an image, its positions interpolated to 6 x 6. Attention over time begins,
behind a linear layer of zeros, by looking one frame back and one ahead. Clips are drawn on the fly
from the first four fifths of scikit-learn's handwritten digits (the last fifth, of other writers, is held out); clutter
grows from none to all of it over the first 40 %. Batch 32, AdamW, learning rate 2e-3 for what is new and 5e-4 for what
was known, a cosine after 20 steps of warm-up, weight decay 0.05, gradient norm clipped to 1, float32. Besides the
direction each patch is told the direction of the digit in it, or background (weight 1), and the clip its digit (0.2);
those heads are thrown away. No token is dropped in training. A caveat: token labelling tells each token whether it is
the digit, so these models know better than most where to look.
"""


def document(out: Path) -> Path:
    """Measure the models in ``out`` that have a record of their training, and write their card."""
    workload = moving_workload()
    rows, curves = trained_rows(
        out, CLIPS, workload, logits=lambda name, model, clips: told(model, clips)[0], unit="clips", counted="clips"
    )
    lines = [
        *_CARD.splitlines(),
        "",
        "| model | parameters (M) | MMAC a clip | clips | CPU minutes (minutes) | dense top-1, direction |",
        "| --- | ---: | ---: | ---: | ---: | ---: |",
        *rows,
        "",
        f"Top-1 in % on {len(workload)} held-out clips, with Wilson's 95 % interval. CPU minutes are the model's;",
        "drawing the clips, in another process, comes on top. The machine did other work as well.",
        "",
        "## Training curve",
        "",
        f"Top-1 (%) of the direction on {EVALUATED} development clips.",
        "",
        *curves,
    ]
    path = out / "CLIPS_CARD.md"
    path.write_text("\n".join(lines), encoding="utf-8")
    return path


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", choices=sorted(CLIPS), action="append", help="default: both")
    parser.add_argument("--clips", type=int, help="clips in all (default: the model's recipe)")
    parser.add_argument("--out", type=user_path, required=True, help="folder for the weights and the training curve")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--resume", action="store_true", help="go on from what --out holds of an earlier run")
    parser.add_argument(
        "--card-only", action="store_true", help="train nothing; measure the weights in --out and write their card"
    )
    args = parser.parse_args()
    logging.basicConfig(level=logging.INFO, format="%(asctime)s %(message)s", datefmt="%H:%M:%S")
    args.out.mkdir(parents=True, exist_ok=True)
    for name in [] if args.card_only else args.model or sorted(CLIPS):
        train(name, args.clips or TRAINED_ON[name], args.out, seed=args.seed, resume=args.resume)
    log.info("wrote %s", document(args.out))


if __name__ == "__main__":
    main()
