"""Reduced models under ``torch.compile``, and what they ask of the device: nothing, where counts are fixed."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode

from benchmarks.profiling import Launches, Marked, wrapped
from reducers import ATS, Count, Ratio, Stack, TopK, at, build, reduce_tokens
from tests.samples import sampled

from .conftest import make_vit
from .test_contract import CASES, fresh, model_for, placed

FIXED = {name: reducer for name, reducer in CASES.items() if not reducer.adaptive}
FIXED["atc"] = build({"name": "atc", "budget": {"drop": 3}})  # a compiler writes its merges out, one after the other
QUICK = ("topk", "evit", "tome", "random", "stack topk tome evit")
# what a method does to the images or to a whole block, beside deciding, is not promised to compile
METHODS = [name for name, reducer in FIXED.items() if reducer.only_decides and " " not in name]
VARIANTS = [name for name, reducer in FIXED.items() if reducer.only_decides and name not in (*METHODS, *QUICK)]
VARIANTS = [name for name in VARIANTS if not name.startswith("atc ")]
SAMPLE = (QUICK[-1],)  # a selection, a merge and a fused token in one block; a compiler takes seconds for a block


COMPILED = [*METHODS, QUICK[-1], *VARIANTS]
ADAPTIVE = {name: reducer for name, reducer in CASES.items() if reducer.adaptive}

# tables computed once from plain numbers: the compiler computes them again, to the same result
pytestmark = pytest.mark.filterwarnings("ignore:Dynamo detected a call to a `functools.lru_cache`:UserWarning")


@pytest.fixture(autouse=True)
def fresh_compiler():
    torch.compiler.reset()
    yield
    torch.compiler.reset()


def reduced(name: str, blocks: tuple[int, ...] | None = None):
    """Reduced in two blocks where that compiles quickly: the second works on what the first has left."""
    return reduce_tokens(make_vit(depth=2), at(blocks or ([0, 1] if name in QUICK else [1]), fresh(FIXED[name])))


@pytest.mark.parametrize(
    ("name", "blocks"),
    [*((name, (0,)) for name in SAMPLE), *(pytest.param(name, None, marks=pytest.mark.slow) for name in COMPILED)],
)
@torch.no_grad()
def test_fixed_counts_compile_without_a_graph_break(name, blocks, images):
    model = reduced(name, blocks)
    compiled = torch.compile(model, fullgraph=True, backend="aot_eager")
    torch.testing.assert_close(compiled(images), model(images), rtol=0, atol=1e-5)
    torch.testing.assert_close(compiled(images.flip(0)), model(images.flip(0)), rtol=0, atol=1e-5)


@pytest.mark.parametrize("name", sampled(["topk", "evit", "tome", "random"], quick=[]))
@torch.no_grad()
def test_compiled_in_half_precision(name, images):
    model, images = reduced(name).bfloat16(), images.bfloat16()
    compiled = torch.compile(model, fullgraph=True, backend="aot_eager")
    torch.testing.assert_close(compiled(images), model(images), rtol=0.02, atol=0.06)


@pytest.mark.slow
@torch.no_grad()
def test_the_compiled_batch_may_be_of_any_size():
    model = reduced("stack topk tome evit")
    torch._dynamo.utils.counters.clear()
    compiled = torch.compile(model, fullgraph=True, backend="eager", dynamic=True)
    for size in (5, 2, 9, 16):
        batch = torch.randn(size, 3, 48, 48)
        torch.testing.assert_close(compiled(batch), model(batch), rtol=0, atol=1e-5)
    assert torch._dynamo.utils.counters["stats"]["unique_graphs"] == 1


@pytest.mark.parametrize("name", sampled(["topk", "evit", "tome"], quick=[]))
def test_compiled_gradients_are_those_of_eager(name, images):
    gradients = []
    for wrap in (lambda model: model, lambda model: torch.compile(model, fullgraph=True, backend="aot_eager")):
        model = reduced(name).train()
        wrap(model)(images).square().sum().backward()
        gradients.append([parameter.grad for parameter in model.base.parameters()])
    for eager, compiled in zip(*gradients, strict=True):
        torch.testing.assert_close(compiled, eager, rtol=1e-4, atol=1e-5)


@pytest.mark.slow
@torch.no_grad()
def test_generated_code_agrees(images):
    """Through the whole compiler once; it needs a C++ compiler, which not every machine has."""
    from torch._inductor.cpp_builder import get_cpp_compiler
    from torch._inductor.exc import InvalidCxxCompiler

    try:
        get_cpp_compiler()
    except InvalidCxxCompiler:
        pytest.skip("no C++ compiler here")
    model = reduced("stack topk tome evit")
    torch.testing.assert_close(torch.compile(model, fullgraph=True)(images), model(images), rtol=0, atol=1e-4)


def on_pretended_gpu(model: nn.Module) -> nn.Module:
    """The model with tensors that say they lie on a GPU and hold nothing: whoever reads one to the host is caught."""
    for module in model.modules():
        for held, make in ((module._parameters, nn.Parameter), (module._buffers, lambda empty: empty)):
            for name, value in list(held.items()):
                if value is not None:
                    held[name] = make(torch.empty(value.shape, dtype=value.dtype, device="cuda"))
    return model


class RefuseCopies(TorchDispatchMode):
    """Refuses copies between the host and the device; tables of constants may be written to it."""

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        if func is torch.ops.aten._to_copy.default and args[0].device != out.device:
            assert args[0].dim() == 1 and out.is_cuda, f"a copy of {args[0]} to {out.device}"
        return out


@pytest.mark.parametrize("name", sampled(FIXED, quick=["dpc_knn", QUICK[-1]]))
@torch.no_grad()
def test_fixed_counts_never_wait_for_the_device(name):
    """A tensor of FakeTensorMode has no values: item(), tolist(), nonzero() or a bool index would raise."""
    model = reduce_tokens(model_for(FIXED[name]), placed(FIXED[name]))
    with FakeTensorMode(), RefuseCopies():
        out = on_pretended_gpu(model)(torch.empty(4, 3, 48, 48, device="cuda"))
    assert out.shape == (4, 7)
    assert out.device.type == "cuda"


@pytest.mark.parametrize("name", sampled(FIXED, quick=["tome"]))
def test_nor_do_they_in_half_precision_with_folded_sizes_and_gradients(name):
    """What is kept for the backward pass is kept without a wait, too."""
    reducer = FIXED[name]
    model = reduce_tokens(model_for(reducer), placed(reducer), attention="fold").bfloat16()
    with FakeTensorMode(), RefuseCopies():
        driven = on_pretended_gpu(model)
        images = torch.empty(4, 3, 48, 48, device="cuda", dtype=torch.bfloat16)
        logits = driven(images)
    assert logits.requires_grad and logits.dtype == torch.bfloat16 and logits.is_cuda


LAUNCHES = {"topk": 16, "evit": 28, "tome": 30, "ats": 22}
"""The most operations that one decision may launch, the scores it asks for included, the block's own layers not."""


