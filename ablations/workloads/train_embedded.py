"""Train the embedded workload's models again: ``make weights``, or ``python -m ablations.workloads.train_embedded``.

The recipe, and why: a ViT this small learns slowly from one label an image, so each patch token is also told
what it shows (its digit, or background), the *token labelling* of LV-ViT (Jiang et al., NeurIPS 2021); the extra head
is thrown away. Clutter grows from none to all of it over the first half. Muon on the matrices and AdamW on the
rest (timm's), one-cycle schedule, bfloat16 autocast where the device has units for it, else float32. No token is ever
dropped in training, so what the models lose to a reduction later is what the reduction costs.
"""

from __future__ import annotations

import argparse
import json
import logging
import math
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import nullcontext
from pathlib import Path

import numpy as np
import torch
from safetensors.torch import load_file
from timm.optim import create_optimizer_v2
from torch import Tensor, nn
from torch.nn import functional as F

from ablations.models.digits import CLASSES, MODELS, PATCH, create_digits_model, normalise, save_weights
from ablations.precision import autocast, float32_muon, in_words, precision_on
from ablations.records.files import user_path
from ablations.workloads import digits
from ablations.workloads.embedded import first_workload
from ablations.workloads.model_card import read_records, token_choice, write_card

log = logging.getLogger(__name__)

RECIPES = {  # scenes of the one-cycle schedule, and where it is cut
    "digits_vit_small": (400_000, 225_280),
    "digits_vit_tiny": (200_064, 143_360),
}
BATCH = 128
PEAK_LR = 2e-3
WEIGHT_DECAY = 0.05
WARMUP = 0.05  # of all steps
TOKEN_LOSS = 0.5
EVALUATED = 1080  # held-out scenes looked at for the curve: each held-out digit three times


def train_batch(first: int, seed: int, max_clutter: int) -> tuple[Tensor, Tensor, Tensor]:
    """Scenes ``first`` … ``first + BATCH`` of the endless training split: images, labels, labels of each patch."""
    scenes = [digits.render("train", first + i, seed=seed, max_clutter=max_clutter) for i in range(BATCH)]
    images = normalise(torch.from_numpy(np.stack([scene.image for scene in scenes])))
    labels = torch.tensor([scene.label for scene in scenes])
    shown = torch.from_numpy(digits.mask_patches(np.stack([s.mask for s in scenes]), PATCH))
    return images, labels, torch.where(shown, labels[:, None], CLASSES)


def batches(steps: int, seed: int) -> Iterator[tuple[Tensor, Tensor, Tensor]]:
    """Training batches, drawn one ahead of the model; clutter grows to its full amount over the first half."""

    def draw(step: int) -> tuple[Tensor, Tensor, Tensor]:
        clutter = min(digits.MAX_CLUTTER, round(2 * step / steps * digits.MAX_CLUTTER))
        return train_batch(step * BATCH, seed, clutter)

    with ThreadPoolExecutor(1) as pool:
        ahead = pool.submit(draw, 0)
        for step in range(steps):
            batch = ahead.result()
            ahead = pool.submit(draw, step + 1)
            yield batch


def held_out(count: int) -> tuple[Tensor, Tensor]:
    """The first ``count`` held-out scenes, normalised, and their labels."""
    scenes = [digits.render("test", i) for i in range(count)]
    images = normalise(torch.from_numpy(np.stack([scene.image for scene in scenes])))
    return images, torch.tensor([scene.label for scene in scenes])


@torch.inference_mode()
def accuracy(model: nn.Module, images: Tensor, labels: Tensor, device: torch.device) -> float:
    """Top-1 on the given images, in float32."""
    model.eval()
    found = [model(part.to(device)).argmax(-1).cpu() for part in images.split(256)]
    model.train()
    return float((torch.cat(found) == labels).double().mean())


def learning_rate(step: int, steps: int, peak: float = PEAK_LR) -> float:
    """One cycle: linear warm-up, then half a cosine down to zero."""
    warm = max(1, round(WARMUP * steps))
    if step < warm:
        return peak * (step + 1) / warm
    return peak * 0.5 * (1 + math.cos(math.pi * (step - warm) / max(1, steps - warm)))


