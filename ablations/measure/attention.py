"""Which way the sizes of tokens come into attention faster on this GPU: as a mask, or folded into the products.

Measured once a run, for the shapes that are trained, and kept in OUT/cache: what comes later in the same run takes the
same, as the two round differently. On a CPU, and in float32 everywhere, there is nothing to choose.
"""

from __future__ import annotations

import logging
import statistics
import time
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch

from ablations.measure.context import device_name
from ablations.precision import Precision
from ablations.records.files import locked, read_json, write_json
from reducers.hosts.protocol import Host
from reducers.runtime.fold import ATTENTIONS, Attention
from reducers.runtime.kernels import packed_attention
from reducers.tokens import Layout

log = logging.getLogger(__name__)

ROUNDS, WARMUP = 9, 3
_LEFT = (1.0, 0.5)  # shares of the tokens that are there when attention is asked


@dataclass(frozen=True)
class Shape:
    """What an attention is asked of."""

    images: int
    tokens: int
    heads: int
    width: int  # of a head

    @classmethod
    def of(cls, host: Host, images: int) -> Shape:
        """Of a model's last stage, for so many images at once."""
        stage = host.stages[-1]
        tokens = stage.prefix + (196 if stage.grid is None else stage.grid[0] * stage.grid[1])
        return cls(images, tokens, stage.heads, stage.width // stage.heads)


def attention_for(
    shape: Shape, precision: Precision, *, device: torch.device, folder: Path, backward: bool = True
) -> Attention:
    """The quicker way, measured here unless ``folder`` knows it of this device and shape."""
    if device.type != "cuda" or precision == "float32":
        return "mask"
    name = f"{device_name(device)}-{precision}-{'-'.join(map(str, asdict(shape).values()))}-torch-{torch.__version__}"
    file = folder / f"attention-{''.join(c if c.isalnum() or c in '.-' else '-' for c in name)}.json"
    with locked(folder / "attention.lock", what="measuring attention"):
        known = read_json(file)
        if not isinstance(known, dict) or known.get("attention") not in ATTENTIONS:
            seconds = measured(shape, getattr(torch, precision), device=device, backward=backward)
            known = {"attention": quicker(seconds), "seconds": seconds}
            write_json(file, known)
    log.info("sizes come into attention by %s: %s", known["attention"], _told(known["seconds"]))
    return known["attention"]


def quicker(seconds: Mapping[str, float]) -> Attention:
    """The fold where it is quicker, else the mask."""
    return "fold" if seconds["fold"] < seconds["mask"] else "mask"


def measured(
    shape: Shape, dtype: torch.dtype, *, device: torch.device, backward: bool, rounds: int = ROUNDS
) -> dict[str, float]:
    """Seconds of attention by each way, with the gradients where asked: medians of rounds in which they took turns."""
    total: dict[str, float] = dict.fromkeys(ATTENTIONS, 0.0)
    for share in _LEFT:
        runs = {way: _attention(shape, share, dtype, device, backward=backward, fold=way == "fold")
                for way in ATTENTIONS}  # fmt: skip
        for way, own in in_turn(runs, device, rounds=rounds).items():
            total[way] += statistics.median(own)
    return total


def in_turn(runs: Mapping[Any, Callable[[], object]], device: torch.device, *, rounds: int) -> dict[Any, list[float]]:
    """Seconds of each run, round by round; who begins changes from round to round."""
    times: dict[Any, list[float]] = {name: [] for name in runs}
    for number in range(WARMUP + rounds):
        for name in list(runs)[:: 1 if number % 2 else -1]:
            _wait(device)
            started = time.perf_counter()
            runs[name]()
            _wait(device)
            if number >= WARMUP:
                times[name].append(time.perf_counter() - started)
    return times


def _attention(
    shape: Shape, share: float, dtype: torch.dtype, device: torch.device, *, backward: bool, fold: bool
) -> Callable[[], object]:
    tokens = max(1, round(share * shape.tokens))
    layout = Layout.alike(shape.images, tokens, 1, device)
    random = torch.Generator(device).manual_seed(0)
    rows, size = layout.rows, (layout.rows, shape.heads, shape.width)
    q, k, v = (torch.randn(size, generator=random, device=device, dtype=dtype) for _ in range(3))
    bias = torch.randint(1, 9, (rows,), generator=random, device=device).float().log()
    attend = partial(
        packed_attention, queries=layout, keys=layout, scale=shape.width**-0.5, key_bias=bias, fold=fold
    )  # fmt: skip

    @torch.no_grad()
    def forward() -> object:
        return attend(q, k, v)

    def both() -> object:
        asked = [part.detach().requires_grad_() for part in (q, k, v)]
        return torch.autograd.grad(attend(*asked).sum(), asked)

    return both if backward else forward


def _wait(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def _told(seconds: Mapping[str, float]) -> str:
    return ", ".join(f"{way} {1e3 * own:.2f} ms" for way, own in seconds.items())
