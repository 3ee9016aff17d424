"""How far an embedded workload tells ordinary methods apart: ``python -m ablations.measure.separation``.

Off the shelf, each method at the setting that costs a share of the dense model, sought on other scenes than those that
are counted. With ``--card`` it writes the model card of the digit pairs beside the weights.
"""

from __future__ import annotations

import argparse
import json
import logging
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import partial
from itertools import combinations
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import numpy as np
import torch
from torch import nn

from ablations.measure.calibrate import solve
from ablations.measure.context import TrialContext, spans, use_exact_float32
from ablations.measure.opening import choose_device, open_context, open_subject
from ablations.records.files import user_path
from ablations.records.paired import ALPHA, holm, mcnemar
from ablations.records.wilson import wilson
from ablations.trial.stages import Stages
from ablations.trial.target import Target
from ablations.workloads import ImageSource, default_models
from ablations.workloads.model_card import KeepMarked
from reducers import Placement, at, reduce_tokens

log = logging.getLogger(__name__)

SHARES = (0.5, 0.6)  # of the dense model's multiply-adds


def _one(blocks: list[int], name: str, free: str) -> list[dict[str, Any]]:
    return [{"at": blocks, "stack": [{"name": name, "budget": {free: "auto"}}]}]


METHODS: dict[str, list[dict[str, Any]]] = {
    "ATS": _one([*range(3, 12)], "ats", "count"),
    "top-K": _one([3], "topk", "count"),
    "EViT": _one([3, 6, 9], "evit", "ratio"),
    "ToMe": _one([*range(12)], "tome", "drop"),
    "ATC": _one([3, 6, 9], "atc", "ratio"),
    "random": _one([3], "random", "count"),
    "fixed pattern": _one([3, 6, 9], "fixed_pattern", "ratio"),
    "smaller input": _one([0], "small_input", "count"),
}
PAIRED = ("ATS", "top-K", "EViT", "ToMe")  # whose six pairs are tested
ORACLE = "by mask"  # top-K's count of patches at block 3, those of the digits that decide first


@dataclass(frozen=True)
class Separation:
    """Who is right on which scene, by method and share of the dense cost."""

    workload: str
    model: str
    dense: np.ndarray  # (images,) bool
    correct: Mapping[tuple[str, float], np.ndarray]
    cost: Mapping[tuple[str, float], float]  # attained, as a share of the dense model's

    def span(self, share: float) -> float:
        """Best less worst top-1 of the ordinary methods."""
        found = [self.correct[name, share].mean() for name in METHODS]
        return float(max(found) - min(found))

    def pairs(self, share: float) -> dict[tuple[str, str], float]:
        """McNemar's mid-p of each pair of ``PAIRED``, corrected (Holm) over the six."""
        pairs = list(combinations(PAIRED, 2))
        values = []
        for first, second in pairs:
            one, other = self.correct[first, share], self.correct[second, share]
            values.append(mcnemar(int((one & ~other).sum()), int((other & ~one).sum()))[1])
        return dict(zip(pairs, holm(values), strict=True))


def separation(context: TrialContext, target: Target) -> Separation:
    """Evaluate ``METHODS`` and the oracle at ``SHARES``; the workload must know its masks."""
    use_exact_float32()
    marked = torch.from_numpy(np.asarray(context.object_patches)).to(context.device)
    correct: dict[tuple[str, float], np.ndarray] = {}
    cost: dict[tuple[str, float], float] = {}
    for share in SHARES:
        for name, stages in METHODS.items():
            trial = target.trial(
                spec="separation", variant=name, x=None, stages=Stages.of(stages), seed=0, target=share, calibrated=True
            )
            solution = solve(trial, context)
            placement = solution.stages.placement(context.facts.depth)
            correct[name, share] = _correct(context, partial(_reduced, context.model, placement))
            cost[name, share] = solution.calibration_gmacs / context.dense.gmacs
            log.info("%s %.2f: %.1f %%", name, share, 100 * correct[name, share].mean())
            if name == "top-K":
                count = int(solution.stages.data[0]["stack"][0]["budget"]["count"])
                correct[ORACLE, share] = _correct(context, partial(_by_mask, context.model, marked, count))
                cost[ORACLE, share] = cost[name, share]
    dense = _correct(context, partial(_reduced, context.model, Placement()))
    return Separation(target.workload, context.facts.name, dense, correct, cost)


def _reduced(model: nn.Module, placement: Placement, start: int, stop: int) -> nn.Module:
    return reduce_tokens(model, placement)


def _by_mask(model: nn.Module, marked: torch.Tensor, count: int, start: int, stop: int) -> nn.Module:
    return reduce_tokens(model, at(3, KeepMarked(marked[start:stop], count)))


@torch.inference_mode()
def _correct(context: TrialContext, model_of: Callable[[int, int], nn.Module]) -> np.ndarray:
    """(images,) bool: who is right; ``model_of`` gives the model for the images ``start`` … ``stop - 1``."""
    found = []
    for start, stop in spans(len(context.workload), 120):
        logits = model_of(start, stop)(context.workload.batch(start, stop).to(context.device))
        found.append(logits.argmax(1).cpu().numpy() == context.workload.labels[start:stop])
    return np.concatenate(found)


def measure(
    workload: str, *, model: str | None = None, weights: str | None = None, limit: int | None = None
) -> Separation:
    """``separation`` of an embedded workload's main model, or of another."""
    subject = open_subject(ImageSource(workload, limit=limit), model or default_models(workload)[0], weights=weights)
    with TemporaryDirectory() as cache:
        return separation(open_context(subject, choose_device(), cache=Path(cache)), subject.target)


