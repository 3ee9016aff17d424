"""PatchMerger, Sinkhorn, SiT, TokenLearner and DPC-KNN's learned weights against slow references."""

from __future__ import annotations

import math
from types import SimpleNamespace

import pytest
import torch
from torch import nn
from torch.nn import functional as F

from ablations.measure.finetune.schedule import make_optimizer
from ablations.trial.recipe import parse_recipe
from reducers import ATS, Count, Mix, Ratio, ReducerError, ToMe, TopK, at, reduce_tokens
from reducers.budget import Drop
from reducers.kit.clustering import merge_labels
from reducers.kit.learned_pooling import LearnedPooling, pooled_features, pooled_map
from reducers.methods import DPCKNN, PatchMerger, Sinkhorn, SiT, TokenLearner
from reducers.methods.dpc_knn import learned_weights
from reducers.methods.patch_merger import Merger
from reducers.methods.sinkhorn import Prototypes, transport_plan
from reducers.methods.sit import Slimming
from reducers.methods.token_learner import ByConvolution, ByMLP
from reducers.tokens import Counts, Layout

from .conftest import DEPTH, make_vit

POOLINGS = [PatchMerger, Sinkhorn, SiT, TokenLearner]
poolings = pytest.mark.parametrize("method", POOLINGS, ids=lambda m: m.name)
GRID = (6, 6)


def tokens(*lengths: int, width: int = 8, seed: int = 0) -> tuple[torch.Tensor, torch.Tensor]:
    """Random patches (B, N, D), padded with values that must not matter, and valid (B, N)."""
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(len(lengths), max(lengths), width, generator=generator, dtype=torch.float64)
    valid = torch.arange(max(lengths)) < torch.tensor(lengths)[:, None]
    return x.masked_fill(~valid[..., None], 9.0), valid


def shaken(module: nn.Module) -> nn.Module:
    """Double precision, and every parameter away from where it starts."""
    torch.manual_seed(1)
    with torch.no_grad():
        for parameter in module.parameters():
            parameter.add_(0.3 * torch.randn_like(parameter))
    return module.double()


def softmax(values) -> list[float]:
    most = max(values)
    shares = [math.exp(v - most) for v in values]
    return [share / sum(shares) for share in shares]


def norm_one(norm: nn.LayerNorm, x):
    mean = sum(x) / len(x)
    spread = math.sqrt(sum((v - mean) ** 2 for v in x) / len(x) + norm.eps)
    return [(v - mean) / spread * w + b for v, w, b in zip(x, norm.weight.tolist(), norm.bias.tolist(), strict=True)]


def dot(a, b) -> float:
    return sum(p * q for p, q in zip(a, b, strict=True))


def linear(layer: nn.Linear, x) -> list[float]:
    return [dot(row, x) + b for row, b in zip(layer.weight.tolist(), layer.bias.tolist(), strict=True)]


def gelu(v: float) -> float:
    return 0.5 * v * (1 + math.erf(v / math.sqrt(2)))


def mixed(weights, x) -> torch.Tensor:
    return torch.tensor([[dot(row, column) for column in zip(*x, strict=True)] for row in weights])


def test_patch_merger_equals_a_slow_reference():
    x, valid = tokens(7, 4)
    pooler = shaken(Merger(8, 3))
    weights, merged = pooler(x, valid, GRID)
    for image, length in enumerate((7, 4)):
        normed = [norm_one(pooler.norm, row) for row in x[image, :length].tolist()]
        expected = [softmax([dot(query, row) for row in normed]) for query in pooler.queries.tolist()]
        torch.testing.assert_close(weights[image, :, :length], torch.tensor(expected, dtype=torch.float64))
        torch.testing.assert_close(merged[image], mixed(expected, normed).double(), rtol=0, atol=1e-6)
        assert (weights[image, :, length:] == 0).all()
    torch.testing.assert_close(weights.sum(2), torch.ones(2, 3, dtype=torch.float64))


