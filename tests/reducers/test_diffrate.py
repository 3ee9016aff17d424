"""DiffRate: learned counts, pruning and merging by rank, and how gradients reach the counts."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F

from ablations.measure.finetune.objective import TrainingViT
from reducers import ATS, Merge, Ratio, ReducerError, Stack, TopK, at, every, reduce_tokens
from reducers.kit.ranked_merge import SoftMerge, merge_ranked, soft_merge
from reducers.kit.selection import rank_patches
from reducers.methods import DiffRate
from reducers.methods.diffrate import candidates, expected_count, kept_probability, learned_counts
from reducers.tokens import Layout

from .conftest import DEPTH, make_vit

COUNTS = [(30, 24), (24, 20), (18, 18), (12, 9)]


def set_counts(reducer: DiffRate, counts: list[tuple[int, int]]) -> None:
    """Logits that leave no doubt; needs candidates in steps of one."""
    with torch.no_grad():
        reducer.logits.fill_(-200)
        for block, pair in enumerate(counts):
            for kind, count in enumerate(pair):
                reducer.logits[block, kind, 36 - count] = 0


def joined(counts: list[tuple[int, int]] = COUNTS, kind: str = "class", **settings: object) -> tuple:
    reducer = DiffRate(step=1, **settings)
    model = reduce_tokens(make_vit(kind).double(), every(1, reducer, depth=DEPTH))
    set_counts(reducer, counts)
    return model, reducer


# --- counts -----------------------------------------------------------------------------------------------------------


def test_candidates_and_what_is_expected_of_them():
    counts = candidates(36, 4, torch.zeros(1))
    assert counts.tolist() == [36, 32, 28, 24, 20, 16, 12, 8, 4]
    logits = torch.randn(3, 9)
    p = logits.double().softmax(1)
    torch.testing.assert_close(expected_count(logits, counts), (p * counts).sum(1))
    for row in range(3):
        kept = kept_probability(logits[row], counts, 36)
        by_hand = [sum(float(p[row, k]) for k in range(9) if counts[k] > rank) for rank in range(36)]
        torch.testing.assert_close(kept, torch.tensor(by_hand, dtype=torch.float64))
        torch.testing.assert_close(kept.sum(), expected_count(logits[row], counts)), "ranks kept, on average"
        assert (kept.diff() <= 0).all()


def test_counts_round_up_and_never_grow():
    expected = torch.tensor([[30.2, 28.0 + 1e-9], [33.0, 20.5], [10.0, 25.0]], dtype=torch.float64, requires_grad=True)
    counts = learned_counts(expected, 36)
    assert counts.tolist() == [[31, 28], [28, 21], [10, 10]]
    (gradient,) = torch.autograd.grad(counts[:, 1].sum(), expected)
    assert gradient.tolist() == [[0, 1], [0, 1], [1, 0]], "it goes to the count that holds"


@torch.no_grad()
def test_counts_are_read_again_when_the_logits_change(images):
    model, reducer = joined()
    assert reducer.kept_counts() == COUNTS
    other = [(20, 16)] * 4
    set_counts(reducer, other)
    assert reducer.kept_counts() == [(20, 16), (16, 16), (16, 16), (16, 16)]
    twin = copy.deepcopy(model)
    (second,) = twin.members()
    assert isinstance(second, DiffRate)
    set_counts(second, COUNTS)
    assert second.kept_counts() == COUNTS and reducer.kept_counts()[0] == (20, 16)
    reducer.load_state_dict(second.state_dict())
    assert reducer.kept_counts() == COUNTS
    unread = DiffRate(step=1)
    reduce_tokens(make_vit(), every(1, unread, depth=DEPTH))
    set_counts(unread, COUNTS)
    assert copy.deepcopy(unread).kept_counts() == COUNTS, "nobody had asked before it was copied"
    assert torch.equal(model(images.double()), twin(images.double()))
    fresh = DiffRate()
    reduce_tokens(make_vit(), at([1, 3], fresh))
    assert fresh.kept_counts() == [(20, 20), (20, 20)], "logits of nought: the mean of the candidates"
    learned = fresh._learned().tolist()
    assert learned == [[20, 20], [20, 20]]


# --- merging ----------------------------------------------------------------------------------------------------------


def slow_merge(x: Tensor, size: Tensor, scores: Tensor, prefix: int, prune: int, merge: int) -> tuple[Tensor, Tensor]:
    """One image, token by token: x (L, D), size (L,) and scores (L,) with the prefix."""
    order = sorted(range(prefix, len(x)), key=lambda j: (-float(scores[j]), j))
    stay, join = order[:merge], order[merge:prune]
    members: dict[int, list[int]] = {j: [j] for j in stay}
    grown = {j: float(size[j]) for j in stay}
    for j in join:
        cosine = [float(F.cosine_similarity(x[j], x[i], dim=0)) for i in stay]
        best = max(range(len(stay)), key=lambda i: cosine[i])
        members[stay[best]].append(j)
        grown[stay[best]] += float(size[j]) * max(cosine[best], 0)
    kept = sorted(stay)
    new = [x[i] for i in range(prefix)] + [x[members[j]].mean(0) for j in kept]
    return torch.stack(new), torch.tensor([float(size[i]) for i in range(prefix)] + [grown[j] for j in kept])


@pytest.mark.parametrize(("prune", "merge"), [(9, 5), (12, 7), (6, 1)])
@pytest.mark.parametrize("prefix", [1, 3])
def test_merging_by_rank_equals_a_slow_reference(prune, merge, prefix):
    torch.manual_seed(0)
    lengths = torch.tensor([12 + prefix, 12 + prefix, 12 + prefix])
    for layout in (
        Layout.alike(3, 12 + prefix, prefix, lengths.device),
        Layout.ragged(lengths - torch.tensor([0, 4, 7]), torch.full((3,), prefix)),
    ):
        x, size = torch.randn(layout.rows, 5, dtype=torch.float64), 1 + torch.rand(layout.rows, dtype=torch.float64)
        scores = torch.rand(layout.rows)
        found = merge_ranked(layout, x, rank_patches(layout, scores), prune=prune, merge=merge)
        assert isinstance(found, Merge)
        for image, start in enumerate(layout.starts.tolist()):
            rows = slice(start, start + layout.counts[image])
            features, sizes = slow_merge(x[rows], size[rows], scores[rows], prefix, prune, merge)
            new = slice(*found.new.offsets[image : image + 2].tolist())
            torch.testing.assert_close(found.apply(x)[new], features)
            torch.testing.assert_close(found.total(size)[new], sizes.double())
        assert torch.equal(found.source[found.new.is_prefix], layout.is_prefix.nonzero().squeeze(1))


def test_the_soft_merge_has_the_values_of_the_hard_one():
    torch.manual_seed(1)
    layout = Layout.alike(2, 13, 1, torch.device("cpu"))
    x, size, scores = torch.randn(26, 5).double(), 1 + torch.rand(26).double(), torch.rand(26)
    order, rank = rank_patches(layout, scores), torch.arange(12)
    hard = merge_ranked(layout, x, order, prune=9, merge=5)
    soft = soft_merge(layout, x, order, (rank < 9).float(), (rank < 5).float(), merge=5)
    assert isinstance(soft, SoftMerge)
    stays = soft.weight == 1
    assert int(stays.sum()) == hard.new.rows
    torch.testing.assert_close(soft.apply(x)[stays], hard.apply(x))
    torch.testing.assert_close(soft.total(size)[stays], hard.total(size))
    assert torch.equal(soft.harden().rows, hard.source)
    torch.testing.assert_close(soft.apply(x)[~stays], x[~stays]), "what is hidden stays what it is"


@pytest.mark.parametrize(("prune", "merge"), [(5, 5), (12, 12), (12, 20)])
def test_where_nothing_merges_every_token_that_stays_is_itself(prune, merge):
    torch.manual_seed(2)
    layout = Layout.alike(2, 13, 1, torch.device("cpu"))
    x, size, scores = torch.randn(26, 5).double(), 1 + torch.rand(26).double(), torch.rand(26)
    order, rank = rank_patches(layout, scores), torch.arange(12)
    hard = merge_ranked(layout, x, order, prune=prune, merge=merge)
    stays = torch.zeros(26, dtype=torch.bool)
    for image in range(2):
        first = 13 * image
        stays[[first, *(first + 1 + order[image, :merge]).tolist()]] = True
    torch.testing.assert_close(hard.apply(x), x[stays])
    torch.testing.assert_close(hard.total(size), size[stays])
    if merge <= 12:
        soft = soft_merge(layout, x, order, (rank < prune).float(), (rank < merge).float(), merge=merge)
        torch.testing.assert_close(soft.apply(x), x)
        torch.testing.assert_close(soft.total(size), size)
        assert torch.equal(soft.weight == 1, stays)


# --- the method -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", ["class", "distilled", "registers", "qk_norm"])
@torch.no_grad()
def test_all_logits_on_the_largest_candidate_are_the_plain_model(kind, images):
    model, reducer = joined([(36, 36)] * 4, kind)
    logits, trace = model.trace(images.double())
    torch.testing.assert_close(logits, model.base(images.double()), rtol=0, atol=1e-10)
    assert (trace.reducer_macs == 0).all()
    wide = DiffRate()  # candidates in steps of four
    model = reduce_tokens(make_vit(kind).double(), every(1, wide, depth=DEPTH))
    wide.logits[:, :, 0] = 60
    torch.testing.assert_close(model(images.double()), model.base(images.double()), rtol=0, atol=1e-10)
    assert reducer.kept_counts() == wide.kept_counts()


@torch.no_grad()
def test_a_training_pass_of_counts_that_keep_all_is_the_plain_model(images):
    """Also in a block alone, between others that reduce."""
    model, _ = joined([(36, 36)] * 4)
    torch.testing.assert_close(model.train()(images.double()), model.base(images.double()), rtol=0, atol=1e-4)
    model, _ = joined([(36, 36), (36, 20), (20, 20), (12, 9)])
    gathered = model.eval()(images.double())
    torch.testing.assert_close(model.train()(images.double()), gathered, rtol=0, atol=1e-4)


@pytest.mark.parametrize("kind", ["class", "registers"])
@torch.no_grad()
def test_the_gathered_pass_is_the_masked_one(kind, images):
    model, _ = joined(kind=kind)
    images = images.double()
    logits, trace = model.trace(images)
    prefix = model.base.num_prefix_tokens
    assert (trace.tokens == torch.tensor([36, 24, 20, 18, 9]) + prefix).all()
    masked = model.train()(images)
    torch.testing.assert_close(masked, logits, rtol=0, atol=1e-4)
    assert not torch.allclose(masked, model.base(images), atol=1e-2)


def test_the_task_reaches_every_count_that_holds(images):
    model, reducer = joined()
    with torch.no_grad():  # doubt enough for a gradient
        wanted = torch.tensor([(31, 26), (23, 20), (17, 14), (11, 8)])
        reducer.logits.copy_(-(torch.arange(36, 0, -1) - wanted[..., None]).square() / 20)
        before = [36, *[merge for _, merge in reducer.kept_counts()]]
        assert all(first > p > m for first, (p, m) in zip(before, reducer.kept_counts(), strict=False))
    model.train()(images.double()).square().sum().backward()
    assert torch.isfinite(reducer.logits.grad).all()
    reached = reducer.logits.grad.abs().sum(2) > 0
    assert reached[:-1].all(), "of pruning and of merging, in each block"
    assert not reached[-1].any(), "after the last attention no patch matters to the class token"
    # one logit is one number for all counts of its block: adding to all of them changes nothing
    torch.testing.assert_close(reducer.logits.grad.sum(2), torch.zeros(4, 2, dtype=torch.float64), rtol=0, atol=1e-9)


def test_the_costs_loss_is_that_of_the_counts(images):
    model, reducer = joined(target=0.5)
    with torch.no_grad():
        _, trace = model.trace(images.double())
        dense = reduce_tokens(model.base, at([], TopK(Ratio(0.5)))).trace(images.double())[1]
    share = float(trace.reference_macs[0] / dense.macs[0])
    loss = reducer.losses(None, None, images, None)["cost"]
    assert float(loss.detach()) == pytest.approx(5 * (4.6 * (share - 0.5)) ** 2, rel=1e-5)
    exact = DiffRate(step=1, target=share)
    reduce_tokens(make_vit().double(), every(1, exact, depth=DEPTH))
    set_counts(exact, COUNTS)
    assert float(exact.losses(None, None, images, None)["cost"].detach()) == pytest.approx(0, abs=1e-9)


@pytest.mark.parametrize("target", [0.45, 0.8])
def test_the_cost_alone_leads_the_counts_to_the_target(target, images):
    reducer = DiffRate(target=target)
    model = TrainingViT(make_vit(), every(1, reducer, depth=DEPTH)).train()
    model.base.requires_grad_(False)
    optimizer = torch.optim.AdamW(reducer.parameters(), lr=0.05, weight_decay=0)
    for _ in range(150):
        optimizer.zero_grad()
        reducer.losses(None, None, images, None)["cost"].backward()
        optimizer.step()
    with torch.no_grad():
        _, trace = model.eval().trace(images)
        dense = reduce_tokens(model.base, at([], TopK(Ratio(0.5)))).trace(images)[1]
    assert float(trace.reference_macs[0] / dense.macs[0]) == pytest.approx(target, abs=0.03)
    assert (trace.tokens.diff(dim=1) <= 0).all()


@torch.no_grad()
def test_its_own_work_is_booked(images):
    model, reducer = joined([(36, 30), (30, 30), (25, 20), (20, 20)])
    _, trace = model.trace(images.double())
    cosines = 6 * 30 * 32 + 5 * 20 * 32
    queries = (32 * 32 + 37 * 32) + (32 * 32 + 31 * 32)
    torch.testing.assert_close(trace.reducer_macs, torch.full((5,), float(cosines + queries), dtype=torch.float64))
    assert reducer.kept_counts()[1] == (30, 30), "and a block that leaves all alone costs nothing"


@pytest.mark.slow
@torch.no_grad()
def test_a_learned_schedule_compiles_without_a_graph_break(images):
    model, _ = joined()
    model = model.float().eval()  # the counts are read when a mode is chosen or weights are loaded
    torch.compiler.reset()
    compiled = torch.compile(model, fullgraph=True, backend="aot_eager")
    torch.testing.assert_close(compiled(images), model(images), rtol=0, atol=1e-5)
    torch.compiler.reset()


def test_after_an_adaptive_method_it_runs_and_is_not_trained(images):
    reducer = DiffRate(step=1)
    model = reduce_tokens(make_vit().double(), at(0, ATS(Ratio(0.8))) | at([1, 2, 3], reducer))
    set_counts(reducer, [(24, 18), (16, 14), (10, 10)])
    images = images.double()
    with torch.no_grad():
        together, trace = model.trace(images)
        assert (trace.tokens[:, 2] == 1 + (trace.tokens[:, 1] - 1).clamp(max=18)).all()
        for i in range(len(images)):
            torch.testing.assert_close(model(images[i : i + 1])[0], together[i], rtol=0, atol=1e-9)
    with pytest.raises(ReducerError, match="train it without the adaptive method"):
        model.train()(images)
    assert Stack(TopK(Ratio(0.9)), DiffRate()).members[1].only_decides


def test_wrong_settings_are_refused():
    for setting in ({"target": 0.0}, {"step": 0}, {"weight": -5.0}):
        with pytest.raises(ReducerError, match="must be a"):
            DiffRate(**setting)
