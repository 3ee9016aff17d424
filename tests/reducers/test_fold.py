"""What is added to keys' logits, folded into the products: the same attention as by a mask, and more exact in half."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.nn import functional as F
from torch.overrides import TorchFunctionMode

from reducers import ATS, Drop, Ratio, ReducerError, ToMe, at, every, reduce_tokens
from reducers.runtime import kernels
from reducers.runtime.fold import folded_keys, folded_queries, folded_values, folded_width
from reducers.runtime.kernels import folded_attention, packed_attention
from reducers.tokens import Layout

from .conftest import make_vit
from .test_compile import on_pretended_gpu

HALF = torch.bfloat16
HEADS = 3


def ragged(counts: list[int]) -> Layout:
    """A layout that is not known to be uniform, even if it is."""
    return Layout.ragged(torch.tensor(counts), torch.ones(len(counts), dtype=torch.int64))


def uniform(images: int, tokens: int) -> Layout:
    return Layout.alike(images, tokens, 1, torch.device("cpu"))


LAYOUTS = {"uniform": uniform(3, 20), "ragged": ragged([20, 7, 33, 1])}


def parts(layout: Layout, width: int, dtype: torch.dtype, *, seed: int = 0) -> tuple[Tensor, ...]:
    """q, k, v (T, H, d) and the logarithms of whole sizes (T,), these in float32 at least."""
    random = torch.Generator().manual_seed(seed)
    q, k, v = (torch.randn(layout.rows, HEADS, width, generator=random, dtype=torch.float64) for _ in range(3))
    sizes = torch.randint(1, 197, (layout.rows,), generator=random).double()
    return q.to(dtype), k.to(dtype), v.to(dtype), sizes.log().to(torch.promote_types(dtype, torch.float32))


def by_mask(q: Tensor, k: Tensor, v: Tensor, bias: Tensor | None, layout: Layout, **more: Any) -> Tensor:
    scale = more.pop("scale", q.shape[-1] ** -0.5)
    return packed_attention(q, k, v, layout, layout, scale=scale, key_bias=bias)


def by_fold(q: Tensor, k: Tensor, v: Tensor, bias: Tensor, layout: Layout, **more: Any) -> Tensor:
    scale = more.pop("scale", q.shape[-1] ** -0.5)
    return folded_attention(q, k, v, layout, layout, scale=scale, key_bias=bias)


def test_a_head_grows_by_two_columns_to_a_multiple_of_eight():
    assert [folded_width(width) for width in (6, 30, 32, 62, 63, 64, 70, 72, 80)] == [8, 32, 40, 64, 72, 72, 72, 80, 88]
    q, k, v, bias = parts(LAYOUTS["uniform"], 64, torch.float32)
    assert folded_queries(q).shape == folded_keys(k, bias, 0.125).shape == folded_values(v).shape == (60, HEADS, 72)
    assert torch.equal(folded_queries(q)[..., 64:66], torch.ones(60, HEADS, 2))
    assert not folded_queries(q)[..., 66:].any() and not folded_values(v)[..., 64:].any()


@pytest.mark.parametrize("width", [32, 64, 72, 80])
@pytest.mark.parametrize("layout", LAYOUTS.values(), ids=LAYOUTS)
@pytest.mark.parametrize(("dtype", "atol"), [(torch.float64, 1e-12), (torch.float32, 1e-6)], ids=["double", "single"])
@torch.no_grad()
def test_the_fold_is_the_mask(dtype, atol, layout, width):
    asked = parts(layout, width, dtype)
    for scale in (width**-0.5, 0.1):
        found, expected = by_fold(*asked, layout, scale=scale), by_mask(*asked, layout, scale=scale)
        assert found.shape == expected.shape and found.dtype == dtype
        torch.testing.assert_close(found, expected, rtol=atol, atol=atol)


@pytest.mark.parametrize("layout", LAYOUTS.values(), ids=LAYOUTS)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=["bfloat16", "float16"])
@torch.no_grad()
def test_in_half_precision_the_fold_errs_less_than_the_mask(dtype, layout):
    """Both beside double precision on the same rounded queries, keys and values."""
    q, k, v, bias = parts(layout, 64, dtype)
    exact = by_mask(q.double(), k.double(), v.double(), bias.double(), layout)
    errors = [float((found(q, k, v, bias, layout).double() - exact).abs().mean()) for found in (by_fold, by_mask)]
    assert 0 < errors[0] < errors[1], errors
    logits = (folded_queries(q).double() * folded_keys(k, bias, 0.125).double()).sum(-1) * 0.125
    wanted = (q.double() * k.double()).sum(-1) * 0.125 + bias.double()[:, None]
    folded, masked = (logits - wanted).abs().max(), (bias.to(dtype).double() - bias.double()).abs().max()
    assert folded < masked / 100, (folded, masked)
    assert folded < (1e-4 if dtype == HALF else 2e-6)


@pytest.mark.parametrize("layout", LAYOUTS.values(), ids=LAYOUTS)
def test_gradients_are_those_of_the_mask(layout):
    found = []
    for run in (by_fold, by_mask):
        asked = [part.requires_grad_() for part in parts(layout, 64, torch.float64)]
        run(*asked, layout).square().sum().backward()
        found.append([part.grad for part in asked])
    for folded, masked in zip(*found, strict=True):
        torch.testing.assert_close(folded, masked, rtol=0, atol=1e-11)


def test_the_gradient_of_a_bias_is_that_of_finite_differences():
    layout = ragged([4, 3])
    q, k, v, bias = parts(layout, 8, torch.float64)
    assert torch.autograd.gradcheck(lambda b: by_fold(q, k, v, b, layout), bias.requires_grad_())


def test_a_bias_has_its_whole_gradient_through_the_parts_of_half_precision():
    """The second part is what the first left over: its own gradient takes nothing away."""
    layout = LAYOUTS["uniform"]
    q, k, v, bias = parts(layout, 64, HALF)
    q, k, v, exact = q.double(), k.double(), v.double(), bias.double().requires_grad_()
    by_mask(q, k, v, exact, layout).square().sum().backward()
    folded = bias.clone().requires_grad_()
    by_fold(q.to(HALF), k.to(HALF), v.to(HALF), folded, layout).float().square().sum().backward()
    assert exact.grad is not None and folded.grad is not None
    assert folded.grad.dtype == torch.float32
    assert F.cosine_similarity(folded.grad.double(), exact.grad, dim=0) > 0.999
    assert float(folded.grad.norm() / exact.grad.norm()) == pytest.approx(1, abs=0.02)


@torch.no_grad()
def test_images_of_one_length_are_the_same_ragged_and_uniform():
    asked = parts(uniform(3, 20), 64, torch.float64)
    alone = ragged([20, 20, 20])
    assert alone.uniform is None
    torch.testing.assert_close(by_fold(*asked, alone), by_fold(*asked, uniform(3, 20)), rtol=0, atol=1e-12)


@pytest.mark.parametrize("layout", LAYOUTS.values(), ids=LAYOUTS)
@torch.no_grad()
def test_sizes_that_are_all_one_add_nothing(layout):
    q, k, v, bias = parts(layout, 64, torch.float64)
    without = by_mask(q, k, v, None, layout)
    torch.testing.assert_close(by_fold(q, k, v, torch.zeros_like(bias), layout), without, rtol=0, atol=1e-12)
    half = [part.to(HALF) for part in (q, k, v)]
    keys = folded_keys(half[1], torch.zeros_like(bias), 0.125)
    assert torch.equal(keys[..., :64], half[1]) and not keys[..., 64:].any()


@torch.no_grad()
def test_keys_in_another_order_with_their_biases_are_the_same_keys():
    layout = uniform(1, 20)
    q, k, v, bias = parts(layout, 64, torch.float64)
    order = torch.randperm(20)
    found = by_fold(q, k[order], v[order], bias[order], layout)
    torch.testing.assert_close(found, by_fold(q, k, v, bias, layout), rtol=0, atol=1e-12)


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16, torch.float16], ids=["double", "bfloat16", "float16"])
@torch.no_grad()
def test_a_token_of_no_size_gets_no_attention(dtype):
    """Its bias is -inf; two finite columns say so, where infinity times one and less infinity would be NaN."""
    layout = uniform(2, 20)
    q, k, v, bias = parts(layout, 64, dtype)
    gone = torch.zeros(40, dtype=torch.bool).index_fill_(0, torch.tensor([3, 25]), True)
    found = by_fold(q, k, v, bias.masked_fill(gone, -torch.inf), layout)
    v = v.masked_fill(gone[:, None, None], 7.0)
    assert torch.equal(by_fold(q, k, v, bias.masked_fill(gone, -torch.inf), layout), found)
    assert torch.isfinite(found).all()


@torch.no_grad()
def test_a_kernel_that_takes_no_scale_is_given_scaled_queries():
    """As of the oldest torch: the kernel's own scale is the root of the width, which is now 72, not 64."""
    layout, width = uniform(2, 20), 64
    q, k, v, bias = parts(layout, width, torch.float64)
    natural, scale = folded_width(width) ** -0.5, 0.2
    queries, keys = folded_queries(q * (scale / natural)), folded_keys(k, bias, natural)
    found = by_mask(queries, keys, folded_values(v), None, layout, scale=natural)[..., :width]
    torch.testing.assert_close(found, by_mask(q, k, v, bias, layout, scale=scale), rtol=0, atol=1e-12)