@pytest.mark.parametrize("automatic", [False, True], ids=["bfloat16", "autocast"])
@torch.no_grad()
def test_patch_mergers_weights_are_exact_in_half_precision(automatic):
    """Without a scale logits reach 60 at 384 features, where bfloat16 counts in steps of a quarter."""
    torch.manual_seed(0)
    pooler, x = Merger(384, 8), torch.randn(3, 50, 384)
    if not automatic:
        pooler, x = pooler.bfloat16(), x.bfloat16()
    with torch.autocast("cpu", torch.bfloat16, enabled=automatic):
        weights, _ = pooler(x, torch.ones(3, 50, dtype=torch.bool), GRID)
        normed = pooler.norm(x).double()
    logits = pooler.queries.double() @ normed.transpose(1, 2)
    assert float(logits.abs().max()) > 50
    assert weights.dtype == torch.float32
    torch.testing.assert_close(weights.double(), logits.softmax(2), rtol=0, atol=1e-4)


def slow_transport(scores, iterations):
    """The published form: uniform marginals 1 / (M + N) for rows and columns, the result times M + N."""
    m, n = len(scores), len(scores[0])
    target = 1 / (m + n)
    row, column = [1.0] * m, [1.0] * n
    kernel = [[math.exp(s) for s in line] for line in scores]
    for _ in range(iterations):
        row = [target / sum(kernel[i][j] * column[j] for j in range(n)) for i in range(m)]
        column = [target / sum(kernel[i][j] * row[i] for i in range(m)) for j in range(n)]
    return [[row[i] * kernel[i][j] * column[j] * (m + n) for j in range(n)] for i in range(m)]


@pytest.mark.parametrize("iterations", [1, 3, 10])
def test_the_transport_plan_equals_the_published_form(iterations):
    scores = torch.randn(2, 4, 9, dtype=torch.float64)
    valid = torch.arange(9) < torch.tensor([9, 6])[:, None]
    plan = transport_plan(scores, valid, iterations=iterations)
    for image, length in enumerate((9, 6)):
        expected = slow_transport(scores[image, :, :length].tolist(), iterations)
        torch.testing.assert_close(plan[image, :, :length], torch.tensor(expected, dtype=torch.float64))
        assert (plan[image, :, length:] == 0).all()


def test_the_marginals_of_sinkhorn():
    """A token's weights sum to 1 exactly; a prototype's come to N / M, and to 1 where there are as many."""
    x, valid = tokens(20)
    pooler = Prototypes(8, 5, epsilon=1.0, iterations=3).double()
    plan, _ = pooler(x, valid, GRID)
    torch.testing.assert_close(plan.sum(1), torch.ones(1, 20, dtype=torch.float64), rtol=0, atol=1e-12)
    torch.testing.assert_close(plan.sum(2), torch.full((1, 5), 4.0, dtype=torch.float64), rtol=0.02, atol=0)
    square = transport_plan(torch.randn(1, 6, 6, dtype=torch.float64), valid[:, :6], iterations=200)
    torch.testing.assert_close(square.sum(2), torch.ones(1, 6, dtype=torch.float64), rtol=0, atol=1e-9)


def test_sinkhorn_mixes_tokens_of_length_one_and_a_pass_changes_no_prototype():
    x, valid = tokens(9)
    pooler = shaken(Prototypes(8, 4, epsilon=0.5, iterations=3))
    before = pooler.prototypes.clone()
    plan, out = pooler(x, valid, GRID)
    torch.testing.assert_close(out, plan @ F.normalize(x, dim=2))
    cosine = F.cosine_similarity(before[None, :, None], x[:, None], dim=3)
    torch.testing.assert_close(plan, transport_plan(cosine / 0.5, valid, iterations=3))
    out.square().sum().backward()
    assert pooler.prototypes.grad.abs().sum() > 0
    assert torch.equal(pooler.prototypes, before)