def train(name: str, schedule: int, out: Path, *, stop_after: int, seed: int = 0, log_every: int = 160) -> None:
    """Train one of the embedded models; writes weights and curve to ``out`` as it goes.

    ``schedule``: scenes the learning rate and the clutter are planned for; ``stop_after``: scenes after which to
    stop all the same.
    """
    torch.manual_seed(seed)
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    precision = precision_on(device, "bfloat16")
    log.info("%s: %s", name, in_words(device, precision, wanted="bfloat16"))
    model = create_digits_model(name).to(device)
    token_head = nn.Linear(model.embed_dim, CLASSES + 1).to(device)
    optimizer = create_optimizer_v2(
        nn.ModuleList([model, token_head]), opt="muon", lr=PEAK_LR, weight_decay=WEIGHT_DECAY
    )
    steps = math.ceil(schedule / BATCH)
    last = min(steps, math.ceil(stop_after / BATCH))
    test_images, test_labels = held_out(EVALUATED)
    curve: list[dict[str, float]] = []
    begun = time.monotonic()
    for step, (x, y, patches) in enumerate(batches(steps, seed)):
        for group in optimizer.param_groups:
            group["lr"] = learning_rate(step, steps)
        x, y, patches = x.to(device), y.to(device), patches.to(device)
        with autocast(device, precision):
            tokens = model.forward_features(x)
            logits = model.forward_head(tokens)
            token_logits = token_head(tokens[:, model.num_prefix_tokens :])
        task = F.cross_entropy(logits.float(), y, label_smoothing=0.05)
        loss = task + TOKEN_LOSS * F.cross_entropy(token_logits.float().flatten(0, 1), patches.flatten())
        optimizer.zero_grad()
        loss.backward()
        nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        with float32_muon() if precision == "float32" else nullcontext():
            optimizer.step()
        if (step + 1) % log_every == 0 or step + 1 == last:
            top1 = accuracy(model, test_images, test_labels, device)
            minutes = (time.monotonic() - begun) / 60
            seen = (step + 1) * BATCH
            curve.append(
                {"images": seen, "minutes": round(minutes, 2), "loss": round(float(task.detach()), 4), "top1": top1}
            )
            log.info(
                "%s: %7d of %d images, loss %.3f, held-out top-1 %.3f, %.1f min, %.0f min to go",
                name, seen, last * BATCH, float(task.detach()), top1, minutes, minutes * (last / (step + 1) - 1),
            )  # fmt: skip
            save_weights(model, name, out)
            record = {
                "model": name,
                "schedule": steps * BATCH,
                "images": seen,
                "seed": seed,
                "device": device.type,
                "precision": precision,
                "curve": curve,
            }
            (out / f"{name}.training.json").write_text(json.dumps(record, indent=1) + "\n")
        if step + 1 == last:
            break


def document(out: Path) -> Path:
    """Measure the models in ``out`` and write their card."""
    records, choices = read_records(out), {}
    for name in records:
        model = create_digits_model(name)
        model.load_state_dict({key: value.float() for key, value in load_file(out / f"{name}.safetensors").items()})
        log.info("%s: does token choice matter?", name)
        choices[name] = token_choice(model.eval(), first_workload())
    return write_card(out, records, choices)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", choices=sorted(MODELS), action="append", help="default: all of them")
    parser.add_argument("--images", type=int, help="scenes of the schedule (default: the model's recipe)")
    parser.add_argument("--stop-after", type=int, help="stop after so many scenes (default: the model's recipe)")
    parser.add_argument(
        "--card-only", action="store_true", help="train nothing; measure the weights in --out and write their card"
    )
    parser.add_argument("--out", type=user_path, required=True, help="folder for the weights and the training curve")
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args()
    logging.basicConfig(level=logging.INFO, format="%(asctime)s %(message)s", datefmt="%H:%M:%S")
    args.out.mkdir(parents=True, exist_ok=True)
    for name in [] if args.card_only else args.model or sorted(MODELS):
        schedule, cut = RECIPES[name]
        if args.images is not None:
            schedule = cut = args.images
        train(name, schedule, args.out, stop_after=args.stop_after or cut, seed=args.seed)
    log.info("wrote %s", document(args.out))


if __name__ == "__main__":
    main()