# --- where it is used -------------------------------------------------------------------------------------------------


class Kernels(TorchFunctionMode):
    """Writes down which attention is asked for, its width, and what is added to its logits."""

    def __init__(self) -> None:
        super().__init__()
        self.seen: list[tuple[str, int, bool, float | None]] = []

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if func is F.scaled_dot_product_attention:
            masked = kwargs.get("attn_mask") is not None
            self.seen.append(("uniform", args[0].shape[-1], masked, kwargs.get("scale")))
        return func(*args, **kwargs)


def pretended(model: Any, dtype: torch.dtype) -> list[tuple[str, int, bool, float | None]]:
    """The kernels that a model asks a GPU for, on tensors that say they lie on one."""
    model = model.to(dtype)
    with FakeTensorMode(), torch.no_grad(), Kernels() as kernels_asked:
        driven = on_pretended_gpu(model)
        driven(torch.empty(2, 3, 48, 48, device="cuda", dtype=dtype))
    return kernels_asked.seen


def tome(attention: str = "mask", *, proportional: bool = True) -> Any:
    place = every(1, ToMe(Drop(3), proportional=proportional), depth=4)
    return reduce_tokens(make_vit(embed_dim=64, num_heads=1, depth=4), place, attention=attention)  # type: ignore[arg-type]


