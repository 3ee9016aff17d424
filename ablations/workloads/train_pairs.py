"""Train the model of the digit pairs again: ``make weights``, or ``python -m ablations.workloads.train_pairs``.

The recipe, and why: a ViT this small learns to read slowly, so it begins from the weights that read the cluttered
digits (``digits_vit_tiny``), and each patch token is also told what it shows (its digit, or background), the *token
labelling* of LV-ViT (Jiang et al., NeurIPS 2021); the extra head is thrown away. Muon on the matrices and AdamW on the
rest (timm's), two one-cycle schedules one after the other, float32. No token is ever dropped in training, so what the
model loses to a reduction later is what the reduction costs.
"""

from __future__ import annotations

import argparse
import json
import logging
import time
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from itertools import accumulate
from pathlib import Path

import numpy as np
import torch
from safetensors.torch import load_file
from timm.optim import create_optimizer_v2
from torch import Tensor, nn
from torch.nn import functional as F

from ablations.models.digits import CLASSES, PAIRS_MODEL, PATCH, WEIGHTS, create_digits_model, normalise, save_weights
from ablations.precision import float32_muon
from ablations.records.files import user_path
from ablations.workloads import pairs
from ablations.workloads.drawing_ahead import drawn_ahead
from ablations.workloads.train_embedded import accuracy, learning_rate

log = logging.getLogger(__name__)

START = "digits_vit_tiny"  # the same shape, trained by ``train_embedded``
CYCLES = ((38_400, 1e-3), (25_600, 5e-4))  # scenes of a one-cycle schedule, and its peak learning rate
BATCH = 64
WEIGHT_DECAY = 0.05
TOKEN_LOSS = 0.5
SMOOTHING = 0.05
DEVELOPMENT_SEED = 1000  # settings were chosen, and the curve is drawn, on scenes of this seed: never those evaluated
EVALUATED = 720  # of them, for the curve


Drawn = tuple[np.ndarray, np.ndarray, np.ndarray, float]  # pixels, labels, what tokens are told; the CPU seconds


def draw(first: int, seed: int) -> Drawn:
    """Scenes ``first`` … ``first + BATCH`` of the endless training split: pixels, labels, labels of each patch; and the
    CPU seconds it took.
    """
    begun = time.process_time()
    scenes = [pairs.render("train", first + i, seed=seed) for i in range(BATCH)]
    pixels = np.stack([scene.image for scene in scenes])
    patches = pairs.shown_patches(np.stack([scene.shown for scene in scenes]), PATCH)
    labels = np.array([scene.label for scene in scenes], dtype=np.int64)
    return pixels, labels, patches, time.process_time() - begun


def batches(
    draw: Callable[[int, int], Drawn], first: int, steps: int, seed: int
) -> Iterator[tuple[Tensor, Tensor, Tensor, float]]:
    """Batches of ``draw(scene, seed)`` from scene ``first`` on, drawn ahead of the model by another process."""
    calls = (partial(draw, first + step * BATCH, seed) for step in range(steps))
    for pixels, labels, told, seconds in drawn_ahead(calls):
        yield normalise(torch.from_numpy(pixels)), torch.from_numpy(labels), torch.from_numpy(told), seconds


def development(count: int) -> tuple[Tensor, Tensor]:
    """Scenes of held-out writers to choose settings on, as crowded as those of training: normalised images, labels."""
    crowded = pairs.CROWDED["train"]
    scenes = [pairs.render("test", i, seed=DEVELOPMENT_SEED, crowded=crowded) for i in range(count)]
    images = normalise(torch.from_numpy(np.stack([scene.image for scene in scenes])))
    return images, torch.tensor([scene.label for scene in scenes])