def test_prototypes_are_shortened_before_an_update():
    model = reduce_tokens(make_vit(), at([1, 2], Sinkhorn(Ratio(0.5))))
    (reducer,) = model.members()
    assert [len(pooler.prototypes) for pooler in reducer.poolers.values()] == [18, 9]
    with torch.no_grad():
        for pooler in reducer.poolers.values():
            pooler.prototypes.mul_(3)
    before = model(torch.ones(1, 3, 48, 48))
    reducer.train_phase(0.5, model.base)
    for pooler in reducer.poolers.values():
        torch.testing.assert_close(pooler.prototypes.norm(dim=1), torch.ones(len(pooler.prototypes)))
    torch.testing.assert_close(model(torch.ones(1, 3, 48, 48)), before)


@pytest.mark.parametrize("kind", [Slimming, ByMLP])
def test_sit_and_token_learner_equal_a_slow_reference(kind):
    x, valid = tokens(6, 3)
    pooler = shaken(kind(8, 4))
    weights, features = pooler(x, valid, GRID)
    assert features is None, "they are a plain mix"
    scale = pooler.scale.detach().item() if kind is Slimming else 1.0
    for image, length in enumerate((6, 3)):
        logits = []
        for row in x[image, :length].tolist():
            hidden = [gelu(v) for v in linear(pooler.hidden, norm_one(pooler.norm, row))]
            logits.append([scale * v for v in linear(pooler.out, hidden)])
        expected = [softmax(column) for column in zip(*logits, strict=True)]
        torch.testing.assert_close(weights[image, :, :length], torch.tensor(expected, dtype=torch.float64))
        assert (weights[image, :, length:] == 0).all()


def test_token_learners_convolutions_are_a_mean_over_the_grid():
    x, valid = tokens(12)
    pooler = shaken(ByConvolution(8, 3))
    weights, merged = pooler(x, valid, (3, 4))
    maps = torch.stack([torch.tensor(norm_one(pooler.norm, row)) for row in x[0].tolist()]).double()
    maps = maps.view(3, 4, 8).permute(2, 0, 1)
    for number, layer in enumerate(pooler.convolutions):
        maps = F.gelu(maps) if number else maps
        padded, kernel = F.pad(maps, (1, 1, 1, 1)), layer.weight
        out = torch.zeros(len(kernel), 3, 4, dtype=torch.float64)
        for r in range(3):
            for c in range(4):
                out[:, r, c] = (kernel * padded[:, r : r + 3, c : c + 3]).sum((1, 2, 3))
        maps = out
    maps = maps.sigmoid().flatten(1)
    torch.testing.assert_close(merged[0], maps @ x[0] / 12, rtol=0, atol=1e-6)
    torch.testing.assert_close(weights[0], maps / maps.sum(1, keepdim=True), rtol=0, atol=1e-6)


@torch.no_grad()
def test_the_convolutions_need_the_whole_grid(images):
    driven = reduce_tokens(make_vit(), at(1, TokenLearner(Count(5), maps="conv")))
    assert driven.trace(images)[1].tokens[0].tolist() == [37, 37, 6, 6, 6]
    with pytest.raises(ReducerError, match="place it once"):
        reduce_tokens(make_vit(), at([1, 2], TokenLearner(Count(5), maps="conv")))
    after = at(0, TopK(Ratio(0.9))) | at(1, TokenLearner(Count(5), maps="conv"))
    with pytest.raises(ReducerError, match="before other reducers"):
        reduce_tokens(make_vit(), after)(images)
    ragged = at(0, ATS(Ratio(0.9))) | at(1, TokenLearner(Count(5), maps="conv"))
    with pytest.raises(ReducerError, match="before other reducers"):
        reduce_tokens(make_vit(), ragged)(images)


@poolings
@torch.no_grad()
def test_counts_follow_the_budget_from_block_to_block(method, images):
    for budget, expected in (
        (Ratio(0.6), [37, 22, 13, 8, 5]), (Count(7), [37, 8, 8, 8, 8]), (Drop(10), [37, 27, 17, 7, 2]),
        (Ratio(0.3, of="initial"), [37, 11, 11, 11, 11]), (Ratio(1.0), [37] * 5),
    ):  # fmt: skip
        _, trace = reduce_tokens(make_vit(), at(range(DEPTH), method(budget))).trace(images)
        assert trace.tokens[0].tolist() == expected
        assert (trace.tokens == trace.tokens[0]).all()


