"""Reduced models under ``torch.jit.trace`` and under fvcore, which traces in the same way."""

from __future__ import annotations

import pytest
import torch

from reducers import ATS, Count, Drop, Identity, Ratio, ReducerError, ToMe, TopK, at, build, every, reduce_tokens
from reducers.cost_fvcore import fvcore_macs
from tests.samples import shared_out

from .conftest import make_vit
from .test_contract import CASES, fresh, placed, unit

FIXED = [name for name, reducer in CASES.items() if not reducer.adaptive]
QUICK = ("evit", "gtp cosine", "random", "stack topk tome evit")
TRACED = [name if name in QUICK else pytest.param(name, marks=pytest.mark.slow) for name in FIXED]

pytestmark = [
    pytest.mark.filterwarnings("ignore::torch.jit.TracerWarning"),
    pytest.mark.filterwarnings("ignore:.torch.jit.trace:DeprecationWarning"),
]


@pytest.mark.parametrize("name", TRACED)
@torch.no_grad()
def test_a_traced_graph_gives_what_eager_gives_on_other_images_too(name):
    reducer = CASES[name]
    model = reduce_tokens(
        make_vit(depth=max(2, unit(reducer))), placed(reducer, at_blocks=[0, 1] if name in QUICK else 1)
    )
    seen, unseen = torch.randn(2, 2, 3, 48, 48)
    graph = torch.jit.trace(model, seen, check_trace=False)
    for images in (seen, unseen):
        torch.testing.assert_close(graph(images), model(images), rtol=0, atol=1e-5)


@pytest.mark.parametrize(
    "budget", [Ratio(0.6), Ratio(0.5, of="initial"), Ratio(0.6, count_prefix=True), Drop(7), Count(9)]
)
@torch.no_grad()
def test_every_kind_of_budget_can_be_traced_and_counted(budget):
    model = reduce_tokens(make_vit(depth=2), at([0, 1], TopK(budget)))
    seen, unseen = torch.randn(2, 1, 3, 48, 48)
    graph = torch.jit.trace(model, seen, check_trace=False)
    torch.testing.assert_close(graph(unseen), model(unseen), rtol=0, atol=1e-5)
    assert fvcore_macs(model, seen) == pytest.approx(float(model.cost(seen)), rel=0.01)


@pytest.mark.parametrize("gradients", [True, False])
def test_the_graph_is_the_same_with_gradients_and_without_them(gradients):
    """As torch checks by itself: it traces twice, the second time without gradients."""
    seen = torch.randn(1, 3, 96, 96)  # 144 patches: where products are faster than the fused kernel
    model = reduce_tokens(make_vit(img_size=96), at([1, 2], TopK(Ratio(0.6))))
    with torch.set_grad_enabled(gradients):
        graph = torch.jit.trace(model, seen)
        torch.testing.assert_close(graph(seen), model(seen), rtol=0, atol=1e-5)


@torch.no_grad()
def test_a_traced_graph_refuses_a_batch_of_another_size():
    graph = torch.jit.trace(reduce_tokens(make_vit(depth=1), at(0, TopK(Ratio(0.6)))), torch.randn(2, 3, 48, 48))
    with pytest.raises(RuntimeError, match="invalid for input of size"):
        graph(torch.randn(3, 3, 48, 48))


@pytest.mark.parametrize("name", shared_out([name for name, reducer in CASES.items() if reducer.adaptive], of=4))
@torch.no_grad()
def test_adaptive_methods_refuse_to_be_traced_by_name(name):
    model = reduce_tokens(make_vit(), at([1, 3], fresh(CASES[name])))
    adaptive = [member.name for member in model.members() if member.traits.adaptive]
    with pytest.raises(ReducerError, match=f"{adaptive[0]}.*keeps a different number of tokens"):
        torch.jit.trace(model, torch.randn(1, 3, 48, 48))


@pytest.mark.parametrize("reducer", [ATS(Count(9)), build({"name": "avit"})], ids=["ats", "avit"])
def test_fvcore_still_counts_one_image_of_an_adaptive_method(reducer):
    model, image = reduce_tokens(make_vit(), at([1, 2, 3], fresh(reducer))), torch.randn(1, 3, 48, 48)
    assert fvcore_macs(model, image) == pytest.approx(float(model.cost(image)), rel=0.01)


def test_a_count_that_fails_leaves_no_hook_behind():
    class Broken(Identity):
        name = "broken"

        def decide(self, signals, state):
            raise ArithmeticError("in the middle of a block")

    base, image = make_vit(), torch.randn(1, 3, 48, 48)
    own = base.blocks[0].mlp.fc1.register_forward_hook(lambda *_: None)
    with pytest.raises(ArithmeticError):
        fvcore_macs(reduce_tokens(base, at(1, Broken())), image)
    left = [list(module._forward_hooks) + list(module._forward_pre_hooks) for module in base.modules()]
    assert [hook for each in left for hook in each] == [own.id], "the user's own stays"
    assert fvcore_macs(reduce_tokens(base, every(1, ToMe(Drop(5)))), image) > 0
