"""The model card beside the shipped weights: recipe, training curve,
and whether token choice matters to these models.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from ablations.models.digits import MODELS, PATCH
from ablations.workloads import digits
from ablations.workloads.base import Workload
from ablations.workloads.embedded import first_workload
from reducers import Count, Decision, Placement, RandomDrop, TokenReducer, TopK, at, reduce_tokens
from reducers.kit.selection import keep_highest
from reducers.reducer import State
from reducers.signals import Signals
from reducers.tokens import Counts

BLOCK = 3
KEPT = (32, 12)  # of 64 patches
_BATCH = 120
_RECIPE = """\
# The embedded models

Plain timm `VisionTransformer`s for the *cluttered digits*: 64 x 64 grey scenes, 64 patches of 8 x 8, 12 blocks.
Weights: safetensors, float16. This page is written by `make weights`; no number in it is typed by hand.

## Recipe

Scenes are drawn on the fly from the first four fifths of scikit-learn's handwritten digits (the last fifth is held
out); clutter grows from none to 9 pieces over the first half of the schedule. Batch 128; Muon on the matrices and AdamW
on the rest, peak learning rate 2e-3, one cycle with 5 % warm-up, weight decay 0.05, gradient norm clipped to 1, label
smoothing 0.05, bfloat16 autocast; plus 0.5 x token labelling (each patch token is told its digit, or background; that
head is thrown away). No token is dropped in training. A caveat: token labelling uses the masks, so these models know
better than most where to look.
"""


class KeepMarked(TokenReducer):
    """An oracle: keep the patches that show the digit, then others in raster order. For the images it was made
    for, in their order.
    """

    name = "keep_marked"

    def __init__(self, marked: Tensor, count: int) -> None:
        super().__init__()
        self.marked = marked  # (B, N) bool
        self.count = count

    def decide(self, signals: Signals, state: State) -> Decision | None:
        scores = signals.layout.spread(self.marked.to(torch.float32), prefix=0.0)
        kept = keep_highest(signals.layout, scores, Counts.of(signals.layout, self.count))
        return None if kept is None else Decision(kept)


@torch.inference_mode()
def token_choice(model: nn.Module, workload: Workload) -> dict[str, float]:
    """Top-1 of the dense model, and with few patches kept at block 3: by the digit's mask,
    by class attention, at random (3 seeds).
    """
    assert workload.masks is not None
    marked = torch.from_numpy(digits.mask_patches(np.asarray(workload.masks), PATCH))

    def top1(placement_of: Any) -> float:
        correct = 0
        for start in range(0, len(workload), _BATCH):
            stop = min(start + _BATCH, len(workload))
            logits = reduce_tokens(model, placement_of(marked[start:stop]))(workload.batch(start, stop))
            correct += int((logits.argmax(1).numpy() == workload.labels[start:stop]).sum())
        return correct / len(workload)

    found = {"dense": top1(lambda part: Placement())}
    for count in KEPT:
        found[f"{count} by the mask"] = top1(lambda part, n=count: at(BLOCK, KeepMarked(part, n)))
        found[f"{count} by class attention"] = top1(lambda part, n=count: at(BLOCK, TopK(Count(n))))
        draws = [top1(lambda part, n=count, s=seed: at(BLOCK, RandomDrop(Count(n), seed=s))) for seed in range(3)]
        found[f"{count} at random"] = sum(draws) / len(draws)
    return found


def write_card(folder: Path, records: dict[str, dict[str, Any]], choices: dict[str, dict[str, float]]) -> Path:
    """MODEL_CARD.md from what training recorded and ``token_choice`` measured, both by model name."""
    lines = [
        *_RECIPE.splitlines(),
        "",
        "| model | width, heads | schedule (scenes) | trained (scenes) | minutes | device | dense top-1 |",
        "| --- | --- | ---: | ---: | ---: | --- | ---: |",
    ]
    for name, record in records.items():
        shape = MODELS[name]
        last = record["curve"][-1]
        lines.append(
            f"| {name} | {shape['embed_dim']}, {shape['num_heads']} | {record['schedule']:,} | {record['images']:,} "
            f"| {last['minutes']:.0f} | {record['device']} | {100 * choices[name]['dense']:.1f} |"
        )
    lines += [
        "",
        "Where *trained* is less than *schedule*, the one cycle was cut there, its learning rate still high.",
        "The minutes were taken on a machine that did other work as well.",
        "",
        "## Does token choice matter?",
        "",
        f"Top-1 (%) on {len(first_workload()):,} held-out scenes, off the shelf, so many of the 64 patches kept at "
        f"block {BLOCK}; random: mean of 3 seeds.",
        "",
        "| model | dense | " + " | ".join(key for key in next(iter(choices.values())) if key != "dense") + " |",
        "| --- " + "| ---: " * len(next(iter(choices.values()))) + "|",
    ]
    lines += [
        f"| {name} | " + " | ".join(f"{100 * v:.1f}" for v in found.values()) + " |" for name, found in choices.items()
    ]
    lines += ["", "## Training curve", "", "Top-1 (%) on 1,080 held-out scenes with full clutter.", ""]
    for name, record in records.items():
        points = ", ".join(f"{round(point['images'] / 1000)}k {100 * point['top1']:.1f}" for point in record["curve"])
        lines += [f"{name}: {points}.", ""]
    path = folder / "MODEL_CARD.md"
    path.write_text("\n".join(lines), encoding="utf-8")
    return path


def read_records(folder: Path) -> dict[str, dict[str, Any]]:
    """What training recorded beside the weights, for the models that have it."""
    paths = {name: folder / f"{name}.training.json" for name in MODELS}
    return {name: json.loads(path.read_text()) for name, path in paths.items() if path.exists()}