@poolings
@torch.no_grad()
def test_the_number_that_leaves_does_not_depend_on_what_enters(method, images):
    """After ATS each image has another length; what has more than M gets M, and the others stay as they are."""
    base = make_vit().double()
    images = images.double()
    lengths = set()
    for points in (6, 12, 40):
        first = at(0, ATS(Count(points)))
        driven = reduce_tokens(base, first | at(2, method(Count(8))))
        together, trace = driven.trace(images)
        assert torch.equal(trace.tokens[:, 3], trace.tokens[:, 2].clamp(max=9))
        lengths |= set((trace.tokens[:, 2] > 9).tolist())
        alone = reduce_tokens(base, first)(images)
        for i in range(len(images)):
            short = trace.tokens[i, 2] <= 9
            torch.testing.assert_close(driven(images[i : i + 1])[0], together[i], rtol=0, atol=1e-9)
            assert torch.allclose(together[i], alone[i], rtol=0, atol=1e-9) == bool(short)
            cost = trace.reducer_macs[i] - reduce_tokens(base, first).trace(images)[1].reducer_macs[i]
            assert (cost > 0) == (not short)
    assert lengths == {True, False}


@pytest.mark.parametrize("ragged", [False, True])
def test_a_pooled_map_by_hand(ragged):
    """Image 0 has a prefix token and three patches, image 1 two patches, one of which stays behind none."""
    if ragged:
        layout = Layout.ragged(torch.tensor([4, 2, 4]), torch.tensor([1, 0, 0]))
    else:
        layout = Layout.alike(3, 4, 1, torch.device("cpu"))
    x = torch.arange(layout.rows, dtype=torch.float64)[:, None] + 1
    width = layout.width_from(layout.prefix)
    weights = torch.rand(3, 2, width, dtype=torch.float64) * layout.valid_patches[:, None]
    pooled = pooled_map(layout, weights)
    expected, patches = [], layout.pad_patches(x)
    for image in range(3):
        start, lead, n = (int(v[image]) for v in (layout.starts, layout.prefix, layout.patches))
        expected.append(x[start : start + lead])
        expected.append(x[start + lead : start + lead + n] if n <= 2 else weights[image] @ patches[image])
    torch.testing.assert_close(pooled.apply(x), torch.cat(expected))
    torch.testing.assert_close(pooled_features(pooled, x, weights @ patches), torch.cat(expected))
    assert isinstance(pooled, Mix)
    assert pooled.new.lengths.tolist() == ([3, 2, 2] if ragged else [3, 3, 3])


@poolings
@torch.no_grad()
def test_sizes_and_owners_of_a_pooling(method, images):
    """Weights that sum to one over the patches make tokens of size 1; Sinkhorn shares every patch out whole."""
    for reducer in (method(Count(6)), *([TokenLearner(Count(6), maps="conv")] if method is TokenLearner else [])):
        check_sizes_and_owners(reducer, images)


def check_sizes_and_owners(reducer, images):
    sizes = []

    class Probe(TopK):
        def decide(self, signals, state):
            sizes.append(signals.layout.pad_patches(signals.size))

    model = reduce_tokens(make_vit(), at(1, reducer) | at(2, Probe(Ratio(0.5))))
    _, trace = model.trace(images)
    total = 36.0 if isinstance(reducer, Sinkhorn) else 6.0
    torch.testing.assert_close(sizes[0].sum(1), torch.full((5,), total), rtol=0, atol=1e-3)
    assert (trace.owner(1) >= 1).all(), "every patch weighs most in some token"


@poolings
def test_every_parameter_of_a_pooling_learns(method, images):
    reducer = method(Ratio(0.5))
    model = reduce_tokens(make_vit(), at([1, 3], reducer)).train()
    model(images).square().sum().backward()
    for name, parameter in reducer.poolers.named_parameters():
        assert parameter.grad is not None and torch.isfinite(parameter.grad).all(), name
        assert parameter.grad.abs().sum() > 0, name


