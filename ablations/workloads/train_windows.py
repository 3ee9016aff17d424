"""What training returns inside windows: every row trained on as long as the small STViT-R, by its recipe.

    python -m ablations.workloads.train_windows --out FOLDER

Each row begins from the shipped weights of ``digits_swin_tiny`` and sees the 38,400 scenes that
``digits_stvit_r_tiny`` saw, in the same order, with the losses, optimizer and learning rates of
``ablations.workloads.train_siblings``; a method acts in every step as it does afterwards. What token labelling
is told of lies on the map, where tokens that were dropped have their last features (``restore="last"``); STViT's
semantic tokens have no places, so there it is the tokens of which they are made. A row takes about ten minutes on
one core; the table puts the shipped STViT-R beside them.
"""

from __future__ import annotations

import argparse
import json
import logging
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from ablations.models.digits import WEIGHTS
from ablations.models.siblings import SIBLINGS, STVIT_R, SWIN
from ablations.models.weight_files import load_into, read_weights
from ablations.records.files import user_path
from ablations.records.wilson import wilson
from ablations.workloads.base import Workload
from ablations.workloads.embedded import embedded_workload
from ablations.workloads.train_siblings import SCENES, fit
from reducers import ATS, Count, Placement, RandomDrop, Ratio, ReducedViT, ToMe, TopK, at, reduce_tokens
from reducers.backbones.stvit_swin import STViTSwin, semantics_of

log = logging.getLogger(__name__)

DENSE = "dense"
_BATCH = 32
_FROM, _ALL = 4, range(4, 10)  # the last stage: windows of 16 tokens
_SCORE = "attention_received"  # there is no class token
PLACEMENTS: dict[str, Callable[[], Placement]] = {
    DENSE: Placement,
    "topk_9": lambda: at(_FROM, TopK(Count(9), score=_SCORE)),
    "topk_4": lambda: at(_FROM, TopK(Count(4), score=_SCORE)),
    "ats_9": lambda: at(_FROM, ATS(Count(9), score=_SCORE)),
    "ats_4": lambda: at(_FROM, ATS(Count(4), score=_SCORE)),
    "tome_0.75": lambda: at(_ALL, ToMe(Ratio(0.75))),
    "tome_0.5": lambda: at(_ALL, ToMe(Ratio(0.5))),
    "random_9": lambda: at(_FROM, RandomDrop(Count(9))),
    "random_4": lambda: at(_FROM, RandomDrop(Count(4))),
}
SEMANTIC = {"stvit_2": 2, "stvit_1": 1}  # base blocks
_SEMANTICS = semantics_of(8, 4, side=2)  # 2 x 2 of each window of 4 x 4, as the small STViT-R has
ROWS = (*PLACEMENTS, *SEMANTIC)


class Row(nn.Module):
    """A Swin with a method, or an STViT: logits, and beside them the tokens that the recipe tells what they show."""

    def __init__(self, name: str) -> None:
        super().__init__()
        swin: Any = SIBLINGS[SWIN]()
        load_into(swin, read_weights(WEIGHTS / f"{SWIN}.safetensors"), name=SWIN, source="the package")
        self.model: Any = (
            STViTSwin.from_swin(swin, base=SEMANTIC[name], semantics=_SEMANTICS) if name in SEMANTIC else swin
        )
        self.fast: Any = None if name in SEMANTIC else reduce_tokens(swin, PLACEMENTS[name]())

    def forward(self, images: Tensor) -> Tensor:
        return (self.model if self.fast is None else self.fast)(images)

    def tell(self, images: Tensor) -> tuple[Tensor, Tensor, None]:
        """Logits (B, classes) and the map (B, N, D)."""
        if self.fast is not None:
            on_map, logits, _ = self.fast.trace_features(images, "last")
            return logits, on_map, None
        seen: list[Tensor] = []
        block = self.model.layers[2].blocks[self.model.base - 1]
        hook = block.register_forward_hook(lambda module, inputs, output: seen.append(output))
        try:
            logits = self.model(images)
        finally:
            hook.remove()
        return logits, F.layer_norm(seen[0].flatten(1, 2), seen[0].shape[-1:]), None

    def driven(self) -> ReducedViT:
        """What tells the cost."""
        return reduce_tokens(self.model, Placement()) if self.fast is None else self.fast


