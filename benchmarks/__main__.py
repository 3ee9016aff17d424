"""Measured speed of each reducer against the dense model: ``make bench``, or ``python -m benchmarks --help``.

Needs torch, timm and safetensors alone, so that it runs on a machine that has nothing else.
"""

from __future__ import annotations

import argparse
import json
import platform
from pathlib import Path

import timm
import torch
from safetensors.torch import load_file

from benchmarks.speed import compare, markdown, records, variants


def main() -> None:
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--model", default="deit_small_patch16_224", help="timm name (default: %(default)s)")
    parser.add_argument(
        "--weights", type=Path, help="safetensors file; without one the weights are random, and so are ATS's counts"
    )
    parser.add_argument("--batch", type=int, nargs="+", default=[1, 32], help="batch sizes (default: 1 32)")
    parser.add_argument(
        "--rounds", type=int, default=7, help="times each variant takes its turn (default: %(default)s)"
    )
    parser.add_argument("--dtype", choices=["float32", "bfloat16"], default="float32")
    parser.add_argument(
        "--out", type=Path, default=Path("benchmarks/results"), help="folder of the tables (default: %(default)s)"
    )
    args = parser.parse_args()

    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    model = timm.create_model(args.model)
    if args.weights is not None:
        model.load_state_dict(load_file(args.weights))
    model = model.eval().to(device, getattr(torch, args.dtype))
    machine = (
        torch.cuda.get_device_name(device)
        if device.type == "cuda"
        else f"{_processor()}, {torch.get_num_threads()} threads"
    )
    size = model.patch_embed.img_size
    table = []
    for batch in args.batch:
        images = torch.randn(batch, 3, *size, generator=torch.Generator().manual_seed(0))
        images = images.to(device, getattr(torch, args.dtype))
        table += compare(model, variants(len(model.blocks)), images, rounds=args.rounds)
    weights = "random weights" if args.weights is None else f"weights {args.weights.name}"
    versions = f"torch {torch.__version__}, timm {timm.__version__}"
    title = f"{args.model}, {args.dtype}, {weights}, random images, on {machine}; {versions}"
    note = "Every variant took its turn in one run; only ratios within a table mean anything."
    text = f"# {title}\n\n{note}\n\n{markdown(table)}"
    print(text)
    args.out.mkdir(parents=True, exist_ok=True)
    stem = args.out / f"speed-{args.model}-{args.dtype}-{device.type}"
    stem.with_suffix(".md").write_text(text)
    stem.with_suffix(".json").write_text(json.dumps({"title": title, "rows": records(table)}, indent=1) + "\n")


def _processor() -> str:
    facts = Path("/proc/cpuinfo")
    for line in facts.read_text().splitlines() if facts.exists() else []:
        if line.startswith("model name"):
            return line.split(":", 1)[1].strip()
    return platform.processor() or platform.machine()


if __name__ == "__main__":
    main()
