"""Reduced models of fixed token counts as ONNX files. Needs the packages of the extra ``export``."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from reducers.errors import ReducerError
from reducers.runtime.driver import ReducedViT, check_exportable

OPSET = 20
BITCAST_OPSET = 26  # the first that can read a float's bits, which random numbers are drawn from


def export_onnx(fast: ReducedViT, path: str | Path, *, image_size: int | tuple[int, int] | None = None) -> Path:
    """Write a reduced model as an ONNX file: ``images`` (batch, C, H, W) float32 in, ``logits`` (batch, classes) out.

    The batch is free, the image size is not: token counts are constants of the file. ``image_size`` is the model's own
    where none is given. Methods that draw random numbers need a runtime with opset 26, the others one with opset 20.

    Raises:
        ReducerError: an adaptive method, a model in training mode, or a missing package.
    """
    check_exportable(fast)
    if fast.training:
        raise ReducerError("the model is in training mode, and an ONNX file only predicts; call .eval() first")
    try:
        import onnx  # noqa: F401  # the exporter looks for it late, and its message would name no remedy
        import onnxscript  # noqa: F401
    except ImportError as error:
        raise ReducerError(
            f"exporting to ONNX needs the package {error.name}; install the extra: pip install 'sievit[export]'"
        ) from error
    size = image_size or fast.host.image_size
    height, width = (size, size) if isinstance(size, int) else size
    weight = next(fast.base.parameters())
    images = torch.zeros(2, fast.host.channels, height, width, dtype=weight.dtype, device=weight.device)
    with torch.no_grad():
        program = torch.export.export(fast, (images,), dynamic_shapes={"images": {0: torch.export.Dim("batch")}})
        exported = torch.onnx.export(
            program, input_names=["images"], output_names=["logits"], opset_version=OPSET, dynamo=True, verbose=False,
            custom_translation_table=_translations(),
        )  # fmt: skip
    assert exported is not None
    if any(node.op_type == "BitCast" for node in exported.model.graph):
        exported.model.opset_imports[""] = BITCAST_OPSET  # all other operators mean there what they meant before
    exported.save(path)
    return Path(path)


def _translations() -> dict[Callable[..., Any], Callable[..., Any]]:
    """What ONNX can say and the exporter does not know."""
    from onnxscript import opset20
    from onnxscript.values import Op, Opset

    op: Any = opset20

    def sort_stable(self: Any, stable: bool = True, dim: int = -1, descending: bool = False) -> Any:
        # of equal entries TopK puts the lower index first, in either direction: that is a stable sort
        places = op.Gather(op.Shape(self), op.Constant(value_ints=[dim]), axis=0)
        return op.TopK(self, places, axis=dim, largest=int(descending), sorted=1)

    def view_dtype(self: Any, dtype: int) -> Any:
        bits = Op(Opset("", BITCAST_OPSET), "BitCast")(self, to=dtype)
        bits.producer().version = None  # or the exporter would refuse to go on to OPSET with the other operators
        return bits

    return {torch.ops.aten.sort.stable: sort_stable, torch.ops.aten.view.dtype: view_dtype}
