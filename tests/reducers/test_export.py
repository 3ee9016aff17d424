"""Reduced models of fixed counts as exported graphs: the same logits, for any batch, from gathers and plain sums."""

from __future__ import annotations

import pytest
import torch

from reducers import ATS, EViT, Ratio, ReducerError, Stack, ToMe, TopK, at, build, reduce_tokens
from reducers.runtime.export import export_onnx
from tests.samples import sampled

from .conftest import make_vit
from .test_compile import FIXED, METHODS, QUICK, reduced
from .test_contract import fresh

BATCHES = (1, 2, 9)
EACH_TIME = "tome"  # exporting is slow: one method goes all the way to ONNX, every other one in `make test-slow`


@pytest.mark.slow
@pytest.mark.parametrize("name", [*METHODS, QUICK[-1]])
@torch.no_grad()
def test_fixed_counts_export_with_a_free_batch(name):
    model = reduced(name)
    shapes = {"images": {0: torch.export.Dim("batch")}}
    program = torch.export.export(model, (torch.randn(4, 3, 48, 48),), dynamic_shapes=shapes)
    for size in BATCHES:
        images = torch.randn(size, 3, 48, 48)
        torch.testing.assert_close(program.module()(images), model(images), rtol=0, atol=1e-5)
    operators = " ".join(str(node.target) for node in program.graph.nodes if node.op == "call_function")
    for name_of_operator in ("scatter_reduce", "nonzero", "_local_scalar_dense", "aten.item"):
        assert name_of_operator not in operators


@pytest.mark.parametrize("name", sampled([*METHODS, QUICK[-1]], quick=[EACH_TIME]))
@torch.no_grad()
def test_onnxruntime_agrees(name, tmp_path):
    onnx = pytest.importorskip("onnx")
    onnxruntime = pytest.importorskip("onnxruntime")
    if name == EACH_TIME:  # by one block, and another that finds tokens of several sizes: twice as quick as with two
        model = reduce_tokens(make_vit(depth=2), at([0], fresh(FIXED[name])))
    else:
        model = reduced(name)
    path = export_onnx(model, tmp_path / "model.onnx")
    session = onnxruntime.InferenceSession(path, providers=["CPUExecutionProvider"])
    for size in BATCHES:
        images = torch.randn(size, 3, 48, 48)
        (logits,) = session.run(["logits"], {"images": images.numpy()})
        torch.testing.assert_close(torch.from_numpy(logits), model(images), rtol=0, atol=1e-4)
    reductions = {
        attribute.s.decode()
        for node in onnx.load(path).graph.node
        if node.op_type.startswith("Scatter")
        for attribute in node.attribute
        if attribute.name == "reduction"
    }
    assert reductions <= {"none", "add"}, "sums only: not every runtime has the largest or smallest of a group"


@pytest.mark.parametrize("kind", sampled(["distilled", "registers", "average_with_class", "map"], quick=[]))
@torch.no_grad()
def test_other_models_export(kind):
    model = reduce_tokens(make_vit(kind, depth=3), at([1, 2], ToMe(Ratio(0.8))))
    shapes = {"images": {0: torch.export.Dim("batch")}}
    program = torch.export.export(model, (torch.randn(4, 3, 48, 48),), dynamic_shapes=shapes)
    images = torch.randn(7, 3, 48, 48)
    torch.testing.assert_close(program.module()(images), model(images), rtol=0, atol=1e-5)


@pytest.mark.parametrize("reducer", [ATS(Ratio(0.6)), Stack(EViT(Ratio(0.7)), ATS(Ratio(0.7)))], ids=["ats", "stack"])
def test_adaptive_counts_are_refused_by_name(reducer, tmp_path):
    model = reduce_tokens(make_vit(), at(1, reducer))
    with pytest.raises(ReducerError, match="ats keeps a different number of tokens in each image"):
        torch.export.export(model, (torch.randn(2, 3, 48, 48),))
    with pytest.raises(ReducerError, match="ats keeps a different number of tokens in each image"):
        export_onnx(model, tmp_path / "model.onnx")
    assert not list(tmp_path.iterdir())


def test_a_model_in_training_mode_is_refused(tmp_path):
    model = reduce_tokens(make_vit().train(), at(1, TopK(Ratio(0.6))))
    with pytest.raises(ReducerError, match="training mode"):
        export_onnx(model, tmp_path / "model.onnx")


def test_a_missing_package_is_named_with_its_remedy(tmp_path, monkeypatch):
    monkeypatch.setitem(__import__("sys").modules, "onnxscript", None)
    model = reduce_tokens(make_vit(), at(1, build({"name": "identity"})))
    with pytest.raises(ReducerError, match="onnxscript.*sievit\\[export\\]"):
        export_onnx(model, tmp_path / "model.onnx")