def train(
    out: Path,
    *,
    start: Path,
    cycles: Sequence[tuple[int, float]] = CYCLES,
    seed: int = 0,
    resume: bool = False,
    log_every: int = 40,
) -> None:
    """Train cycle after cycle, the first from the weights in ``start``, each further one from those written before it.

    Writes weights and curve to ``out`` as it goes. ``resume``: where those there are of the end of a cycle, go on with
    the next.
    """
    record_path, own = out / f"{PAIRS_MODEL}.training.json", out / f"{PAIRS_MODEL}.safetensors"
    curve: list[dict[str, float]] = []
    firsts = list(accumulate((scenes for scenes, _ in cycles), initial=0))
    if resume and record_path.is_file():
        found = json.loads(record_path.read_text(encoding="utf-8"))["curve"]
        curve = found if found[-1]["images"] in firsts else []
    done = curve[-1]["images"] if curve else 0
    for first, (scenes, peak) in zip(firsts, cycles, strict=False):
        if first < done:
            continue
        weights = own if first else start
        for so_far in _cycle(scenes, peak, first, weights, out, seed=seed, earlier=curve, log_every=log_every):
            curve = so_far
            record = {"model": PAIRS_MODEL, "start": START, "scenes": firsts[-1], "seed": seed, "curve": curve}
            record_path.write_text(json.dumps(record, indent=1) + "\n", encoding="utf-8")


def _cycle(
    scenes: int, peak: float, first: int, start: Path, out: Path, *, seed: int, earlier: list[dict[str, float]],
    log_every: int,
) -> Iterator[list[dict[str, float]]]:  # fmt: skip
    """One cycle on the scenes from ``first`` on; gives the curve so far each time that it has written the weights."""
    torch.manual_seed(seed + first)
    model = create_digits_model(PAIRS_MODEL)
    model.load_state_dict({key: value.float() for key, value in load_file(start).items()})
    token_head = nn.Linear(model.embed_dim, CLASSES + 1)
    optimizer = create_optimizer_v2(nn.ModuleList([model, token_head]), opt="muon", lr=peak, weight_decay=WEIGHT_DECAY)
    steps = scenes // BATCH
    images, labels = development(EVALUATED)
    curve = list(earlier)
    before = curve[-1] if curve else {"minutes": 0.0, "cpu_minutes": 0.0}
    begun, cpu, drawing = time.monotonic(), time.process_time(), 0.0
    with float32_muon():
        for step, (x, y, patches, seconds) in enumerate(batches(draw, first, steps, seed)):
            drawing += seconds
            for group in optimizer.param_groups:
                group["lr"] = learning_rate(step, steps, peak)
            tokens = model.forward_features(x)
            task = F.cross_entropy(model.forward_head(tokens), y, label_smoothing=SMOOTHING)
            told = token_head(tokens[:, model.num_prefix_tokens :]).flatten(0, 1)
            loss = task + TOKEN_LOSS * F.cross_entropy(told, patches.flatten())
            optimizer.zero_grad()
            loss.backward()
            nn.utils.clip_grad_norm_(model.parameters(), 1.0)
            optimizer.step()
            if (step + 1) % log_every and step + 1 < steps:
                continue
            top1 = accuracy(model, images, labels, torch.device("cpu"))
            spent = (time.process_time() - cpu + drawing) / 60
            seen = first + (step + 1) * BATCH
            point = {
                "images": seen,
                "minutes": round(before["minutes"] + (time.monotonic() - begun) / 60, 2),
                "cpu_minutes": round(before["cpu_minutes"] + spent, 2),
                "loss": round(float(task.detach()), 4),
                "top1": top1,
            }
            curve.append(point)
            log.info(
                "%7d of %d scenes, loss %.3f, development top-1 %.3f, %.1f CPU minutes, %.0f to go",
                seen, first + scenes, point["loss"], top1, point["cpu_minutes"], spent * (steps / (step + 1) - 1),
            )  # fmt: skip
            save_weights(model, PAIRS_MODEL, out)
            yield curve


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--start", type=user_path, help=f"weights to begin from ({START} in --out, or shipped)")
    parser.add_argument("--out", type=user_path, required=True, help="folder for the weights and the training curve")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument(
        "--resume", action="store_true", help="go on after the last whole cycle, if --out holds its end"
    )
    args = parser.parse_args()
    logging.basicConfig(level=logging.INFO, format="%(asctime)s %(message)s", datefmt="%H:%M:%S")
    args.out.mkdir(parents=True, exist_ok=True)
    own = args.out / f"{START}.safetensors"
    train(
        args.out, start=args.start or (own if own.is_file() else WEIGHTS / own.name), seed=args.seed, resume=args.resume
    )


if __name__ == "__main__":
    main()
