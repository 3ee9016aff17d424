"""From a placement file, as `sievit recommend` writes it, to a model in use: in Python, and as ONNX."""

import sys
import tempfile
from pathlib import Path

import timm
import torch

import reducers
from reducers.placement_file import read_placement_file
from reducers.runtime.export import export_onnx

WRITTEN = """
name: recommended_0_60
title: Recommended for deit_tiny_patch16_224
recommended: {version: 1, model: deit_tiny_patch16_224, depth: 12, patches: 196, cost: 0.6}
arms:
- variant: ToMe 0-5, then top-K 6
  stages:
  - {at: [0, 1, 2, 3, 4, 5], stack: [{name: tome, budget: {drop: 14}}]}
  - {at: [6], stack: [{name: topk, budget: {ratio: 0.6}}]}
"""

with tempfile.TemporaryDirectory() as folder:
    path = Path(sys.argv[1] if len(sys.argv) > 1 else f"{folder}/0.60.yaml")  # OUT/recommended/0.60.yaml
    if len(sys.argv) <= 1:
        path.write_text(WRITTEN, encoding="utf-8")
    model = timm.create_model(read_placement_file(path).recommended["model"]).eval()  # pretrained=True as ever
    fast = reducers.reduce_tokens(model, reducers.load(path, model))
    logits, trace = fast.trace(torch.randn(2, 3, 224, 224))
    print(f"tokens entering each block {trace.tokens[0].tolist()}, {trace.macs[0] / 1e9:.3f} GMACs an image")
    try:
        exported = export_onnx(fast, Path(folder) / "reduced.onnx")
        print(f"exported: {exported.stat().st_size / 1e6:.0f} MB")
    except (reducers.ReducerError, ImportError) as error:  # counts that differ from image to image stay in Python
        print(error)
