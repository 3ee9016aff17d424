"""Measured speed of each reducer against the dense model: ``make bench``, or ``python -m benchmarks --help``.

    python -m benchmarks speed      every reducer beside the dense model (what ``python -m benchmarks`` alone does)
    python -m benchmarks scaling    time and memory against tokens and batch, and the share that deciding takes
    python -m benchmarks gpu        the measurements for one large GPU, in bfloat16
    python -m benchmarks record     record ATS's counts on real images, to be replayed where there are no weights
    python -m benchmarks still      the share of patches that rlt drops of real clips, against its threshold

Needs torch, timm and safetensors alone, and Pillow for real images; figures are drawn where matplotlib is installed.
"""

from __future__ import annotations

import argparse
import logging
import sys
from collections.abc import Sequence
from pathlib import Path

from ablations.records.files import user_path
from ablations.streams import standard_streams
from benchmarks import allocator

RESULTS = Path("benchmarks/results")


def parser() -> argparse.ArgumentParser:
    """The command line."""
    raw = argparse.RawDescriptionHelpFormatter
    top = argparse.ArgumentParser(prog="python -m benchmarks", description=__doc__, formatter_class=raw)
    commands = top.add_subparsers(dest="command")
    common = argparse.ArgumentParser(add_help=False)
    common.add_argument("--weights", type=user_path, help="safetensors file for the models of its width; the others, "
                        "or all without it, get random weights and replayed counts")  # fmt: skip
    common.add_argument("--data", type=user_path, help="folder of real images (any depth); without it they are random")
    common.add_argument("--device", help="cpu or cuda (default: cuda where there is one)")
    common.add_argument("--threads", type=int, help="CPU threads (default: torch's choice)")
    common.add_argument("--allocator", choices=sorted(allocator.ALLOCATORS), default=allocator.USUAL,
                        help="on a CPU with glibc: steady keeps memory between calls, system leaves the C library as "
                        "it is (default: %(default)s)")  # fmt: skip
    common.add_argument("--out", type=user_path, default=RESULTS, help="folder of the results (default: %(default)s)")

    add = commands.add_parser
    speed = add("speed", parents=[common], help="every reducer beside the dense model")
    speed.add_argument("--model", nargs="+", default=["deit_tiny_patch16_224", "deit_small_patch16_224"],
                       help="timm names (default: DeiT-Ti and DeiT-S)")  # fmt: skip
    speed.add_argument("--size", nargs="+", default=[], help="pixels, such as 224 384 (default: the model's own)")
    speed.add_argument("--dtype", nargs="+", default=["float32"], help="float32, bfloat16 (default: float32)")
    speed.add_argument("--batch", nargs="+", default=[], help="default: 1 32, and on a GPU 256 1024")
    speed.add_argument("--rounds", type=int, default=5, help="times each variant takes its turn in a process "
                       "(default: %(default)s)")  # fmt: skip
    speed.add_argument("--processes", type=int, help="fresh processes that measure one after the other, their pairs "
                       "pooled: how memory comes to lie differs between them (default: 3, on a GPU 1)")  # fmt: skip
    speed.add_argument("--train-batch", type=int, default=8, help="images of a training step, 0 for none "
                       "(default: %(default)s)")  # fmt: skip
    speed.add_argument("--only", nargs="+", default=[], help="variants whose name holds one of these words")
    speed.add_argument("--no-memory", action="store_true", help="leave peak memory out")
    speed.add_argument("--no-contrast", action="store_true", help="leave the padded and masked runs out")
    speed.add_argument("--reference", action="store_true", help="time ToMe's reference algorithm as well")
    speed.add_argument("--profile", action="store_true", help="tell which ops take the time, at the largest batch")

    scaling = add("scaling", parents=[common], help="time and memory against tokens and batch")
    scaling.add_argument("--model", default="deit_tiny_patch16_224", help="timm name (default: %(default)s)")
    scaling.add_argument("--size", nargs="+", default=["224", "384", "512", "768", "1024"], help="pixels: 196 to 4096 "
                         "tokens by default")  # fmt: skip
    scaling.add_argument("--batch", nargs="+", default=[], help="at the smallest size (default: 1 2 4 … 64, on a GPU "
                         "1 4 … 1024)")  # fmt: skip
    scaling.add_argument("--at-batch", type=int, help="batch of the series over tokens (default: 1, on a GPU 16)")
    scaling.add_argument("--dtype", default=None, help="default: float32, on a GPU bfloat16")
    scaling.add_argument("--rounds", type=int, default=5, help="default: %(default)s")

    gpu = add("gpu", parents=[common], help="the measurements for one large GPU")
    gpu.add_argument("--minutes", type=float, default=4.0, help="begin nothing later than this "
                     "(default: %(default)s)")  # fmt: skip
    gpu.add_argument("--toy", action="store_true", help="a tiny model and two images, on any device: does it run?")

    record = add("record", parents=[common], help="record ATS's counts on real images")
    record.add_argument("--model", default="deit_tiny_patch16_224", help="timm name (default: %(default)s)")
    record.add_argument("--images", type=int, default=256, help="default: %(default)s, spread over the folder")

    still = add("still", help="the share of patches that rlt drops of real clips, against its threshold")
    still.add_argument("--data", type=user_path, required=True, help="folder of folders of frames, one a video")
    still.add_argument("--out", type=user_path, default=RESULTS, help="folder of the results (default: %(default)s)")
    return top


def main(arguments: Sequence[str] | None = None) -> int:
    given = list(sys.argv[1:] if arguments is None else arguments)
    if not given or (given[0].startswith("-") and given[0] not in ("-h", "--help")):
        given = ["speed", *given]
    args = parser().parse_args(given)
    logging.basicConfig(level=logging.INFO, format="%(message)s")

    if sys.platform == "linux" and arguments is None and args.command != "still":
        allocator.settle(args.allocator)

    import torch  # not before: the program may just have started again

    from benchmarks import commands, pooled, still

    if args.command == "still":
        print(*still.run(args.data, args.out), sep="\n")
        return 0
    device = torch.device(args.device or ("cuda" if torch.cuda.is_available() else "cpu"))
    if args.threads:
        torch.set_num_threads(args.threads)
    with standard_streams(lasting=True):
        if args.command == "speed":
            processes = args.processes or (1 if device.type == "cuda" else 3)
            if processes > 1:
                pooled.run(given, args.out, rounds=args.rounds, processes=processes, say=print)
                return 0
        return commands.run(args, device)


if __name__ == "__main__":
    sys.exit(main())
