"""From the command line to the measurements."""

from __future__ import annotations

import argparse
from collections.abc import Sequence

import torch

from benchmarks import counts, gpu, models
from benchmarks.session import Scenario, Source, run_scaling, run_speed
from benchmarks.speed import Effort

_CPU_BATCHES, _GPU_BATCHES = (1, 32), (1, 32, 256, 1024)


def run(args: argparse.Namespace, device: torch.device) -> int:
    """The command asked for; the status of the program."""
    source = Source(device, args.out, args.weights, args.data, say=_say)
    cuda = device.type == "cuda"
    match args.command:
        case "speed":
            for scenario in scenarios(args, cuda=cuda):
                run_speed(scenario, source)
        case "scaling":
            batches = numbers(args.batch) or ((1, 4, 16, 64, 256, 1024) if cuda else (1, 2, 4, 8, 16, 32, 64))
            dtype, batch = args.dtype or ("bfloat16" if cuda else "float32"), args.at_batch or (16 if cuda else 1)
            run_scaling(args.model, numbers(args.size), batches, dtype, source, batch=batch, rounds=args.rounds)
        case "gpu":
            if args.toy:
                gpu.run(source, minutes=args.minutes, scenarios=gpu.toy())
                return 0
            if not cuda:
                _say(
                    "no GPU: torch.cuda.is_available() is false here. `make bench-gpu` is for a machine with one; "
                    "`make bench` measures on this one, and --toy tries the same at toy size"
                )
                return 1
            _say(gpu.device_line(device))
            gpu.run(source, minutes=args.minutes)
        case "record":
            return record(args, device)
    return 0


def scenarios(args: argparse.Namespace, *, cuda: bool) -> list[Scenario]:
    """Every model at every size in every precision."""
    batches = numbers(args.batch) or (_GPU_BATCHES if cuda else _CPU_BATCHES)
    effort = Effort(rounds=args.rounds, memory=not args.no_memory, training_batch=args.train_batch or None)
    return [
        Scenario(
            model, batches, size=size, dtype=dtype, effort=effort, contrast=not args.no_contrast,
            reference=args.reference, profiled=args.profile, only=tuple(args.only),
        )
        for model in words(args.model)
        for size in numbers(args.size) or (None,)
        for dtype in words(args.dtype)
    ]  # fmt: skip


def record(args: argparse.Namespace, device: torch.device) -> int:
    """Record ATS's counts for ``Counts.load``."""
    if args.weights is None or args.data is None:
        _say("counts mean something with trained weights on real images only: give --weights FILE and --data DIR")
        return 2
    model, trained = models.create(args.model, size=None, weights=args.weights)
    if not trained:
        _say(f"{args.weights} does not fit {args.model}")
        return 2
    size = model.patch_embed.img_size[0]
    images = models.images(args.images, size=size, data=args.data).to(device)
    origin = f"{args.model} with trained weights on {len(images)} real images ({args.data.name})"
    file = counts.RECORDED.with_name(f"{args.model}.json")
    counts.write(counts.record(model.to(device), images, origin=origin), file)
    _say(f"written: {file}")
    return 0


def words(values: Sequence[str]) -> tuple[str, ...]:
    """What was given apart, with commas or within one quoted word."""
    return tuple(word for value in values for word in value.replace(",", " ").split())


def numbers(values: Sequence[str]) -> tuple[int, ...]:
    """The same as whole numbers."""
    try:
        return tuple(int(word) for word in words(values))
    except ValueError as error:
        raise SystemExit(f"--size and --batch take whole numbers: {error}") from error


def _say(text: str) -> None:
    print(text, flush=True)
