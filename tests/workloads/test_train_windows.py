"""Rows trained on inside a Swin's windows: what they are told is what they are measured by, at the cost they say."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from ablations.models.digits import WEIGHTS
from ablations.models.siblings import STVIT_R, SWIN
from ablations.workloads import train_siblings, train_windows
from ablations.workloads.embedded import embedded_workload
from ablations.workloads.train_windows import DENSE, ROWS, SEMANTIC, Row

WORKLOAD = embedded_workload(8)


@pytest.mark.parametrize("name", ROWS)
@torch.no_grad()
def test_what_is_trained_is_what_is_measured(name: str) -> None:
    row, images = Row(name).eval(), WORKLOAD.batch(0, 8)
    logits, on_map, places = row.tell(images)
    torch.testing.assert_close(logits, row(images))
    assert on_map.shape == (8, 64, 64) and places is None
    dense = Row(DENSE).eval()
    share = float((row.driven().cost(images) / dense.driven().cost(images)).mean())
    assert {"9": 0.75, "4": 0.58, "0.75": 0.73, "0.5": 0.57, "2": 0.77, "1": 0.70, DENSE: 1.0}[
        name.rpartition("_")[2]
    ] == pytest.approx(share, abs=0.015)
    if name in SEMANTIC:  # told of the map that the generating blocks read
        assert on_map.mean(-1).abs().max() < 1e-5 and row.model.base == SEMANTIC[name]
    else:
        torch.testing.assert_close(on_map, row.driven().features(images, "last"))
        if name == DENSE:
            torch.testing.assert_close(on_map, row.model.forward_features(images).flatten(1, 2))


def test_every_row_learns_where_its_method_acts() -> None:
    for name in ("ats_4", "tome_0.5", "stvit_1"):
        row = Row(name).train()
        logits, on_map, _ = row.tell(WORKLOAD.batch(0, 8))
        (logits.square().sum() + on_map.square().sum()).backward()
        without = {key for key, each in row.model.named_parameters() if each.grad is None or not each.grad.any()}
        assert not without, name


@pytest.mark.slow
def test_rows_are_trained_from_the_shipped_swin_and_put_into_a_table(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(train_siblings, "EVALUATED", 20)
    for name in ("topk_4", "stvit_2"):
        train_windows.train(name, 128, tmp_path)
        train_windows.train(name, 192, tmp_path, resume=True)
    begun, ended = load_file(WEIGHTS / f"{SWIN}.safetensors"), load_file(tmp_path / "topk_4.safetensors")
    assert begun.keys() == ended.keys()
    assert 0 < max(float((begun[key].float() - ended[key].float()).abs().max()) for key in begun) < 0.5
    text = train_windows.document(tmp_path, embedded_workload(40)).read_text(encoding="utf-8")
    found = re.findall(r"^\| (\w+) \(([\d,]+) scenes\) \| (\S+) \|", text, flags=re.MULTILINE)
    assert found == [("topk_4", "192", "0.593"), ("stvit_2", "192", "0.772"), (STVIT_R, "38,400", "0.795")]