@pytest.mark.parametrize("dtype", [HALF, pytest.param(torch.float16, marks=pytest.mark.slow)], ids=["bfloat16", "half"])
def test_on_a_gpu_in_half_precision_the_fold_leaves_no_mask(dtype):
    scale = 64**-0.5
    plain = ("uniform", 64, False, scale)
    assert pretended(tome("fold"), dtype) == [plain, *[("uniform", 72, False, scale)] * 3]
    assert pretended(tome("mask"), dtype) == [plain, *[("uniform", 64, True, scale)] * 3]
    assert pretended(tome("fold", proportional=False), dtype) == [plain] * 4, "nothing was merged by size"


@pytest.mark.slow
def test_in_single_precision_sizes_stay_a_mask():
    assert pretended(tome("fold"), torch.float32) == pretended(tome("mask"), torch.float32)


def test_images_of_different_lengths_go_to_the_kernel_of_packed_rows(monkeypatch):
    """No padding, no mask, and nothing is read from the device."""
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device=None: (9, 0))
    asked: list[tuple[Any, ...]] = []

    def kernel(q: Tensor, k: Tensor, v: Tensor, *lengths: Any, scale: float | None = None) -> Tensor:
        asked.append((tuple(q.shape), tuple(k.shape), tuple(v.shape), lengths[2:], scale))
        assert all(part.is_contiguous() for part in (q, k, v)) and lengths[0].dtype == torch.int32
        return torch.empty_like(q)

    monkeypatch.setattr(kernels, "varlen_attn", kernel)
    with FakeTensorMode():
        lengths = torch.empty(2, dtype=torch.int64, device="cuda")
        layout = Layout(lengths, lengths, 12, None, ([5, 7], [1, 1]))
        q, k, v = (torch.empty(12, HEADS, 64, dtype=HALF, device="cuda") for _ in range(3))
        bias = torch.empty(12, device="cuda")
        for takes in (True, False):
            monkeypatch.setattr(kernels, "_VARLEN_TAKES_A_SCALE", takes)
            out = packed_attention(q, k, v, layout, layout, scale=0.125, key_bias=bias, fold=True)
            assert out.shape == (12, HEADS, 64)
        with Kernels() as padded:
            packed_attention(q, k, v, layout, layout, scale=0.125, key_bias=bias)
    wide = (12, HEADS, 72)
    assert asked == [(wide, wide, wide, (7, 7), scale) for scale in (0.125, None)]
    assert padded.seen == [("uniform", 64, True, 0.125)], "otherwise they are padded, and padding is masked"


