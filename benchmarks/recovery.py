"""What training returns: every row trained on as long as the small STViT-R, by its recipe.

    python -m benchmarks.recovery --out FOLDER

Methods inside the windows of ``digits_swin_tiny`` and STViT begin from its shipped weights; STViT-R's unit on a plain
ViT, that ViT, its first seven blocks alone and methods at the cost of the unit, from those of ``pairs_vit_tiny``. All
see the 38,400 scenes that ``digits_stvit_r_tiny`` saw, in the same order, with the losses, optimizer and learning
rates of ``ablations.workloads.train_siblings``; a method acts in every step as it does afterwards. What token
labelling is told of lies on the map, where tokens that were dropped have their last features and tokens that were
merged those of the token that carries them (``restore="last"``); STViT's semantic tokens have no places, so there it
is the tokens of which they are made. The map that leaves a row, trained, is read as ``TASK=dense`` reads it, by a
linear head of its own. A row takes about ten minutes on one core.
"""

from __future__ import annotations

import argparse
import json
import logging
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from ablations.models.digits import CANVAS, CLASSES, EMBEDDED, PAIRS_MODEL, PATCH, WEIGHTS, create_known
from ablations.models.siblings import STVIT_R, SWIN
from ablations.models.weight_files import load_into, read_weights
from ablations.records.files import user_path
from ablations.records.patch_iou import miou
from ablations.records.wilson import wilson
from ablations.tasks.dense import SCENES as HEAD_SCENES
from ablations.tasks.dense import TASK as dense  # noqa: N811 (it is no constant in what it does)
from ablations.tasks.dense import fitted_head
from ablations.workloads.base import Workload
from ablations.workloads.embedded import IMAGES, embedded_workload, training_scenes
from ablations.workloads.train_siblings import SCENES, fit, told
from reducers import ATS, Count, Placement, RandomDrop, Ratio, ToMe, TopK, at, reduce_tokens
from reducers.backbones.stvit_swin import STViTSwin, semantics_of
from reducers.methods import STViTR

log = logging.getLogger(__name__)