def train(name: str, scenes: int, out: Path, *, seed: int = 0, resume: bool = False, log_every: int = 40) -> None:
    """Train one row on so many scenes; writes weights, curve and what ``resume`` needs to ``out`` as it goes."""
    torch.manual_seed(seed)
    row = Row(name)
    fit(name, row.model, row.tell, row, scenes, out, start=SWIN, seed=seed, resume=resume, log_every=log_every)


def document(out: Path, workload: Workload) -> Path:
    """Write ``out``/WINDOWS.md: for each training in ``out`` its cost, and top-1 before and after; last, STViT-R's."""
    lines = [
        f"Windows of a Swin: top-1 in % on {len(workload):,} held-out scenes, with Wilson's 95 % interval.",
        "",
        "| row | share of the cost | off the shelf | trained |",
        "| --- | ---: | ---: | ---: |",
    ]
    dense = _macs(Row(DENSE).driven(), workload)
    for name in ROWS:
        record = out / f"{name}.training.json"
        if not record.is_file():
            continue
        row = Row(name).eval()
        before, share = _top1(row, workload), _macs(row.driven(), workload) / dense
        load_into(row.model, read_weights(out / f"{name}.safetensors"), name=name, source=str(out))
        seen = json.loads(record.read_text(encoding="utf-8"))["curve"][-1]["images"]
        lines.append(f"| {name} ({seen:,} scenes) | {share:.3f} | {before} | {_top1(row, workload)} |")
    model = SIBLINGS[STVIT_R]()
    load_into(model, read_weights(WEIGHTS / f"{STVIT_R}.safetensors"), name=STVIT_R, source="the package")
    share = _macs(reduce_tokens(model.eval(), Placement()), workload) / dense
    lines.append(f"| {STVIT_R} ({SCENES[STVIT_R]:,} scenes) | {share:.3f} | | {_top1(model, workload)} |")
    path = out / "WINDOWS.md"
    path.write_text("\n".join(lines) + "\n", encoding="utf-8")
    return path


@torch.inference_mode()
def _top1(model: nn.Module, workload: Workload) -> str:
    starts = range(0, len(workload), _BATCH)
    found = [model(workload.batch(first, min(first + _BATCH, len(workload)))) for first in starts]
    right = int((torch.cat(found).argmax(1) == torch.from_numpy(workload.labels)).sum())
    low, high = wilson(right, len(workload))
    return f"{100 * right / len(workload):.1f} ({100 * low:.1f} to {100 * high:.1f})"


def _macs(driven: ReducedViT, workload: Workload) -> float:
    """Of an image, mean over a batch."""
    return float(driven.eval().cost(workload.batch(0, _BATCH)).mean())


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--row", choices=ROWS, action="append", help="default: all of them")
    parser.add_argument("--scenes", type=int, default=SCENES[STVIT_R], help="scenes in all (default: STViT-R's)")
    parser.add_argument("--out", type=user_path, required=True, help="folder for the weights and the training curves")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--measure-only", action="store_true", help="train nothing; measure the rows that --out has")
    parser.add_argument("--limit", type=int, help="measure on at most that many scenes (default: all)")
    parser.add_argument("--resume", action="store_true", help="go on from what --out holds of an earlier run")
    args = parser.parse_args()
    logging.basicConfig(level=logging.INFO, format="%(asctime)s %(message)s", datefmt="%H:%M:%S")
    args.out.mkdir(parents=True, exist_ok=True)
    for name in [] if args.measure_only else args.row or ROWS:
        train(name, args.scenes, args.out, seed=args.seed, resume=args.resume)
    log.info("wrote %s", document(args.out, embedded_workload(args.limit)))


if __name__ == "__main__":
    main()
