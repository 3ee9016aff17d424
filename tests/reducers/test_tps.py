"""dTPS and eTPS against slow references written from the specification."""

from __future__ import annotations

import math

import pytest
import torch
from torch.nn import functional as F

from ablations.measure.finetune.objective import TrainingViT
from reducers import ATS, Count, Ratio, at, build, reduce_tokens
from reducers.kit import keep_predictor
from reducers.maps import Keep, Merge, keep_rows
from reducers.methods import DTPS, ETPS
from reducers.methods.tps import affinity, left_out, nearest_host, squeeze, squeeze_masked
from reducers.tokens import Layout

from .conftest import make_vit
from .test_dynamicvit import STAGES, slow_predictor, trained_model
from .test_evit_tome_topk import attention_parts, embed, feed_forward


def slow_squeeze(x, stay, gone):
    """Rows ``stay`` of x (N, D), each with what it takes in of the rows ``gone``."""
    taken = {i: [] for i in stay}
    for j in gone:
        cosines = [(float(F.cosine_similarity(x[j], x[i], dim=0)), -i) for i in stay]
        taken[-max(cosines)[1]].append(j)
    rows = []
    for i in stay:
        shares = [math.exp(float(F.cosine_similarity(x[j], x[i], dim=0))) for j in taken[i]]
        total = math.e * x[i] + sum(s * x[j] for s, j in zip(shares, taken[i], strict=True))
        rows.append(total / (math.e + sum(shares)))
    return torch.stack(rows)


def some_keep(lengths, share=0.5, width=7, seed=0):
    """Random features, and a random selection of the patches behind one prefix token an image."""
    generator = torch.Generator().manual_seed(seed)
    lengths = torch.tensor(lengths)
    if len(set(lengths.tolist())) == 1:
        layout = Layout.alike(len(lengths), int(lengths[0]), 1, torch.device("cpu"))
    else:
        layout = Layout.ragged(lengths, torch.ones_like(lengths))
    x = torch.randn(layout.rows, width, generator=generator, dtype=torch.float64)
    chosen = torch.rand(layout.rows, generator=generator) < share
    chosen[layout.row_index == 1] = True  # at least one patch stays
    return keep_rows(layout, chosen | layout.is_prefix), x


def alike(kept: Keep) -> Keep:
    """The same selection with the same number in each image, as a reducer of fixed count makes it."""
    old = kept.old
    count = int(kept.new.lengths.min())
    rows = torch.cat([kept.rows[kept.new.row_image == image][:count] for image in range(old.images)])
    return Keep(old, Layout.alike(old.images, count, 1, rows.device), rows)


@pytest.mark.parametrize("lengths", [(9, 9, 9), (12, 3, 7, 2), (5,)])
def test_squeezing_is_the_slow_reference(lengths):
    kept, x = some_keep(lengths)
    selections = [kept] if kept.old.uniform is None else [kept, alike(kept)]
    for selection in selections:
        merge = squeeze(selection, x)
        assert isinstance(merge, (Merge, Keep))
        found = merge.apply(x)
        for image in range(len(lengths)):
            own = x[selection.old.row_image == image]
            places = selection.old.row_index[selection.rows[selection.new.row_image == image]].tolist()
            gone = [place for place in range(len(own)) if place not in places]
            expected = torch.cat([own[:1], slow_squeeze(own, places[1:], gone)])
            torch.testing.assert_close(found[selection.new.row_image == image], expected)
        rows = merge.matrix().sum(2)
        torch.testing.assert_close(rows[merge.new.valid], torch.ones(merge.new.rows, dtype=rows.dtype))
        assert torch.equal(merge.source, selection.rows), "hosts live on"
        total = merge.new.sum_rows(merge.total(torch.ones(len(x))))
        assert total.tolist() == list(lengths), "nobody is lost"