SHIPPED = "stvit_r"  # the row of the small STViT-R, which is trained already
_BATCH = 32
_FROM, _ALL = 4, range(4, 10)  # the Swin's last stage: windows of 16 tokens
_SCORE = "attention_received"  # there is no class token
WINDOWS: dict[str, Callable[[], Placement]] = {
    "swin": Placement,
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
PLAIN: dict[str, Callable[[], Placement]] = {
    "vit": Placement,
    "vit_unit": lambda: at(range(6, 12), STViTR(Count(9))),
    "vit_7_blocks": Placement,
    "vit_topk": lambda: at(6, TopK(Count(28))),
    "vit_ats": lambda: at(7, ATS(Count(48))),  # at block 6 it keeps too few to cost as much as the others
    "vit_tome": lambda: at(range(6, 12), ToMe(Ratio(0.73))),
    "vit_random": lambda: at(6, RandomDrop(Count(28))),
}
ROWS = (*WINDOWS, *SEMANTIC, *PLAIN)  # those that are trained here


class Row(nn.Module):
    """A model, reduced or not: logits, and beside them the tokens that the recipe tells what they show.

    Args:
        name: one of ``ROWS``, with the weights that it begins from, or ``SHIPPED``.
    """

    def __init__(self, name: str) -> None:
        super().__init__()
        self.start = STVIT_R if name == SHIPPED else PAIRS_MODEL if name in PLAIN else SWIN
        model: Any = create_known(self.start)
        load_into(model, read_weights(WEIGHTS / f"{self.start}.safetensors"), name=self.start, source="the package")
        placement = {**WINDOWS, **PLAIN}.get(name, Placement)()
        if name in SEMANTIC:
            model = STViTSwin.from_swin(model, base=SEMANTIC[name], semantics=_SEMANTICS)
        elif name == "vit_7_blocks":
            del model.blocks[7:]
        self.model, self.fast = model, reduce_tokens(model, placement)
        self.whole = name not in SEMANTIC  # whether there is a map of what leaves the last block

        own = [member for member in self.fast.members() if any(True for _ in member.parameters())]
        # what is kept: the model, and what a method learns of its own
        self.learns = nn.ModuleDict({"model": model, "methods": nn.ModuleList(own)}) if own else model

    def forward(self, images: Tensor) -> Tensor:
        logits: Tensor = self.fast(images)
        return logits

    def tell(self, images: Tensor) -> tuple[Tensor, Tensor, None]:
        """Logits (B, classes) and the map (B, N, D)."""
        if self.start == STVIT_R:
            logits, on_map, _ = told(STVIT_R, self.model, images)
            return logits, on_map, None
        if self.whole:
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


def train(name: str, scenes: int, out: Path, *, seed: int = 0, resume: bool = False, log_every: int = 40) -> None:
    """Train one row on so many scenes; writes weights, curve and what ``resume`` needs to ``out`` as it goes."""
    torch.manual_seed(seed)
    row = Row(name)
    fit(name, row.learns, row.tell, row, scenes, out, start=row.start, seed=seed, resume=resume, log_every=log_every)


def document(out: Path, workload: Workload) -> Path:
    """Write ``out``/RECOVERY.md: for each training in ``out`` its cost, top-1 before and after it, and how well its map
    shows what lies where; last, the small STViT-R's.
    """
    lines = [
        f"On {len(workload):,} held-out scenes of digit pairs: MMAC of an image, top-1 in % with Wilson's 95 %",
        "interval before and after the training, and mIoU in %, patch by patch, with that of resampled scenes.",
        "",
        "| row | scenes | MMAC | off the shelf | trained | mIoU, trained |",
        "| --- | ---: | ---: | ---: | ---: | ---: |",
    ]
    for name in (*ROWS, SHIPPED):
        record = WEIGHTS / f"{STVIT_R}.training.json" if name == SHIPPED else out / f"{name}.training.json"
        if not record.is_file():
            continue
        row, before = Row(name).eval(), ""
        if name != SHIPPED:
            before = "" if name == "vit_7_blocks" else _top1(row, workload)
            load_into(row.learns, read_weights(out / f"{name}.safetensors"), name=name, source=str(out))
        seen = json.loads(record.read_text(encoding="utf-8"))["curve"][-1]["images"]
        mmacs = float(row.fast.cost(workload.batch(0, _BATCH)).mean()) / 1e6
        on_map = _miou(row, workload) if row.whole else ""
        lines.append(f"| {name} | {seen:,} | {mmacs:.2f} | {before} | {_top1(row, workload)} | {on_map} |")
    path = out / "RECOVERY.md"
    path.write_text("\n".join(lines) + "\n", encoding="utf-8")
    return path


@torch.inference_mode()
def _top1(row: Row, workload: Workload) -> str:
    found = torch.cat([row(images).argmax(1) for images in _batches(workload)])
    right = int((found == torch.from_numpy(workload.labels)).sum())
    low, high = wilson(right, len(workload))
    return f"{100 * right / len(workload):.1f} ({100 * low:.1f} to {100 * high:.1f})"


@torch.inference_mode()
def _miou(row: Row, workload: Workload) -> str:
    """Of a linear head fitted on the row's own maps of other scenes."""
    others, grid = training_scenes(EMBEDDED, HEAD_SCENES), (CANVAS // PATCH, CANVAS // PATCH)
    maps = torch.cat([row.tell(images)[1] for images in _batches(others)])
    head = fitted_head(maps.flatten(0, 1).numpy(), dense.targets(others, grid)[:, 1:].flatten(), classes=CLASSES + 1)
    answers = [torch.cat([on_map.flatten(1), logits], 1) for logits, on_map, _ in map(row.tell, _batches(workload))]
    found = dense.keep(torch.cat(answers), labels=dense.targets(workload, grid), fitted={"head": head})
    values = dense.values(found)
    low, high = dense.interval(values)
    return f"{100 * float(miou(values.sum(0))):.1f} ({100 * low:.1f} to {100 * high:.1f})"


def _batches(workload: Workload) -> Iterator[Tensor]:
    for first in range(0, len(workload), _BATCH):
        yield workload.batch(first, min(first + _BATCH, len(workload)))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--row", choices=ROWS, action="append", help="default: all of them")
    parser.add_argument("--scenes", type=int, default=SCENES[STVIT_R], help="scenes in all (default: STViT-R's)")
    parser.add_argument("--out", type=user_path, required=True, help="folder for the weights and the training curves")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--measure-only", action="store_true", help="train nothing; measure the rows that --out has")
    parser.add_argument("--limit", type=int, default=IMAGES[EMBEDDED], help="measure on at most that many scenes")
    parser.add_argument("--resume", action="store_true", help="go on from what --out holds of an earlier run")
    args = parser.parse_args()
    logging.basicConfig(level=logging.INFO, format="%(asctime)s %(message)s", datefmt="%H:%M:%S")
    args.out.mkdir(parents=True, exist_ok=True)
    for name in [] if args.measure_only else args.row or ROWS:
        train(name, args.scenes, args.out, seed=args.seed, resume=args.resume)
    log.info("wrote %s", document(args.out, embedded_workload(args.limit)))


if __name__ == "__main__":
    main()