@torch.no_grad()
def test_on_a_cpu_both_are_the_same_to_the_last_bit_and_cost_the_same(images):
    place = at([1, 2], ToMe(Drop(5)))
    masked, folded = reduce_tokens(make_vit(), place), reduce_tokens(make_vit(), place, attention="fold")
    assert (masked.attention, folded.attention) == ("mask", "fold")
    for dtype in (torch.float32, HALF):
        logits, trace = masked.to(dtype).trace(images.to(dtype))
        again, same = folded.to(dtype).trace(images.to(dtype))
        assert torch.equal(logits, again) and torch.equal(trace.macs, same.macs)


@pytest.mark.parametrize("ragged", [False, True], ids=["uniform", "ragged"])
def test_a_whole_model_is_the_same_by_either_and_costs_the_same(ragged, images, monkeypatch):
    """As a GPU would fold, here: logits, costs and gradients of every weight."""
    folds, fold = [], kernels.folded_attention

    def seen(*arguments, **options):
        folds.append(attention)
        return fold(*arguments, **options)

    monkeypatch.setattr(kernels, "_fold_takes", lambda *asked: True)
    monkeypatch.setattr(kernels, "folded_attention", seen)
    merging = every(1, ToMe(Drop(3)), depth=4)
    place = at(0, ATS(Ratio(0.6))) | at([1, 2], ToMe(Drop(3))) if ragged else merging
    found = []
    for attention in ("mask", "fold"):
        base = make_vit().double()
        model = reduce_tokens(base, place, attention=attention)  # type: ignore[arg-type]
        logits, trace = model.trace(images.double())
        logits.square().sum().backward()
        found.append([logits, trace.macs, *(parameter.grad for parameter in base.parameters())])
        assert (len(trace.tokens[:, 1].unique()) > 1) == ragged
    (logits, macs, *gradients), (again, same, *others) = found
    assert torch.equal(macs, same)
    assert set(folds) == {"fold"}, "the second one folds; on some processors their bits are the same all the same"
    for one, other in zip((logits, *gradients), (again, *others), strict=True):
        torch.testing.assert_close(one, other, rtol=1e-9, atol=1e-11)


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore:Dynamo detected a call to a `functools.lru_cache`:UserWarning")
@torch.no_grad()
def test_a_model_with_folded_sizes_compiles_into_one_graph(images, monkeypatch):
    monkeypatch.setattr(kernels, "_fold_takes", lambda *asked: True)
    model = reduce_tokens(make_vit(depth=3), every(1, ToMe(Drop(3)), depth=3), attention="fold")
    torch.compiler.reset()
    compiled = torch.compile(model, fullgraph=True, backend="aot_eager")
    torch.testing.assert_close(compiled(images), model(images), rtol=0, atol=1e-5)


def test_another_word_is_refused_with_those_there_are():
    with pytest.raises(ReducerError, match="choose one of mask, fold"):
        reduce_tokens(make_vit(), at(1, ToMe(Drop(2))), attention="flash")  # type: ignore[arg-type]
