"""Train the small siblings of CvT, PS-ViT, Swin and STViT-R again.

    python -m ablations.workloads.train_siblings --out FOLDER

The recipe, and why: from random weights on the digit pairs, where every scene shows three or four digits, so that the
token labels (each token is also told which digit lies where it looks, or background: *token labelling*, Jiang et al.,
NeurIPS 2021) teach reading fast, and the label of the scene follows. A token of
PS-ViT is told what lies around the point where it was sampled last; those of the others lie on the grid of patches.
Muon (in float32) on the matrices, AdamW on the rest (timm's), float32: bfloat16 is no help to a CPU without units for
it. No token is dropped in training. STViT-R begins from the weights of the Swin, but for its stem.
"""

from __future__ import annotations

import argparse
import json
import logging
import time
from collections.abc import Callable, Mapping
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from timm.optim import create_optimizer_v2
from torch import Tensor, nn
from torch.nn import functional as F

from ablations.models.digits import CANVAS, CLASSES, PATCH, WEIGHTS, save_weights
from ablations.models.siblings import CVT, PS_VIT, SIBLINGS, STVIT_R, SWIN
from ablations.models.weight_files import read_weights
from ablations.precision import float32_muon
from ablations.records.files import user_path
from ablations.workloads import pairs
from ablations.workloads.embedded import embedded_workload
from ablations.workloads.train_embedded import accuracy
from ablations.workloads.train_pairs import BATCH, EVALUATED, Drawn, batches, development
from ablations.workloads.trained_rows import trained_rows
from ablations.workloads.training_state import Curve, keep, restore
from reducers.backbones.stvit_r import SemanticBlock
from reducers.backbones.stvit_swin import semantic_weights

log = logging.getLogger(__name__)

SCENES = {CVT: 51_200, PS_VIT: 40_960, SWIN: 51_200, STVIT_R: 38_400}
START = {STVIT_R: SWIN}  # whose weights a model begins from
PEAK_LR = 2e-3
WARMUP, DECAY = 100, 0.3  # steps in which the learning rate rises; the share of all in which it falls to zero
WEIGHT_DECAY = 0.05
TOKEN_LOSS = 0.5
SMOOTHING = 0.05
CPU = torch.device("cpu")
CELL = 4  # pixels: what a point shows is told to this accuracy


def draw(first: int, seed: int) -> Drawn:
    """Scenes ``first`` … ``first + BATCH`` of the endless training split: pixels, labels, how many pixels of each digit
    each cell of 4 x 4 holds (B, 16, 16, classes); and the CPU seconds it took.
    """
    begun = time.process_time()
    scenes = [pairs.render("train", first + i, seed=seed) for i in range(BATCH)]
    pixels = np.stack([scene.image for scene in scenes])
    labels = np.array([scene.label for scene in scenes], dtype=np.int64)
    shown = np.stack([scene.shown for scene in scenes])
    side = CANVAS // CELL
    cells = np.moveaxis(shown.reshape(-1, side, CELL, side, CELL), 3, 2).reshape(-1, side, side, CELL * CELL)
    counts = np.stack([(cells == label).sum(axis=-1, dtype=np.uint8) for label in range(CLASSES)], axis=-1)
    return pixels, labels, counts, time.process_time() - begun


def learning_rate(step: int, steps: int) -> float:
    """Up, level, down: until it falls, a run does not depend on how long it is to be."""
    left = (steps - step) / max(1, DECAY * steps)
    return PEAK_LR * min((step + 1) / WARMUP, left, 1.0)


