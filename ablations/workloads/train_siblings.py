"""Train the small siblings of CvT and PS-ViT again: ``python -m ablations.workloads.train_siblings --out FOLDER``.

The recipe, and why: from random weights on the digit pairs, where every scene shows three or four digits, so that the
token labels (each token is also told which digit lies where it looks, or background: *token labelling*, Jiang et al.,
NeurIPS 2021) teach reading fast, and the label of the scene follows. CvT's tokens lie on the grid of patches; a token
of PS-ViT is told what lies around the point where it was sampled last. Muon (in float32) on the matrices, AdamW on the
rest (timm's), float32: bfloat16 is no help to a CPU without units for it. No token is dropped in training.
"""

from __future__ import annotations

import argparse
import json
import logging
import multiprocessing
import time
from collections.abc import Iterator
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import torch
from timm.optim import create_optimizer_v2
from torch import Tensor, nn
from torch.nn import functional as F

from ablations.models.digits import CANVAS, CLASSES, PATCH, normalise, save_weights
from ablations.models.siblings import CVT, SIBLINGS
from ablations.records.files import user_path
from ablations.workloads import pairs
from ablations.workloads.train_embedded import accuracy
from ablations.workloads.train_pairs import EVALUATED, development, float32_muon

log = logging.getLogger(__name__)

SCENES = {"digits_cvt_tiny": 51_200, "digits_ps_vit_tiny": 40_960}
PEAK_LR = 2e-3
WARMUP, DECAY = 100, 0.3  # steps in which the learning rate rises; the share of all in which it falls to zero
BATCH = 64
WEIGHT_DECAY = 0.05
TOKEN_LOSS = 0.5
SMOOTHING = 0.05
CELL = 4  # pixels: what a point shows is told to this accuracy


def draw(first: int, seed: int) -> tuple[np.ndarray, np.ndarray, np.ndarray, float]:
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


def batches(first: int, steps: int, seed: int) -> Iterator[tuple[Tensor, Tensor, Tensor, float]]:
    """Training batches from step ``first`` on, drawn ahead of the model by another process."""
    with ProcessPoolExecutor(1, mp_context=multiprocessing.get_context("spawn")) as pool:
        ahead = [pool.submit(draw, step * BATCH, seed) for step in range(first, min(first + 4, steps))]
        for step in range(first, steps):
            pixels, labels, counts, seconds = ahead.pop(0).result()
            if step + 4 < steps:
                ahead.append(pool.submit(draw, (step + 4) * BATCH, seed))
            yield normalise(torch.from_numpy(pixels)), torch.from_numpy(labels), torch.from_numpy(counts), seconds


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
    token_head = nn.Linear(64, CLASSES + 1)
    trained = nn.ModuleList([model, token_head])
    optimizer = create_optimizer_v2(trained, opt="muon", lr=PEAK_LR, weight_decay=WEIGHT_DECAY)
    steps, first = scenes // BATCH, 0
    curve: list[dict[str, float]] = []
    state_path = out / f"{name}.state.pt"
    if resume and state_path.is_file():
        state = torch.load(state_path, weights_only=True)
        trained.load_state_dict(state["model"])
        optimizer.load_state_dict(state["optimizer"])
        first, curve = int(state["step"]), state["curve"]
    images, labels = development(EVALUATED)
    before = curve[-1] if curve else {"minutes": 0.0, "cpu_minutes": 0.0}
    begun, cpu, drawing = time.monotonic(), time.process_time(), 0.0
    trained.train()
    with float32_muon():
        for step, (x, y, counts, seconds) in enumerate(batches(first, steps, seed), first):
            drawing += seconds
            for group in optimizer.param_groups:
                group["lr"] = learning_rate(step, steps)
            logits, tokens, places = told(name, model, x)
            task = F.cross_entropy(logits, y, label_smoothing=SMOOTHING)
            patches = shown_around(counts, places)
            token = F.cross_entropy(token_head(tokens).flatten(0, 1), patches.flatten())
            optimizer.zero_grad()
            (task + TOKEN_LOSS * token).backward()
            nn.utils.clip_grad_norm_(trained.parameters(), 1.0)
            optimizer.step()
            if (step + 1) % log_every and step + 1 < steps:
                continue
            top1 = accuracy(_Plain(model), images, labels, torch.device("cpu"))
            trained.train()
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
            (out / f"{name}.training.json").write_text(json.dumps(record, indent=1) + "\n", encoding="utf-8")
            kept = {"model": trained.state_dict(), "optimizer": optimizer.state_dict(), "step": step + 1}
            torch.save({**kept, "curve": curve}, state_path)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", choices=sorted(SIBLINGS), action="append", help="default: both")
    parser.add_argument("--scenes", type=int, help="scenes in all (default: the model's recipe)")
    parser.add_argument("--out", type=user_path, required=True, help="folder for the weights and the training curve")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--resume", action="store_true", help="go on from what --out holds of an earlier run")
    args = parser.parse_args()
    logging.basicConfig(level=logging.INFO, format="%(asctime)s %(message)s", datefmt="%H:%M:%S")
    args.out.mkdir(parents=True, exist_ok=True)
    for name in args.model or sorted(SIBLINGS):
        train(name, args.scenes or SCENES[name], args.out, seed=args.seed, resume=args.resume)


if __name__ == "__main__":
    main()
