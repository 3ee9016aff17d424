"""Rows trained on: what they are told is what they are measured by, at the cost they say."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from ablations.models.digits import WEIGHTS
from ablations.models.siblings import SWIN
from ablations.workloads import train_siblings
from ablations.workloads.embedded import embedded_workload
from benchmarks import recovery
from benchmarks.recovery import ROWS, SEMANTIC, SHIPPED, Row

WORKLOAD = embedded_workload(8)
MMACS = {  # the dense Swin, and what its rows cost of it; a plain ViT of 12 blocks, its unit, its first seven
    "swin": 34.93, "9": 26.5, "4": 20.7, "0.75": 25.6, "0.5": 20.2, "2": 26.97, "1": 24.48, "r": 27.76, "vit": 45.09,
    "unit": 32.47, "blocks": 26.41, "topk": 32.31, "ats": 32.39, "tome": 32.57, "random": 32.3,
}  # fmt: skip


@pytest.mark.parametrize("name", [*ROWS, SHIPPED])
@torch.no_grad()
def test_what_is_trained_is_what_is_measured(name: str) -> None:
    row, images = Row(name).eval(), WORKLOAD.batch(0, 8)
    logits, on_map, places = row.tell(images)
    torch.testing.assert_close(logits, row(images))
    assert on_map.shape == (8, 64, 64) and places is None
    found = float(row.fast.cost(images).mean()) / 1e6
    assert found == pytest.approx(MMACS[name.rpartition("_")[2]], rel=0.015)
    if name in SEMANTIC:  # told of the map that the generating blocks read
        assert on_map.mean(-1).abs().max() < 1e-5 and row.model.base == SEMANTIC[name]
    else:
        torch.testing.assert_close(on_map, row.fast.features(images, "last"))
        if name == "swin":
            torch.testing.assert_close(on_map, row.model.forward_features(images).flatten(1, 2))


def test_every_row_learns_where_its_method_acts() -> None:
    for name in ("ats_4", "tome_0.5", "stvit_1", "vit_unit", "vit_ats", "vit_tome", "vit_7_blocks"):
        row = Row(name).train()
        logits, on_map, _ = row.tell(WORKLOAD.batch(0, 8))
        (logits.square().sum() + on_map.square().sum()).backward()
        assert not [key for key, each in row.learns.named_parameters() if each.grad is None or not each.grad.any()]
    assert len(row.model.blocks) == 7 and "methods.0.units.6" in dict(Row("vit_unit").learns.named_parameters())


@pytest.mark.slow
def test_rows_are_trained_from_shipped_weights_and_put_into_a_table(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(train_siblings, "EVALUATED", 20)
    for name in ("topk_4", "tome_0.75", "vit_unit"):
        recovery.train(name, 128, tmp_path)
        recovery.train(name, 192, tmp_path, resume=True)
    begun, ended = load_file(WEIGHTS / f"{SWIN}.safetensors"), load_file(tmp_path / "topk_4.safetensors")
    assert begun.keys() == ended.keys()
    assert 0 < max(float((begun[key].float() - ended[key].float()).abs().max()) for key in begun) < 0.5
    text = recovery.document(tmp_path, embedded_workload(100)).read_text(encoding="utf-8")
    found = re.findall(r"^\| (\S+) \| ([\d,]+) \| (\S+) \| .* \| (\S*).* \|$", text, flags=re.MULTILINE)
    assert [line[:3] for line in found] == [
        ("topk_4", "192", "20.72"), ("tome_0.75", "192", "25.59"), ("vit_unit", "192", "32.47"),
        (SHIPPED, "38,400", "27.76"),
    ]  # fmt: skip
    mious = [line[3] for line in found]
    assert 40 < float(mious[3]) < 90 and float(mious[0]) < min(float(mious[1]), float(mious[3]))
