"""ATS brought to the costs in print for video models: ``python -m benchmarks.published_video``.

    python -m benchmarks.published_video --model xvit_b_8 timesformer_hr --blocks 3-11 0-11

Real passes over one clip, with random weights: for each model the number of sample points K at which ATS costs the
share of the dense model that Tables 2 and 3 of its paper print. Costs are sought by bisection and counted from the
tokens that each pass keeps. **Counts on random weights say nothing about trained ones**: attention is nearly uniform
there, so a trained model needs another K. No public text says in which blocks ATS sat: ``--blocks`` are ours.

A pass over TimeSformer-L is 2.4 T multiply-adds: about two minutes on one core, and some eight of them are needed.
"""

from __future__ import annotations

import argparse
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode

from ablations.measure.calibrate import search
from analysis.published import printed, printed_rows
from reducers import ATS, Count, at, reduce_tokens
from reducers.hosts import host_of
from reducers.placement import parse_blocks

GIGA = 1e9
WARNING = "counts on random weights say nothing about trained ones"


def _timesformer(frames: int, size: int, classes: int) -> nn.Module:
    from transformers import TimesformerConfig, TimesformerForVideoClassification

    return TimesformerForVideoClassification(TimesformerConfig(num_frames=frames, image_size=size, num_labels=classes))


def _xvit(name: str, classes: int) -> nn.Module:
    from reducers.backbones import xvit

    model: nn.Module = getattr(xvit, name)(num_classes=classes)
    return model


@dataclass(frozen=True)
class Anchor:
    """A model of the paper's tables, and what one view of it is."""

    table: str
    printed_as: str
    make: Callable[[], nn.Module]
    frames: int
    size: int
    note: str = ""

    @property
    def share(self) -> float:
        """The printed cost with ATS as a share of the printed dense cost."""
        return printed(self.table, "ATS", model=self.printed_as).gflops / self.dense_gflops

    @property
    def dense_gflops(self) -> float:
        """As printed: all views together."""
        return next(row.gflops for row in printed_rows(self.table, model=self.printed_as) if row.method == "")


ANCHORS = {
    "xvit_b_8": Anchor(
        "Table 2", "X-ViT (16x)", lambda: _xvit("xvit_b_8", 400), 8, 224,
        "printed beside the accuracy of 16 frames, but 425 is the cost of 8",
    ),
    "xvit_b_16": Anchor("Table 3", "X-ViT (16x)", lambda: _xvit("xvit_b_16", 600), 16, 224),
    "timesformer_hr": Anchor("Table 3", "TimeSformer-HR", lambda: _timesformer(16, 448, 600), 16, 448),
    "timesformer_l": Anchor("Table 2", "TimeSformer-L", lambda: _timesformer(96, 224, 400), 96, 224),
}  # fmt: skip
VIEWS = 3  # of each: the tables print 1x3


@dataclass(frozen=True)
class Reached:
    """What one search came to; costs in G multiply-adds of one view."""

    points: int  # K, of each frame
    patches: int  # of a frame
    gmacs: float
    dense: float
    goal: float
    kept: tuple[float, ...]  # patches of a frame that leave each block, mean over frames
    passes: int


def dense_gmacs(anchor: Anchor) -> float:
    """Of the plain model on one view: counted on the meta device, where nothing is computed."""
    with torch.device("meta"):
        model, clip = anchor.make().eval(), torch.empty(1, anchor.frames, 3, anchor.size, anchor.size)
    with torch.no_grad(), FlopCounterMode(display=False) as counter:
        model(clip)
    return counter.get_total_flops() / 2 / GIGA


def seek(
    model: nn.Module, clip: Tensor, *, dense: float, share: float, blocks: Sequence[int], say: Callable[[str], None]
) -> Reached:
    """The K at which ATS in these blocks costs ``share`` of ``dense``, the cost of the plain model, on this clip
    (1, F, C, H, W); each K that is looked at is a pass of its own.
    """
    frames = clip.shape[1]
    patches = host_of(model).patches  # of a frame
    known: dict[int, tuple[float, tuple[float, ...]]] = {}

    def cost(rung: int) -> float:
        points, started = rung + 1, time.perf_counter()
        fast = reduce_tokens(model, at(list(blocks), ATS(Count(points)))).eval()
        with torch.inference_mode():
            _, trace = fast.trace(clip)
        gmacs = float(trace.macs[0]) / GIGA
        kept = [trace.kept(block)[0].float().sum() / frames for block in range(fast.host.depth)]
        known[rung] = gmacs, tuple(float(count) for count in kept)
        say(f"  K = {points}: {gmacs:.2f} G, {gmacs / dense:.4f} of dense, {time.perf_counter() - started:.0f} s")
        return gmacs

    found = search(cost, patches, share * dense)
    gmacs, kept = known[found.rung]
    return Reached(found.rung + 1, patches, gmacs, dense, share * dense, kept, found.probes)


def tell(name: str, anchor: Anchor, blocks: str, found: Reached) -> list[str]:
    """What came out, for people."""
    ats = printed(anchor.table, "ATS", model=anchor.printed_as).gflops
    note = f" ({anchor.note})" if anchor.note else ""
    kept = ", ".join(f"{count:.0f}" for count in found.kept)
    return [
        f"{name}, ATS in blocks {blocks}: K = {found.points} of {found.patches} patches a frame: "
        f"{VIEWS * found.gmacs:.0f} of {VIEWS * found.dense:.0f} G multiply-adds with {VIEWS} views, "
        f"{found.gmacs / found.dense:.4f} of dense",
        f"  in print ({anchor.table}): {ats:g} of {anchor.dense_gflops:g} GFLOPs, {anchor.share:.4f}{note}",
        f"  patches of a frame after each block, mean over frames: {kept}",
        f"  {found.passes} passes over one clip of noise, random weights: {WARNING}",
    ]


def main(arguments: Sequence[str] | None = None) -> int:
    raw = argparse.RawDescriptionHelpFormatter
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.published_video", description=__doc__, formatter_class=raw
    )
    parser.add_argument("--model", nargs="+", choices=ANCHORS, default=list(ANCHORS), help="default: all")
    parser.add_argument("--blocks", nargs="+", default=["3-11"], help="where ATS acts (default: 3-11)")
    parser.add_argument("--threads", type=int, help="CPU threads (default: torch's choice)")
    given = parser.parse_args(arguments)
    if given.threads:
        torch.set_num_threads(given.threads)

    def say(text: str) -> None:
        print(text, flush=True)

    for name in given.model:
        anchor = ANCHORS[name]
        dense = dense_gmacs(anchor)
        say(f"{name}: dense {dense:.3f} G a view, {VIEWS * dense:.1f} with {VIEWS} views; in print "
            f"{anchor.dense_gflops:g}")  # fmt: skip
        torch.manual_seed(0)
        model, clip = anchor.make().eval(), torch.randn(1, anchor.frames, 3, anchor.size, anchor.size)
        for blocks in given.blocks:
            chosen = parse_blocks(blocks, depth=12)
            found = seek(model, clip, dense=dense, share=anchor.share, blocks=chosen, say=say)
            for line in tell(name, anchor, blocks, found):
                say(line)
    return 0


if __name__ == "__main__":
    sys.exit(main())