@pytest.mark.parametrize("lengths", [(9, 9, 9), (12, 3, 7)])
def test_what_is_left_out_is_the_complement(lengths):
    kept, x = some_keep(lengths)
    for selection in [kept] if kept.old.uniform is None else [kept, alike(kept)]:
        rest = left_out(selection)
        assert sorted([*selection.rows.tolist(), *rest.rows.tolist()]) == list(range(len(x)))
        assert torch.equal(rest.new.row_image, rest.old.row_image[rest.rows])
        assert rest.new.lengths.tolist() == (selection.old.lengths - selection.new.lengths).tolist()
        assert rest.new.pad(rest.apply(x)).shape == (len(lengths), int(rest.new.lengths.max()), 7)


def test_a_guest_equal_to_its_host_changes_nothing_and_none_leaves_all():
    layout = Layout.alike(1, 4, 1, torch.device("cpu"))
    x = torch.randn(4, 5, dtype=torch.float64)
    x[3] = x[1]
    merge = squeeze(Keep(layout, Layout.alike(1, 3, 1, x.device), torch.tensor([0, 1, 2])), x)
    torch.testing.assert_close(merge.apply(x), x[:3])
    assert merge.group[3] == 1
    last = squeeze(Keep(layout, Layout.alike(1, 3, 1, x.device), torch.tensor([0, 2, 3])), x)
    assert last.group.tolist() == [0, 2, 1, 2]
    assert last.source.tolist() == [0, 2, 3], "the host lives on, though its guest weighs as much and comes first"
    whole = Keep(layout, layout, torch.arange(4))
    assert squeeze(whole, x) is whole


def test_ties_go_to_the_first_host_and_no_host_is_no_error():
    x = torch.ones(1, 3, 2)
    assert nearest_host(x, x, torch.tensor([[False, True, True]])).tolist() == [[1, 1, 1]]
    assert nearest_host(x, x[:, :0], torch.ones(1, 0, dtype=torch.bool)).tolist() == [[0, 0, 0]]
    torch.testing.assert_close(affinity(x[0], x[0]), torch.full((3,), math.e))


@pytest.mark.parametrize("lengths", [(9, 9, 9), (12, 3, 7)])
def test_the_masked_squeezing_with_a_fixed_decision_is_the_gathered_one(lengths):
    kept, x = some_keep(lengths, share=0.8)
    layout = kept.old
    before = (kept.destination >= 0).double()
    later = keep_rows(kept.new, torch.arange(kept.new.rows) % 3 != 2)  # of those, some more leave
    later = keep_rows(kept.new, (later.destination >= 0) | (kept.new.row_index <= 1))
    alive = (kept.then(later).destination >= 0).double()
    squeezed = squeeze_masked(layout, x, before, alive).features
    torch.testing.assert_close(squeezed[alive > 0], squeeze(later, kept.apply(x)).apply(kept.apply(x)))
    assert torch.equal(squeezed[alive == 0], x[alive == 0])


def test_the_masked_squeezing_lets_the_gradient_reach_the_decision():
    kept, x = some_keep((9, 9))
    alive = (kept.destination >= 0).double().requires_grad_()
    x.requires_grad_()
    squeeze_masked(kept.old, x, torch.ones_like(alive), alive).features.square().sum().backward()
    dropped = kept.destination < 0
    assert (alive.grad[dropped] != 0).all()
    assert (alive.grad[~dropped] == 0).all()
    assert torch.isfinite(x.grad).all()
    nobody = torch.zeros_like(alive)
    assert torch.equal(squeeze_masked(kept.old, x, torch.ones_like(alive), nobody).features, x)


def slow_tps(model, images, choose, *, before_block):
    """One image at a time. choose(block index, x or class attention) -> places of the patches that stay."""
    logits = []
    for image in images:
        x = embed(model, image[None])
        prefix = model.num_prefix_tokens
        for index, block in enumerate(model.blocks):
            weights, _, y = attention_parts(block, x)
            seen = x[0, prefix:] if before_block else weights[0, :, 0, prefix:].mean(0)
            chosen = choose(index, seen)
            if chosen is not None and len(chosen) < len(seen):
                into = (x if before_block else y)[0]
                gone = [j for j in range(len(seen)) if j not in chosen]
                rows = torch.cat([into[:prefix], slow_squeeze(into[prefix:], chosen, gone)])[None]
                y = attention_parts(block, rows)[2] if before_block else rows
            x = feed_forward(block, y)
        logits.append(model.forward_head(model.norm(x)))
    return torch.cat(logits)


