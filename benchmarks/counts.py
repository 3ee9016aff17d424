"""Realistic numbers of tokens where there are no real weights.

What ATS keeps depends on the image and on the weights: under random weights its scores are almost even, and its counts
say nothing. So the counts it gives with a trained DeiT-Ti on real images are recorded once (``python -m benchmarks
record``), and replayed on models of which there are no weights.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from benchmarks.padded import PaddedSignals
from reducers import ATS, Count, at, reduce_tokens
from reducers.reducer import State
from reducers.scores import SCORES, Heads, Score
from reducers.signals import Signals

RECORDED = Path(__file__).parent / "counts" / "deit_tiny_patch16_224.json"
# (first block, last block, K) of the settings timed, on a network of twelve blocks
SETTINGS = ((3, 3, 160), (3, 3, 96), (3, 3, 48), (3, 11, 196), (3, 11, 160), (3, 11, 108))


@dataclass(frozen=True)
class Counts:
    """Patch tokens that ATS left at each of its blocks, image by image, for several settings."""

    origin: str  # one sentence: weights, images, how many
    initial: int  # patch tokens entering block 0
    kept: dict[tuple[bool, int], Tensor]  # (one stage?, K) -> (images, stages) int64

    @classmethod
    def load(cls, path: Path = RECORDED) -> Counts:
        """The counts as recorded."""
        data = json.loads(path.read_text(encoding="utf-8"))
        kept = {
            (entry["first"] == entry["last"], entry["k"]): torch.tensor(entry["kept"]) for entry in data["settings"]
        }
        return cls(data["origin"], data["initial"], kept)

    def replay(self, *, blocks: Sequence[int], k: int, initial: int, start: int = 0) -> Replay:
        """ATS with K points in these blocks, keeping what was recorded for the images from number ``start`` on.

        On a model of ``initial`` patch tokens K and the counts grow in proportion; where it reduces at another number
        of blocks, each takes the counts recorded at the same share of the way.
        """
        recorded = self.kept[len(blocks) == 1, k]
        stages = recorded.shape[1]
        steps = max(len(blocks) - 1, 1)
        columns = [round(stage * (stages - 1) / steps) for stage in range(len(blocks))]
        points = max(1, round(k * initial / self.initial))
        scaled = (recorded[:, columns] * initial / self.initial).round().long().clamp(min=1, max=points)
        return Replay(points, dict(zip(blocks, scaled.roll(-start, dims=0).unbind(1), strict=True)))


class Replay(ATS):
    """ATS that does all its own work, and keeps a number of tokens given beforehand.

    Class attention, value norms, cumulative sum, sampling, the map and the transfer of the counts to the host are
    ATS's, on every call. Only between score and sampling the scores are exchanged for others made once: alike for the
    m tokens to keep, spread evenly over the image, and zero for the rest. Inverse-transform sampling with K >= m points
    then keeps exactly these m. So which tokens stay means nothing, how many is real, and nothing is timed that ATS
    would not do.
    """

    def __init__(self, k: int, kept: dict[int, Tensor]) -> None:
        super().__init__(Count(k))
        self.kept = kept  # block -> (images,) patch tokens to keep; images beyond the end start again
        self._made: dict[tuple[int, int], Tensor] = {}
        real = SCORES[self.score]
        self._score = Score(self._exchanged, real.summary, real.needs_class_token, real.uses_random)

    def _exchanged(self, signals: Signals, state: State, heads: Heads, seed: int) -> Tensor:
        scores = SCORES[self.score].compute(signals, state, heads, seed)
        key = (state.block, signals.layout.rows)
        if key not in self._made:
            self._made[key] = self._pattern(signals, self.kept[state.block]).to(scores)
        return self._made[key]

    @staticmethod
    def _pattern(signals: Signals, kept: Tensor) -> Tensor:
        """(T,) 1 for the tokens to keep, 0 for the others: of n tokens, the m at even distances."""
        layout = signals.layout
        live = ~layout.is_prefix
        if isinstance(signals, PaddedSignals) and signals.live is not None:
            live = live & signals.live.flatten()
        images = torch.arange(layout.images, device=live.device) % len(kept)
        wanted = kept.to(live.device)[images]
        total = layout.sum_rows(live.long())
        before = live.long().cumsum(0)  # patch tokens up to and with each row, over all images …
        rank = before - (total.cumsum(0) - total)[layout.row_image]  # … and within the image
        m, n = torch.minimum(wanted, total)[layout.row_image], total.clamp(min=1)[layout.row_image]
        return live & (rank * m // n > (rank - 1) * m // n)


@torch.inference_mode()
def record(model: Any, images: Tensor, *, origin: str, batch: int = 32) -> dict[str, Any]:
    """The counts of every setting on these images, as plain data for ``Counts.load``."""
    prefix = model.num_prefix_tokens
    settings = []
    for first, last, k in SETTINGS:
        reduced = reduce_tokens(model, at(range(first, last + 1), ATS(Count(k))))
        tokens = torch.cat([reduced.trace(part)[1].tokens for part in images.split(batch)])
        kept = tokens[:, first + 1 : last + 2] - prefix
        settings.append({"first": first, "last": last, "k": k, "kept": kept.tolist()})
    return {"origin": origin, "initial": model.patch_embed.num_patches, "images": len(images), "settings": settings}


def write(data: dict[str, Any], path: Path) -> None:
    """One setting a line: small, and a difference between two files can be read."""
    head = {key: value for key, value in data.items() if key != "settings"}
    lines = ",\n".join(json.dumps(entry, separators=(",", ":")) for entry in data["settings"])
    text = json.dumps(head)[:-1] + ', "settings": [\n' + lines + "\n]}\n"
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(text, encoding="utf-8")
