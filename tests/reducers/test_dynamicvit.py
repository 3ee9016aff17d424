"""DynamicViT against slow references written from the specification."""

from __future__ import annotations

import itertools
import math

import pytest
import timm
import torch
from torch.nn import functional as F

from ablations.measure.finetune.objective import Objective, TeacherOutputs, TrainingViT
from reducers import ATS, Count, Drop, Ratio, ReducerError, TopK, at, build, reduce_tokens
from reducers.kit import keep_predictor
from reducers.kit.keep_predictor import KeepPredictor, Stage, next_stage, patches_of, ratio_loss
from reducers.methods import DTPS, DynamicViT
from reducers.methods.dynamicvit import token_distance
from reducers.tokens import Layout
from tests.finetune.conftest import recipe_of

from .conftest import make_vit
from .test_evit_tome_topk import attention_parts, embed, feed_forward

STAGES = [1, 2, 3]


def slow_predictor(predictor: KeepPredictor, x: torch.Tensor) -> torch.Tensor:
    """Keep log-probability of each patch of one image, (N, D) -> (N,), layer by layer from the raw weights."""
    w = list(predictor.parameters())
    width = x.shape[1]
    x = F.gelu(F.layer_norm(x, (width,), w[0], w[1]) @ w[2].T + w[3])
    mean = sum(row[width - width // 2 :] for row in x) / len(x)
    logits = []
    for row in x:
        both = torch.cat([row[: width - width // 2], mean])
        hidden = F.gelu(F.gelu(both @ w[4].T + w[5]) @ w[6].T + w[7])
        logits.append(hidden @ w[8].T + w[9])
    return torch.stack(logits).log_softmax(1)[:, 0]


def slow_dynamicvit(model, reducer, images, rate, blocks):
    """One image at a time, tokens as Python lists."""
    out = []
    for image in images:
        x = embed(model, image[None])
        patches = x.shape[1] - model.num_prefix_tokens
        for index, block in enumerate(model.blocks):
            if index in blocks:
                prefix = model.num_prefix_tokens
                scores = slow_predictor(reducer.predictors[str(index)], x[0, prefix:]).tolist()
                count = math.floor(patches * rate ** (blocks.index(index) + 1) + 1e-9)
                chosen = sorted(sorted(range(len(scores)), key=lambda j: -scores[j])[:count])
                x = x[:, [*range(prefix), *(prefix + j for j in chosen)]]
            x = feed_forward(block, attention_parts(block, x)[2])
        out.append(model.forward_head(model.norm(x)))
    return torch.cat(out)


def trained_model(reducer, *, kind="class", blocks=STAGES, dtype=torch.float64) -> TrainingViT:
    """A model in training, with predictors that tell patches apart."""
    model = TrainingViT(make_vit(kind).to(dtype), at(blocks, reducer))
    with torch.no_grad():
        for parameter in model.reducers.parameters():
            parameter.add_(
                0.3 * torch.randn(parameter.shape, generator=torch.Generator().manual_seed(parameter.numel()))
            )
    return model.train()


def draw_as_inference(monkeypatch, model, images, blocks=STAGES) -> None:
    """Let a training pass draw what inference keeps."""
    model.eval()
    with torch.no_grad():
        _, trace = model.trace(images)
    model.train()
    kept = iter([trace.kept(block) for block in blocks])

    def drawn(chances, **_):
        keep = next(kept).flatten().to(chances.dtype)
        return torch.stack([keep, 1 - keep], dim=1) + chances - chances.detach()  # straight through, as Gumbel's

    monkeypatch.setattr(keep_predictor.F, "gumbel_softmax", drawn)


@pytest.mark.parametrize("kind", ["class", "distilled", "registers"])
@pytest.mark.parametrize("rate", [0.7, 0.5])
@torch.no_grad()
def test_inference_is_the_slow_reference(kind, rate, images):
    reducer = DynamicViT(Ratio(rate))
    model = trained_model(reducer, kind=kind).eval()
    logits, trace = model.trace(images.double())
    prefix = model.base.num_prefix_tokens
    expected = [prefix + math.floor(36 * rate**s + 1e-9) for s in (0, 0, 1, 2, 3)]
    assert trace.tokens.tolist() == [expected] * len(images)
    if kind != "distilled":
        torch.testing.assert_close(
            logits, slow_dynamicvit(model.base, reducer, images.double(), rate, STAGES), rtol=0, atol=1e-9
        )


@torch.no_grad()
def test_the_predictor_is_the_slow_one_and_reads_no_other_image():
    torch.manual_seed(0)
    predictor = KeepPredictor(14).double()
    lengths = torch.tensor([6, 1, 4, 2])
    layout = Layout.ragged(lengths, torch.ones_like(lengths))
    x = torch.randn(layout.rows, 14, dtype=torch.float64)
    alone, patches = patches_of(layout, x)
    assert alone.lengths.tolist() == [5, 0, 3, 1]
    found = predictor(patches, alone)
    torch.testing.assert_close(found.exp().sum(1), torch.ones(9, dtype=torch.float64))
    for image in (0, 2, 3):
        own = x[layout.row_image == image][1:]
        torch.testing.assert_close(found[alone.row_image == image][:, 0], slow_predictor(predictor, own))
    weight = torch.tensor([1, 0, 1, 1, 0, 0, 0, 1, 1], dtype=torch.float64)
    masked = predictor(patches, alone, weight)
    kept = weight.bool()
    for image in (0, 2, 3):
        mine = (alone.row_image == image) & kept
        torch.testing.assert_close(masked[mine][:, 0], slow_predictor(predictor, patches[mine]))


def test_sizes_counts_and_cost_are_the_published_ones():
    predictor = KeepPredictor(384)
    assert sum(p.numel() for p in predictor.parameters()) == 241_250
    with torch.device("meta"):
        model = timm.create_model("deit_small_patch16_224")
    model = model.to_empty(device="cpu").eval()
    for parameter in model.parameters():
        torch.nn.init.zeros_(parameter)
    for rate, path in {0.9: 3.914, 0.7: 2.878, 0.5: 2.147}.items():
        fast = reduce_tokens(model, at([3, 6, 9], DynamicViT(Ratio(rate))))
        with torch.inference_mode():
            _, trace = fast.trace(torch.zeros(1, 3, 224, 224))
        counts = [196, *(math.floor(196 * rate**s + 1e-9) for s in (1, 2, 3))]
        assert trace.tokens[0].tolist() == [
            counts[min(b // 3, 3)] + 1 if b % 3 else counts[max(b // 3 - 1, 0)] + 1 for b in range(13)
        ]
        assert float(trace.reference_macs[0]) / 1e9 == pytest.approx(path, abs=5.01e-4)
        assert float(trace.reducer_macs[0]) == sum(counts[:3]) * predictor.macs
        if rate == 0.7:
            assert float(trace.macs[0]) / 1e9 == pytest.approx(2.98, abs=6e-3)


def test_counts_follow_the_budget_and_what_other_reducers_left():
    alike = Layout.alike(2, 197, 1, torch.device("cpu"))
    stage, counts = None, []
    for _ in range(3):
        stage = next_stage(Ratio(0.7), alike, stage, initial=196)
        counts.append(stage.count)
    assert counts == [137, 96, 67]
    assert stage.share == pytest.approx(0.343)
    for budget in (Ratio("48/97"), Ratio("999983/999999"), Ratio(0.865, rounding="ceil"), Ratio(1e-4)):
        for both in (alike, Layout.ragged(torch.tensor([197, 60]), torch.ones(2, dtype=torch.int64))):
            stage = None
            for power in (1, 2, 3):
                stage = next_stage(budget, both, stage, initial=196)
                rounded = math.ceil if budget.rounding == "ceil" else math.floor
                found = stage.count if isinstance(stage.count, int) else stage.count.tolist()
                each = [max(rounded(n * budget.value**power), 1) for n in both.patches.tolist()]
                assert found == (each[0] if both is alike else each)
    stage = next_stage(Ratio(0.7, count_prefix=True), alike, None, initial=196)
    assert next_stage(Ratio(0.7, count_prefix=True), alike, stage, initial=196).count == math.floor(197 * 0.49) - 1
    stage = next_stage(Drop(20), alike, None, initial=196)
    stage = next_stage(Drop(20), alike, stage, initial=196)  # under a mask all tokens are there still
    assert (stage.count, stage.first) == (156, 196)
    assert next_stage(Count(300), alike, None, initial=196).all_stay
    few = Layout.alike(2, 41, 1, torch.device("cpu"))
    first = next_stage(Ratio(0.7), alike, None, initial=196)
    assert next_stage(Ratio(0.7), few, first, initial=196).all_stay, "another reducer left fewer than wanted"
    lengths = torch.tensor([101, 11])
    ragged = Layout.ragged(lengths, torch.ones_like(lengths))
    one = next_stage(Ratio(0.5), ragged, None, initial=196)
    assert one.count.tolist() == [50, 5]
    assert next_stage(Ratio(0.5), ragged, one, initial=196).count.tolist() == [25, 2]


@pytest.mark.parametrize("method", [DynamicViT, DTPS])
@pytest.mark.parametrize("kind", ["class", "distilled", "registers", "average_with_class", "avgmax", "map"])
@torch.no_grad()
def test_the_masked_pass_with_the_decision_of_inference_is_the_gathered_pass(kind, method, images, monkeypatch):
    model = trained_model(method(Ratio(0.6)), kind=kind)
    images = images.double()
    draw_as_inference(monkeypatch, model, images)
    masked = model(images)
    torch.testing.assert_close(masked, model.eval()(images), rtol=0, atol=1e-4)


@torch.no_grad()
def test_a_training_pass_that_drops_nothing_is_the_plain_model(images, monkeypatch):
    model = trained_model(DynamicViT(Ratio(0.6)))
    ones = torch.tensor([1.0, 0.0], dtype=torch.float64)
    monkeypatch.setattr(keep_predictor.F, "gumbel_softmax", lambda chances, **_: ones.expand(len(chances), 2))
    torch.testing.assert_close(model(images.double()), model.base(images.double()), rtol=0, atol=1e-5)


def test_a_training_pass_that_drops_everything_stays_finite(images, monkeypatch):
    model = trained_model(DynamicViT(Ratio(0.6)), dtype=torch.float32)
    zeros = torch.tensor([0.0, 1.0])
    monkeypatch.setattr(keep_predictor.F, "gumbel_softmax", lambda chances, **_: zeros + chances - chances.detach())
    parts = Objective(recipe_of(smoothing=0.0), make_vit(seed=1), classes=7).parts(model, images, torch.arange(5))
    torch.stack(list(parts.values())).sum().backward()
    assert all(torch.isfinite(p.grad).all() for p in model.parameters() if p.grad is not None)
    assert float(parts["dynamicvit.tokens"].detach()) == 0, "nobody survives"
    assert all(float(p.grad.abs().sum()) > 0 for p in model.reducers["1"].predictors["1"].parameters())


def test_the_ratio_loss_is_zero_at_its_targets_and_else_the_squared_distance():
    layout = Layout.alike(2, 11, 1, torch.device("cpu"))
    alive = torch.ones(2, 11)
    alive[:, 6:] = 0
    half = Stage(1, layout, 10, 5, 0.5, False, alive.flatten().clone())
    assert float(ratio_loss([half])) == 0
    alive[0, 5] = 0
    apart = Stage(2, layout, 10, 3, 0.25, False, alive.flatten())
    expected = (0 + ((0.4 - 0.25) ** 2 + (0.5 - 0.25) ** 2) / 2) / 2
    assert float(ratio_loss([half, apart])) == pytest.approx(expected)
    assert float(ratio_loss([Stage(1, layout, 10, 10, 1.0, True), half])) == 0


@pytest.mark.parametrize("distance", ["mse", "kl"])
def test_losses_are_the_published_ones(distance, images, monkeypatch):
    model = trained_model(DynamicViT(Ratio(0.6), token_distance=distance))
    images = images.double()
    teacher = make_vit(seed=1).double()
    draw_as_inference(monkeypatch, model, images)
    model.eval()
    with torch.no_grad():
        _, trace = model.trace(images)
    outputs, state = model.train().observed(images)
    tokens = teacher.forward_features(images).detach()
    theirs = TeacherOutputs(teacher.forward_head(tokens).detach(), tokens)
    (reducer,) = model.losing()
    parts = {name: part.detach() for name, part in reducer.losses(state, outputs, torch.arange(5), theirs).items()}
    ratio = [(math.floor(36 * 0.6**s + 1e-9) / 36 - 0.6**s) ** 2 for s in (1, 2, 3)]
    assert float(parts["ratio"]) == pytest.approx(2.0 * sum(ratio) / 3)
    p, q = theirs.logits.softmax(1), outputs.logits.detach().softmax(1)
    assert float(parts["distill"]) == pytest.approx(0.5 * float((p * (p / q).log()).sum() / 5))
    apart = []
    ours = model.base.norm(outputs.batch.x).detach().view(5, 37, -1)
    for image in range(5):
        for patch in trace.kept(3)[image].nonzero().flatten().tolist():
            a, b = ours[image, 1 + patch], tokens[image, 1 + patch]
            kl = float((b.softmax(0) * (b.softmax(0) / a.softmax(0)).log()).sum())
            apart.append(float((a - b).square().mean()) if distance == "mse" else kl)
    assert float(parts["tokens"]) == pytest.approx(0.5 * sum(apart) / len(apart))


def test_token_distance_of_nothing_is_zero():
    x = torch.randn(4, 3)
    assert float(token_distance(x, x + 1, torch.zeros(4, dtype=torch.bool), distance="mse")) == 0
    assert float(token_distance(x, x + 1, torch.ones(4, dtype=torch.bool), distance="mse")) == pytest.approx(1)
    assert float(token_distance(x, x + 1, torch.ones(4, dtype=torch.bool), distance="kl")) == pytest.approx(0, abs=1e-6)


def test_who_is_dropped_once_stays_dropped_and_draws_differ(images):
    torch.manual_seed(3)
    model = trained_model(DynamicViT(Ratio(0.6)), dtype=torch.float32)
    with torch.no_grad():
        outputs, state = model.observed(images)
        again, _ = model.observed(images)
    (reducer,) = model.losing()
    alive = [stage.alive for stage in state.noted(reducer)]
    assert all((later <= earlier + 1e-6).all() for earlier, later in itertools.pairwise(alive))
    assert alive[0].view(5, 37)[:, 0].eq(1).all()
    torch.testing.assert_close(outputs.batch.alive, alive[-1])
    assert not torch.equal(outputs.logits, again.logits)


def test_what_cannot_be_trained_together_is_refused_by_name(images):
    apart = at(1, DynamicViT(Ratio(0.6))) | at(3, DynamicViT(Ratio(0.6)))
    with pytest.raises(ReducerError, match="all its stages in one reducer"):
        TrainingViT(make_vit(), apart).train()(images)
    assert reduce_tokens(make_vit(), apart)(images).shape == (5, 7)  # inference may place them apart
    between = at([1, 3], DynamicViT(Ratio(0.6))) | at(2, TopK(Ratio(0.5)))
    with pytest.raises(ReducerError, match="between two stages"):
        TrainingViT(make_vit(), between).train()(images)
    before = at(0, TopK(Ratio(0.5))) | at([1, 3], DynamicViT(Ratio(0.6)))
    objective = Objective(recipe_of(smoothing=0.0), make_vit(seed=1), classes=7)
    with pytest.raises(ReducerError, match="token_weight=0"):
        objective.parts(TrainingViT(make_vit(), before).train(), images, torch.arange(5))
    ragged = at(0, ATS(Ratio(0.8))) | at([1, 3], DynamicViT(Ratio(0.6), token_weight=0))
    parts = objective.parts(TrainingViT(make_vit(), ragged).train(), images, torch.arange(5))
    assert set(parts) == {"task", "dynamicvit.ratio", "dynamicvit.distill"}


@torch.no_grad()
def test_a_threshold_keeps_what_is_likelier_kept_and_always_the_likeliest(images):
    """At no threshold all stay, at the highest one only the likeliest; between, each image has its own number."""
    images = images.double()
    for threshold, counts in ((0.0, {36}), (1.0, {1}), (0.5, None)):
        reducer = DynamicViT(Ratio(0.6), threshold=threshold)
        model = trained_model(reducer, blocks=[1]).eval()
        assert reducer.adaptive
        _, trace = model.trace(images)
        x = model.base.blocks[0](embed(model.base, images))
        for image in range(5):
            likely = slow_predictor(reducer.predictors["1"], x[image, 1:]).exp()
            wanted = likely > threshold
            wanted[likely.argmax()] = True
            assert torch.equal(trace.kept(1)[image], wanted)
            assert counts is None or int(wanted.sum()) in counts
        assert float(trace.reducer_macs[0]) == 36 * reducer.predictors["1"].macs
    assert len(set(trace.tokens[:, -1].tolist())) > 1
    with pytest.raises(ReducerError, match="from 0 to 1"):
        DynamicViT(Ratio(0.6), threshold=2)


def test_settings_are_checked_and_travel():
    assert not DynamicViT(Ratio(0.7), distill_weight=0, token_weight=0).needs_teacher
    assert DynamicViT(Ratio(0.7)).needs_teacher
    spec = {"name": "dynamicvit", "budget": {"ratio": 0.7}, "token_distance": "kl"}
    assert build(spec).spec() == spec
    for wrong in ({"ratio_weight": -1}, {"distill_weight": float("nan")}, {"token_weight": "much"}):
        with pytest.raises(ReducerError, match="finite number"):
            DynamicViT(Ratio(0.7), **wrong)
    with pytest.raises(ReducerError, match="mse, kl"):
        DynamicViT(Ratio(0.7), token_distance="l1")