@pytest.mark.parametrize("kind", ["class", "registers"])
@torch.no_grad()
def test_dtps_is_the_slow_reference(kind, images):
    reducer = DTPS(Ratio(0.6))
    model = trained_model(reducer, kind=kind).eval()

    def choose(index, x):
        if index not in STAGES:
            return None
        scores = slow_predictor(reducer.predictors[str(index)], x).tolist()
        count = math.floor(36 * 0.6 ** (STAGES.index(index) + 1) + 1e-9)
        return sorted(sorted(range(len(scores)), key=lambda j: -scores[j])[:count])

    expected = slow_tps(model.base, images.double(), choose, before_block=True)
    torch.testing.assert_close(model(images.double()), expected, rtol=0, atol=1e-9)


@pytest.mark.parametrize("kind", ["class", "registers"])
@torch.no_grad()
def test_etps_is_the_slow_reference(kind, images):
    model = reduce_tokens(make_vit(kind).double(), at([1, 2], ETPS(Ratio(0.6))))

    def choose(index, attention):
        if index not in (1, 2):
            return None
        scores = attention.tolist()
        return sorted(sorted(range(len(scores)), key=lambda j: -scores[j])[: math.ceil(0.6 * len(scores) - 1e-9)])

    expected = slow_tps(model.base, images.double(), choose, before_block=False)
    logits, trace = model.trace(images.double())
    torch.testing.assert_close(logits, expected, rtol=0, atol=1e-9)
    prefix = model.base.num_prefix_tokens
    assert (trace.tokens - prefix).tolist() == [[36, 36, 22, 14, 14]] * len(images)


def test_training_differs_from_dynamicvit_by_the_squeezing_alone(images, monkeypatch):
    """Nobody dropped: the plain model. Everybody dropped: no host, and all stays finite."""
    model = trained_model(DTPS(Ratio(0.6)))
    for row, atol in (((1.0, 0.0), 1e-5), ((0.0, 1.0), None)):
        fixed = torch.tensor(row, dtype=torch.float64)
        monkeypatch.setattr(
            keep_predictor.F, "gumbel_softmax", lambda chances, *, fixed=fixed, **_: fixed + chances - chances.detach()
        )
        model.zero_grad(set_to_none=True)
        logits = model(images.double())
        logits.sum().backward()
        assert all(torch.isfinite(p.grad).all() for p in model.parameters() if p.grad is not None)
        if atol is not None:
            torch.testing.assert_close(logits, model.base(images.double()), rtol=0, atol=atol)


def test_gradients_of_etps_reach_what_it_squeezes(images):
    model = TrainingViT(make_vit(), at([1, 2], ETPS(Ratio(0.5)))).train()
    images = images.requires_grad_()
    model(images).square().sum().backward()
    squares = images.grad.abs().sum(1).view(5, 6, 8, 6, 8).sum((2, 4))
    assert (squares[:4] > 0).all(), "no patch is lost"


@torch.no_grad()
def test_sizes_add_up_and_ragged_images_are_squeezed_too(images):
    for reducer in (DTPS(Ratio(0.5)), ETPS(Count(9))):
        model = reduce_tokens(make_vit().double(), at(0, ATS(Ratio(0.7))) | at([1, 2], reducer))
        together, trace = model.trace(images.double())
        kept, owner = trace.kept(2), trace.owner(2)
        assert ((owner >= 0).sum(1) >= kept.sum(1)).all()
        assert torch.equal(owner >= 0, trace.owner(0) >= 0), "squeezed is not dropped"
        for i in range(len(images)):
            torch.testing.assert_close(model(images[i : i + 1].double())[0], together[i], rtol=0, atol=1e-9)


def test_settings_travel():
    for spec in (
        {"name": "tps", "budget": {"ratio": 0.7}, "distill_weight": 1.0},
        {"name": "etps", "budget": {"count": 20}, "score": "attention_received"},
    ):
        assert build(spec).spec() == spec
    assert not build({"name": "etps", "budget": {"count": 20}, "score": "attention_received"}).needs_class_token
