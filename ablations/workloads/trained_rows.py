"""What the cards of small models say of each: its size and cost, how long it was trained, how much it gets right."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from pathlib import Path

import torch
from torch import Tensor, nn

from ablations.models.weight_files import load_into, read_weights
from ablations.records.wilson import wilson
from ablations.workloads.base import Workload
from reducers import Placement, reduce_tokens

_BATCH = 32


@torch.no_grad()
def trained_rows(
    out: Path,
    models: Mapping[str, Callable[[], nn.Module]],
    workload: Workload,
    *,
    logits: Callable[[str, nn.Module, Tensor], Tensor],
    unit: str,
    counted: str,
) -> tuple[list[str], list[str]]:
    """A table's row and the training curve of each of the models that has weights and a record in ``out``.

    Args:
        out: the folder.
        models: by name, each with random weights.
        workload: what they are measured on.
        logits: of a model of that name for a batch.
        unit: under which a record has the number of scenes or clips in all.
        counted: under which a point of its curve has those so far.
    """
    rows, curves = [], []
    for name in sorted(models):
        path = out / f"{name}.training.json"
        if not path.is_file():
            continue
        record, model = json.loads(path.read_text(encoding="utf-8")), models[name]()
        load_into(model, read_weights(out / f"{name}.safetensors"), name=name, source=str(out))
        model.eval()
        starts = range(0, len(workload), _BATCH)
        found = [logits(name, model, workload.batch(i, min(i + _BATCH, len(workload)))) for i in starts]
        right = int((torch.cat(found).argmax(1) == torch.from_numpy(workload.labels)).sum())
        low, high = wilson(right, len(workload))
        mmacs = float(reduce_tokens(model, Placement()).cost(workload.batch(0, 1))[0]) / 1e6
        parameters, last = sum(parameter.numel() for parameter in model.parameters()) / 1e6, record["curve"][-1]
        rows.append(
            f"| {name} | {parameters:.3f} | {mmacs:.1f} | {record[unit]:,} | {last['cpu_minutes']:.0f} "
            f"({last['minutes']:.0f}) | {100 * right / len(workload):.1f} ({100 * low:.1f} to {100 * high:.1f}) |"
        )
        points = ", ".join(f"{point[counted] / 1000:.0f}k {100 * point['top1']:.1f}" for point in record["curve"])
        curves += [f"{name}: {points}.", ""]
    return rows, curves