@pytest.mark.parametrize("name", LAUNCHES)
@torch.inference_mode()
def test_a_decision_takes_few_launches(name, images):
    """Of two images, in one block. A GPU waits some microseconds for each of them, whatever it computes."""
    model = reduce_tokens(make_vit(), wrapped(at(1, fresh(CASES[name])), Marked)).eval()
    model(images)
    with Launches() as counted:
        model(images)
    assert 0 < counted.count["deciding"] <= LAUNCHES[name], dict(counted.ops)


class CountReads(TorchDispatchMode):
    """Counts what would make the host wait, were the tensors on a GPU."""

    WAITING = ("_local_scalar_dense", "nonzero", "is_nonzero", "masked_select", "unique_dim", "_unique2", "equal")

    def __init__(self) -> None:
        super().__init__()
        self.reads: list[str] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        name = func.overloadpacket.__name__
        by_mask = name in ("index", "index_put", "index_put_") and any(
            index is not None and index.dtype == torch.bool for index in args[1]
        )
        if name in self.WAITING or by_mask or (name == "repeat_interleave" and not (kwargs or {}).get("output_size")):
            self.reads.append(name)
        return func(*args, **(kwargs or {}))


@pytest.mark.parametrize("name", ADAPTIVE)
@torch.no_grad()
def test_an_adaptive_stage_waits_for_the_device_once(name, images, monkeypatch):
    """One read for each decision whose counts differ from image to image: of the counts it leaves."""
    read, model = Tensor.tolist, reduce_tokens(make_vit(), at([1, 3], fresh(ADAPTIVE[name])))
    with CountReads() as mode:
        monkeypatch.setattr(Tensor, "tolist", lambda self: mode.reads.append("tolist") or read(self))
        model(images)
    reducer = ADAPTIVE[name]
    decisions = (
        len(reducer.members) if isinstance(reducer, Stack) else 1 + (getattr(reducer, "select", None) is not None)
    )
    assert 0 < len(mode.reads) <= 2 * decisions, mode.reads


@pytest.mark.slow
@torch.no_grad()
def test_adaptive_counts_compile_in_pieces_and_settle():
    """Every stage breaks the graph where its counts are read; the pieces take any counts, so compiling ends."""
    model = reduce_tokens(make_vit(depth=2), at(0, ATS(Ratio(0.6))))
    compiled = torch.compile(model, backend="eager")
    graphs = []
    for _ in range(8):
        batch = torch.randn(3, 3, 48, 48)
        torch.testing.assert_close(compiled(batch), model(batch), rtol=0, atol=1e-5)
        graphs.append(torch._dynamo.utils.counters["stats"]["unique_graphs"])
    assert graphs[-1] == graphs[3], f"still compiling: {graphs}"
    torch.compiler.reset()
    with pytest.raises(Exception, match="[Dd]ata.dependent|torch.compiler.disable"):
        torch.compile(model, fullgraph=True, backend="eager")(batch)


@pytest.mark.slow
@torch.no_grad()
def test_compiled_identity_is_the_plain_model(images):
    plain = make_vit(depth=2)
    compiled = torch.compile(reduce_tokens(plain, at([0, 1], TopK(Count(36)))), fullgraph=True, backend="aot_eager")
    torch.testing.assert_close(compiled(images), plain(images), rtol=0, atol=1e-5)