def table(found: Separation) -> list[str]:
    """The figures in Markdown."""
    images = len(found.dense)

    def top1(correct: np.ndarray) -> str:
        low, high = wilson(int(correct.sum()), images)
        return f"{100 * correct.mean():.1f} ({100 * low:.1f} to {100 * high:.1f})"

    lines = [
        f"{found.model} on {images:,} scenes, dense {top1(found.dense)}. Top-1 in %, with Wilson's 95 % interval.",
        "",
        "| method | " + " | ".join(f"at {share:g} of the dense cost" for share in SHARES) + " |",
        "| --- " + "| ---: " * len(SHARES) + "|",
    ]
    for name in (*METHODS, ORACLE):
        cells = [f"{top1(found.correct[name, share])} at {found.cost[name, share]:.3f}" for share in SHARES]
        lines.append(f"| {name} | " + " | ".join(cells) + " |")
    lines.append("")
    for share in SHARES:
        pairs = found.pairs(share)
        told = [f"{a}/{b} {p:.2g}" for (a, b), p in pairs.items() if p < ALPHA]
        same = [f"{a}/{b} {p:.2g}" for (a, b), p in pairs.items() if p >= ALPHA]
        span = f"{100 * found.span(share):.1f} points"
        lines += [
            f"At {share:g}: the eight methods span {span}; of the six pairs of {', '.join(PAIRED)}, {len(told)} are "
            f"told apart (McNemar, Holm): {', '.join(told) or 'none'}; not: {', '.join(same) or 'none'}.",
            "",
        ]
    return lines


_CARD = """\
# The model of the digit pairs

A plain timm `VisionTransformer` for the *digit pairs*: 64 x 64 grey scenes, 64 patches of 8 x 8, width 64, 2 heads, 12
blocks. Weights: safetensors, float16. This page is written by `make weights`; no number in it is typed by hand.

## The label

A scene shows three handwritten digits of 18 to 23 pixels, one scene in five shows four, and up to 4 pieces of others
as clutter. One digit is shown twice (two pictures of it, each of its own size and slant), all others once. **The label
is the digit shown twice**: one of ten. The mask covers both pictures of that digit, which decide the label, and
nothing else.

## Recipe

Scenes are drawn on the fly from the first four fifths of scikit-learn's handwritten digits (the last fifth, of other
writers, is held out); half of them show four digits. Training begins from the shipped `digits_vit_tiny`, which reads
single digits among clutter. Batch 64; Muon (in float32) on the matrices and AdamW on the rest, two one-cycle schedules
with 5 % warm-up (38,400 scenes with a peak learning rate of 1e-3, then 25,600 with 5e-4), weight decay 0.05, gradient
norm clipped to 1, label smoothing 0.05, float32; plus 0.5 x token labelling (each patch token is told its digit, or
background; that head is thrown away). No token is dropped in training. Settings, the share of scenes with four digits
among them, were chosen on scenes of another seed; the scenes below were drawn after all of them were frozen, from the
same 360 held-out pictures of digits. A caveat: token labelling tells each token its digit, so this model knows better
than most where digits are.
"""


def write_card(folder: Path, record: Mapping[str, Any], found: Separation, before: Separation) -> Path:
    """PAIRS_CARD.md from what training recorded and what was measured here, of the pairs and of the older scenes."""
    last = record["curve"][-1]
    points = ", ".join(f"{point['images'] / 1000:.1f}k {100 * point['top1']:.1f}" for point in record["curve"])
    lines = [
        *_CARD.splitlines(),
        "",
        f"{record['scenes']:,} scenes: {last['cpu_minutes']:.1f} CPU minutes ({last['minutes']:.0f} minutes on a "
        f"machine that did other work as well), after the training of {record['start']} (MODEL_CARD.md).",
        "",
        "## Does it tell methods apart?",
        "",
        "Off the shelf, at equal cost, each setting sought on 128 further scenes; the cost attained stands behind.",
        "",
        *table(found),
        "The same of the older scenes (`embedded:v1`):",
        "",
        *table(before),
        "## Training curve",
        "",
        f"Top-1 (%) on 720 development scenes, of which half show four digits: {points}.",
        "",
    ]
    path = folder / "PAIRS_CARD.md"
    path.write_text("\n".join(lines), encoding="utf-8")
    return path


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--workload", default="embedded", choices=("embedded", "embedded:v1"))
    parser.add_argument("--model", help="default: the workload's main model")
    parser.add_argument("--limit", type=int, help="scenes (default: all of the workload)")
    parser.add_argument("--card", type=user_path, metavar="FOLDER", help="write PAIRS_CARD.md beside the weights there")
    args = parser.parse_args()
    logging.basicConfig(level=logging.INFO, format="%(asctime)s %(message)s", datefmt="%H:%M:%S")
    if args.card is None:
        log.info("\n%s", "\n".join(table(measure(args.workload, model=args.model, limit=args.limit))))
        return
    model = default_models("embedded")[0]
    record = json.loads((args.card / f"{model}.training.json").read_text(encoding="utf-8"))
    found = measure("embedded", weights=str(args.card / f"{model}.safetensors"), limit=args.limit)
    log.info("wrote %s", write_card(args.card, record, found, measure("embedded:v1", limit=args.limit)))


if __name__ == "__main__":
    main()