@poolings
def test_what_is_new_learns_ten_times_as_fast_unless_a_training_says_otherwise(method, images):
    """Sinkhorn's prototypes, PatchMerger's queries and all networks, in the optimiser that the recipe asks for."""
    stages = [{"at": 1, "reducer": {"name": method.name, "budget": {"count": 9}}}]
    model = reduce_tokens(make_vit(), at(1, method(Count(9))))
    own = {id(p) for p in model.reducers.parameters()}
    assert own
    for given, scale in (({}, 10.0), ({"reducer_lr_scale": 2.0}, 2.0)):
        recipe = parse_recipe({"stages": stages, **given}, workload="embedded")
        groups = make_optimizer(model.base, model.reducers, recipe).param_groups
        found = {id(p): group.get("lr_scale", 1.0) for group in groups for p in group["params"]}
        assert {found[i] for i in own} == {scale}
        assert {found[i] for i in found.keys() - own} == {1.0}


@poolings
@torch.no_grad()
def test_the_cost_of_a_pooling(method, images):
    n, m, d = 36, 9, 32
    expected = {
        "patch_merger": 2 * n * m * d, "sinkhorn": 2 * n * m * d,
        "sit": n * (d * d // 2 + d // 2 * m) + n * m * d, "token_learner": n * (64 * d + 64 * m) + n * m * d,
    }[method.name]  # fmt: skip
    _, trace = reduce_tokens(make_vit(), at(2, method(Count(m)))).trace(images)
    assert (trace.reducer_macs == expected).all()
    if method is TokenLearner:
        _, trace = reduce_tokens(make_vit(), at(2, TokenLearner(Count(m), maps="conv"))).trace(images)
        assert (trace.reducer_macs == n * 9 * (d * m + 3 * m * m) + n * m * d).all()


def outputs_of(model, images):
    """What a training would hand to ``losses``."""
    seen = []

    class Last(TopK):
        def decide(self, signals, state):
            return None

        def finish(self, batch, state):
            seen.append((batch, state))
            return batch

    (block,) = model.placement.blocks
    model = reduce_tokens(model.base, model.placement | at((block + 1) % DEPTH, Last(Ratio(0.5))))
    logits = model(images)
    ((batch, state),) = seen
    return SimpleNamespace(logits=logits, batch=batch), state


def test_the_recalibration_of_sit(images):
    reducer = SiT(Count(7), recalibration=2.0)
    base = make_vit("distilled")
    model = reduce_tokens(base, at(1, reducer)).train()
    assert reducer.needs_teacher
    outputs, state = outputs_of(model, images)
    teacher = SimpleNamespace(logits=None, tokens=torch.randn(5, 38, 32))
    (loss,) = reducer.losses(state, outputs, None, teacher).values()
    left = outputs.batch.layout.pad_patches(outputs.batch.x)
    reverse = reducer.reverse
    logits = reverse.scale * reverse.out(F.gelu(reverse.hidden(reverse.norm(left))))  # (B, 7, 36)
    recovered = reverse.project(logits.softmax(1).transpose(1, 2) @ reverse.norm(left))
    torch.testing.assert_close(loss, 2 * (recovered - teacher.tokens[:, 2:]).square().mean())
    loss.backward()
    assert all(p.grad is not None and p.grad.abs().sum() > 0 for p in reverse.parameters())
    assert reducer.poolers["1"].hidden.weight.grad.abs().sum() > 0
    with pytest.raises(ReducerError, match="recalibration=0"):
        reducer.losses(state, outputs, None, SimpleNamespace(logits=None, tokens=torch.randn(5, 66, 32)))


def test_sit_without_recalibration_asks_no_teacher(images):
    reducer = SiT(Count(7), recalibration=0)
    reduce_tokens(make_vit(), at(1, reducer))
    assert not reducer.needs_teacher
    assert reducer.losses(None, None, None, None) == {}
    assert not any("reverse" in name for name in reducer.state_dict())


def test_learned_weights_of_dpc_knn_are_a_softmax_within_a_cluster():
    """Whatever the largest of the image is: 500 would overflow."""
    layout = Layout.ragged(torch.tensor([7, 3]), torch.tensor([1, 1]))
    logits = torch.tensor([9.0, 498.0, 499.5, 497.0, 500.0, 498.5, 497.5, 9.0, 0.5, 0.25], dtype=torch.float64)
    logits.requires_grad_()
    weight = learned_weights(logits, layout)
    assert torch.equal(weight[[0, 7]], torch.ones(2, dtype=torch.float64))
    label = torch.tensor([[0, 1, 0, 1, 1, 0], [0, 0, 0, 0, 0, 0]])
    merge = merge_labels(layout, label, Counts.of(layout, torch.tensor([2, 1])), weight)
    x = torch.randn(10, 3, dtype=torch.float64)
    clusters = [[0], [1, 3, 6], [2, 4, 5], [7], [8, 9]]
    expected = []
    for members in clusters:
        shares = torch.tensor(softmax(logits[members].tolist()), dtype=torch.float64)
        expected.append(sum(share * x[i] for share, i in zip(shares, members, strict=True)))
    merged = merge.apply(x)
    torch.testing.assert_close(merged, torch.stack(expected))
    merged.square().sum().backward()
    assert (logits.grad[~layout.is_prefix] != 0).all() and (logits.grad[layout.is_prefix] == 0).all()


def test_dpc_knn_learns_how_members_weigh(images):
    base = make_vit().double()
    reducer = DPCKNN(Count(9), weights="learned", site="input")
    assert reducer.trained and not DPCKNN(Count(9)).trained
    model = reduce_tokens(base, at(1, reducer))
    plain = reduce_tokens(base, at(1, DPCKNN(Count(9), site="input")))
    assert [tuple(p.shape) for p in reducer.parameters()] == [(1, 32)]
    assert not torch.allclose(model(images.double()), plain(images.double()))
    model.train()(images.double()).square().sum().backward()
    assert reducer.weighers["1"].weight.grad.abs().sum() > 0
    with torch.no_grad():
        reducer.weighers["1"].weight.zero_()
        # equal weights are single precision, like sizes
        torch.testing.assert_close(model.eval()(images.double()), plain(images.double()), rtol=0, atol=1e-7)
        spent = model.trace(images.double())[1].reducer_macs - plain.trace(images.double())[1].reducer_macs
    assert (spent == 36 * 32).all()


@torch.no_grad()
def test_equal_weights_still_join_any_model(images):
    reducer = DPCKNN(Ratio(0.5))
    for width in (32, 48):
        reduce_tokens(make_vit(embed_dim=width), at([0, 1], reducer))(images)
    assert not reducer.traits.trained


def test_a_pooling_is_stacked_at_the_input_and_merged_after(images):
    model = reduce_tokens(make_vit(), at(1, PatchMerger(Count(12))) | at([1, 2], ToMe(Drop(3))))
    assert model.trace(images)[1].tokens[0].tolist() == [37, 37, 10, 7, 7]


@pytest.mark.parametrize(
    ("make", "match"),
    [
        (lambda: PatchMerger(3), "takes a budget"),
        (lambda: Sinkhorn(Count(3), epsilon=0), "above 0"),
        (lambda: Sinkhorn(Count(3), iterations=0), "1 or more"),
        (lambda: SiT(Count(3), recalibration=-1.0), "0 or more"),
        (lambda: TokenLearner(Count(3), maps="grid"), "choose one of mlp, conv"),
        (lambda: DPCKNN(Count(3), weights="size"), "choose one of equal, learned"),
    ],
)
def test_impossible_settings_are_refused(make, match):
    with pytest.raises(ReducerError, match=match):
        make()


def test_the_poolings_share_their_base():
    assert all(issubclass(method, LearnedPooling) and method.trained and method.site == "input" for method in POOLINGS)