def shown_around(counts: Tensor, centres: Tensor | None) -> Tensor:
    """What a patch of 8 x 8 pixels shows, (B, N): the digit that most pixels in it belong to, CLASSES for background.

    counts: (B, 16, 16, classes) as ``draw`` gives them. centres: (B, N, 2) of the patches in cells (y, x), taken to the
    nearest corner of a cell; None: the regular patches, in raster order.
    """
    side, patch = CANVAS // CELL, PATCH // CELL
    summed = F.avg_pool2d(counts.movedim(-1, 1).float(), patch, stride=1, padding=patch - 1, divisor_override=1)
    if centres is None:
        at = torch.arange(side // patch) * patch + 1
        found = summed[:, :, at][:, :, :, at].flatten(2)
    else:
        corner = centres.detach().round().long().clamp(0, side)  # corner c lies between the cells c - 1 and c
        flat = corner[..., 0] * (side + 1) + corner[..., 1]
        found = summed.flatten(2).gather(2, flat[:, None].expand(-1, CLASSES, -1))
    return torch.where(found.amax(1) > 0, found.argmax(1), CLASSES)


def told(name: str, model: Any, images: Tensor) -> tuple[Tensor, Tensor, Tensor | None]:
    """Logits (B, classes), the normed tokens (B, N, D), and where they were sampled, where that is no grid."""
    if name == CVT:
        out = model.cvt(images)
        logits = model.classifier(model.layernorm(out.cls_token_value).mean(1))
        return logits, model.layernorm(out.last_hidden_state.flatten(2).transpose(1, 2)), None
    if name == SWIN:
        on_map = model.forward_features(images)
        return model.forward_head(on_map), on_map.flatten(1, 2), None
    if name == STVIT_R:
        on_map = model.features(images)
        return model.head(on_map.mean((1, 2))), on_map.flatten(1, 2), None
    tokens, points = model.sampled(images)
    tokens = model.norm(model.blocks(model.with_class_token(tokens)))
    return model.forward_head(tokens), tokens[:, 1:], points


class _Plain(nn.Module):
    """Logits alone, whatever the library wraps them in."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model

    def forward(self, images: Tensor) -> Any:
        found = self.model(images)
        return getattr(found, "logits", found)


def train(name: str, scenes: int, out: Path, *, seed: int = 0, resume: bool = False, log_every: int = 40) -> None:
    """Train one of the siblings on so many scenes; writes weights, curve and what ``resume`` needs to ``out`` as it
    goes.
    """
    torch.manual_seed(seed)
    model = SIBLINGS[name]()
    if name in START and not (resume and (out / f"{name}.state.safetensors").is_file()):
        own = out / f"{START[name]}.safetensors"
        begin_from(model, read_weights(own if own.is_file() else WEIGHTS / own.name))
    fit(
        name, model, partial(told, name, model), _Plain(model), scenes, out, start=START.get(name), seed=seed,
        resume=resume, log_every=log_every,
    )  # fmt: skip


def fit(
    name: str,
    model: nn.Module,
    tell: Callable[[Tensor], tuple[Tensor, Tensor, Tensor | None]],
    measured: nn.Module,
    scenes: int,
    out: Path,
    *,
    start: str | None,
    seed: int = 0,
    resume: bool = False,
    log_every: int = 40,
) -> None:
    """The recipe: train the weights of ``model``, and of a head for its tokens.

    Args:
        name: of the files in ``out``.
        model: what is trained and kept.
        tell: images -> logits (B, classes), tokens (B, N, 64) and where they were sampled, where that is no grid.
        measured: images -> logits; development accuracy is taken of it. Set to training mode with what it contains.
        scenes: in all.
        out: the folder.
        start: whose weights ``model`` began from, for the record.
        seed: of the scenes.
        resume: go on from what ``out`` holds, to the same bits.
        log_every: steps from one point of the curve to the next.
    """
    token_head = nn.Linear(64, CLASSES + 1)
    trained = nn.ModuleList([model, token_head])
    optimizer = create_optimizer_v2(
        trained, opt="muon", lr=PEAK_LR, weight_decay=WEIGHT_DECAY, fallback_list=("*.relative_position_bias_table",)
    )
    steps, first = scenes // BATCH, 0
    curve: Curve = []
    state = out / f"{name}.state.safetensors"
    if resume and state.is_file():
        first, curve = restore(state, trained, optimizer)
    images, labels = development(EVALUATED)
    before = curve[-1] if curve else {"minutes": 0.0, "cpu_minutes": 0.0}
    begun, cpu, drawing = time.monotonic(), time.process_time(), 0.0
    measured.train()
    with float32_muon():
        for step, (x, y, counts, seconds) in enumerate(batches(draw, first * BATCH, steps - first, seed), first):
            drawing += seconds
            for group in optimizer.param_groups:
                group["lr"] = learning_rate(step, steps)
            logits, tokens, places = tell(x)
            task = F.cross_entropy(logits, y, label_smoothing=SMOOTHING)
            patches = shown_around(counts, places)
            token = F.cross_entropy(token_head(tokens).flatten(0, 1), patches.flatten())
            optimizer.zero_grad()
            (task + TOKEN_LOSS * token).backward()
            nn.utils.clip_grad_norm_(trained.parameters(), 1.0)
            optimizer.step()
            if (step + 1) % log_every and step + 1 < steps:
                continue
            with torch.no_grad():
                top1 = accuracy(measured, images, labels, CPU)
            spent = (time.process_time() - cpu + drawing) / 60
            point = {
                "images": (step + 1) * BATCH,
                "minutes": round(before["minutes"] + (time.monotonic() - begun) / 60, 2),
                "cpu_minutes": round(before["cpu_minutes"] + spent, 2),
                "loss": round(float(task.detach()), 4),
                "token_loss": round(float(token.detach()), 4),
                "top1": top1,
            }
            curve.append(point)
            log.info(
                "%s: %7d of %d scenes, loss %.3f, tokens %.3f, development top-1 %.3f, %.1f CPU minutes, %.0f to go",
                name, point["images"], steps * BATCH, point["loss"], point["token_loss"], top1, point["cpu_minutes"],
                spent * (steps - step - 1) / (step + 1 - first),
            )  # fmt: skip
            save_weights(model, name, out)
            record = {"model": name, "scenes": steps * BATCH, "seed": seed, "curve": curve}
            if start is not None:
                record["start"] = start
            (out / f"{name}.training.json").write_text(json.dumps(record, indent=1) + "\n", encoding="utf-8")
            keep(state, trained, optimizer, step + 1, curve)


def begin_from(model: nn.Module, swin: Mapping[str, Tensor]) -> None:
    """Give an STViT-R the weights of a Swin of its shape; the stem keeps its own.

    Blocks on semantic tokens take those of the block in their place, without relative positions and with LayerScale 1.
    """
    for name in model.state_dict():
        if name.startswith("stem.") or ".units." in name:
            continue
        model.state_dict()[name].copy_(swin[name.replace("head.", "head.fc.")])
    stage: Any = model.get_submodule("layers.2")
    for unit in stage.units:
        for index, block in enumerate(unit.blocks):
            prefix = f"layers.2.blocks.{index}."
            theirs = {key.removeprefix(prefix): each for key, each in swin.items() if key.startswith(prefix)}
            block.load_state_dict(semantic_weights(theirs) if isinstance(block, SemanticBlock) else theirs)


_CARD = """\
# The siblings of CvT, PS-ViT, Swin and STViT-R

Small models for the *digit pairs* (PAIRS_CARD.md): 64 x 64 grey scenes, the label is the digit shown twice. Weights:
safetensors, float16. This page is written by `python -m ablations.workloads.train_siblings`; no number in it is typed
by hand.

`digits_cvt_tiny` is transformers' CvT: 16 x 16 tokens of width 32 in one block, 8 x 8 of width 64 in two, and 8 x 8 of
width 64 with a class token in ten; keys and values lie on 4 x 4 cells there. `digits_ps_vit_tiny` is a PS-ViT: 8 x 8
points on a map of 16 x 16, four sampling layers and eight with a class token, width 64. `digits_swin_tiny` is timm's
Swin: 32 x 32, 16 x 16 and 8 x 8 tokens of width 16, 32 and 64 in windows of 4 x 4, in two, two and six blocks;
`digits_stvit_r_tiny` the same with a stem of two convolutions, and at 8 x 8 one unit of STViT-R, 2 x 2 semantic tokens
for each of 2 x 2 windows.

## Recipe

From random weights, on scenes drawn on the fly from the first four fifths of scikit-learn's handwritten digits (the
last fifth, of other writers, is held out); half of them show four digits. Batch 64; Muon (in float32) on the matrices
and AdamW on the rest, learning rate 2e-3 after 100 steps of warm-up, falling to zero over the last 30 %, weight decay
0.05, gradient norm clipped to 1, label smoothing 0.05, float32; plus 0.5 x token labelling (each token is told which
digit lies in the 8 x 8 pixels where it looks, or background; that head is thrown away). `digits_stvit_r_tiny`
begins from the weights of `digits_swin_tiny`, but for its stem: blocks on semantic tokens from those of the block in
their place, without relative positions and with LayerScale 1. No token is dropped in training. A caveat: token
labelling tells each token its digit, so these models know better than most where digits are.
"""


def document(out: Path) -> Path:
    """Measure the models in ``out`` that have a record of their training, and write their card."""
    workload = embedded_workload()
    rows, curves = trained_rows(
        out, SIBLINGS, workload, logits=lambda name, model, images: _Plain(model)(images), unit="scenes",
        counted="images",
    )  # fmt: skip
    lines = [
        *_CARD.splitlines(),
        "",
        "| model | parameters (M) | MMAC | scenes | CPU minutes (minutes) | dense top-1 |",
        "| --- | ---: | ---: | ---: | ---: | ---: |",
        *rows,
        "",
        f"Top-1 in % on {len(workload):,} held-out scenes, with Wilson's 95 % interval. The minutes were taken on a",
        "machine that did other work as well, each model on one thread.",
        "",
        "## Training curve",
        "",
        f"Top-1 (%) on {EVALUATED} development scenes, of which half show four digits. While the learning rate is high",
        "the running statistics of BatchNorm lag behind the weights, and accuracy swings.",
        "",
        *curves,
    ]
    path = out / "SIBLINGS_CARD.md"
    path.write_text("\n".join(lines), encoding="utf-8")
    return path


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", choices=sorted(SIBLINGS), action="append", help="default: all of them")
    parser.add_argument("--scenes", type=int, help="scenes in all (default: the model's recipe)")
    parser.add_argument("--out", type=user_path, required=True, help="folder for the weights and the training curve")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument(
        "--card-only", action="store_true", help="train nothing; measure the weights in --out and write their card"
    )
    parser.add_argument("--resume", action="store_true", help="go on from what --out holds of an earlier run")
    args = parser.parse_args()
    logging.basicConfig(level=logging.INFO, format="%(asctime)s %(message)s", datefmt="%H:%M:%S")
    args.out.mkdir(parents=True, exist_ok=True)
    for name in [] if args.card_only else args.model or sorted(SIBLINGS):
        train(name, args.scenes or SCENES[name], args.out, seed=args.seed, resume=args.resume)
    log.info("wrote %s", document(args.out))


if __name__ == "__main__":
    main()
