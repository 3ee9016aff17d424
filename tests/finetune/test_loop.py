"""What a training does to a model: losses, gradients, averages, schedules."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import reducers.registry as registry
from ablations.measure.finetune.loop import FinetuneError
from ablations.measure.finetune.objective import Outputs, TeacherOutputs, softened_divergence
from ablations.measure.finetune.schedule import KeepSchedule, make_optimizer, make_scheduler, warm_share, warmed
from reducers import Count, Decision, Drop, Ratio, State, TokenReducer, build, reduce_tokens
from tests.finetune.conftest import ATS, plain_model, recipe_of, scenes, tiny_model, training

LEARNED: dict[str, Any] = {"at": [1, 2], "stack": [{"name": "learned_for_a_test"}]}


class Learned(TokenReducer):
    """Drops nothing, plans a number and asks that it come near the mean logit; its parameter has a loss of its own."""

    summary = "a parameter with a loss"
    needs_teacher = True

    def __init__(self) -> None:
        super().__init__()
        self.level = nn.Parameter(torch.randn(3))

    def plan(self, images: Tensor, base: nn.Module) -> dict[str, Tensor]:
        return {"level": self.level * images.mean()}

    def decide(self, signals: Any, state: State) -> Decision | None:
        return None

    def losses(self, state: State, outputs: Outputs, targets: Tensor, teacher: TeacherOutputs) -> dict[str, Tensor]:
        assert len(outputs.batch.layout.lengths) == len(targets) == len(teacher.tokens)
        gap = state.plans[self]["level"].mean() - teacher.logits.mean()
        return {"level": 0.5 * gap.square(), "logits": 0.1 * outputs.logits.square().mean()}


@pytest.fixture
def learned() -> Iterator[None]:
    """The reducer, registered for one test alone."""
    registry.register("learned_for_a_test")(Learned)
    yield
    del registry._METHODS["learned_for_a_test"]


def test_training_improves_the_loss_with_reducers_active(cache: Path) -> None:
    begun = training(cache, recipe_of(stages=[ATS], epochs=8, images=48, lr=3e-3, warmup=1), model=plain_model())
    reports: list[dict[str, Any]] = []
    begun.run(report=reports.append)
    assert [row["epoch"] for row in reports] == list(range(1, 9))
    assert reports[-1]["loss"] < reports[0]["loss"] - 0.1
    assert reports[-1]["eta"] == 0 and reports[0]["eta"] > 0 and reports[-1]["images"] == 8 * 48
    assert reports[-1]["lr"] < reports[1]["lr"]


def test_the_model_that_is_given_stays_as_it_is(cache: Path) -> None:
    dense = tiny_model()
    before = {name: tensor.clone() for name, tensor in dense.state_dict().items()}
    begun = training(cache, recipe_of(drop_path=0.3), model=dense)
    begun.run()
    trained, _ = begun.trained()
    assert not dense.training and set(trained) == set(before)
    assert all(torch.equal(tensor, before[name]) for name, tensor in dense.state_dict().items())
    assert not torch.equal(trained["head.weight"], before["head.weight"])
    dense.load_state_dict(trained)  # stochastic depth has left no trace


def test_one_update_of_accumulated_batches_has_the_gradient_of_the_large_batch(cache: Path) -> None:
    gradients = []
    for batch, accumulate in ((8, 1), (2, 4)):
        begun = training(
            cache, recipe_of(stages=[ATS], images=8, batch=batch, accumulate=accumulate), model=plain_model()
        )
        seen: list[Tensor] = []
        begun._step = lambda begun=begun, seen=seen: seen.extend(p.grad.clone() for p in begun.model.parameters())  # type: ignore[method-assign, misc]
        assert sum(1 for _ in begun._rest_of_epoch()) == 1
        gradients.append(seen)
    for one, other in zip(*gradients, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-4, atol=1e-6)


def test_losses_of_reducers_are_added_by_name_and_reach_their_parameters(learned: None, cache: Path) -> None:
    begun = training(cache, recipe_of(stages=[LEARNED]), model=plain_model())
    assert begun.objective.teacher is not None  # asked for by the reducer alone
    images, labels = scenes(cache, begun.recipe)[0, 0][0][None].repeat(4, 1, 1, 1), torch.tensor([0, 1, 2, 3])
    parts = begun.objective.parts(begun.model, images, labels)
    assert set(parts) == {"task", "learned_for_a_test.level", "learned_for_a_test.logits"}
    sum(parts.values()).backward()  # type: ignore[union-attr]
    (level,) = begun.model.reducers.parameters()  # one reducer at two blocks
    assert level.grad is not None and float(level.grad.abs().sum()) > 0
    before = level.detach().clone()
    begun.run()
    _, tensors = begun.trained()
    assert set(tensors) == {"1.level", "2.level"} and not torch.equal(tensors["1.level"], before)


def test_initial_weights_of_reducers_follow_the_seed(learned: None, cache: Path) -> None:
    levels = [
        next(training(cache, recipe_of(stages=[LEARNED], seed=seed)).model.reducers.parameters()) for seed in (0, 0, 1)
    ]
    assert torch.equal(levels[0], levels[1]) and not torch.equal(levels[0], levels[2])


def test_reducers_have_a_learning_rate_of_their_own(learned: None, cache: Path) -> None:
    recipe = recipe_of(stages=[LEARNED], lr=1e-3, warmup=0, reducer_lr_scale=10.0)
    begun = training(cache, recipe)
    optimizer = make_optimizer(begun.model.base, begun.model.reducers, recipe)
    make_scheduler(optimizer, recipe, updates_per_epoch=10).step_update(0)
    rates = sorted(group["lr"] for group in optimizer.param_groups)
    assert rates == pytest.approx([1e-3, 1e-3, 1e-2])
    assert sum(len(group["params"]) for group in optimizer.param_groups) == len(list(begun.model.parameters()))


def test_the_moving_average_follows_timm_s_rule_and_is_the_result(cache: Path) -> None:
    begun = training(cache, recipe_of(ema=0.5, images=48, lr=1e-2), model=plain_model())
    average = {name: p.detach().clone() for name, p in begun.model.named_parameters()}
    for _ in begun._rest_of_epoch():
        assert begun.ema is not None
        decay = begun.ema.get_decay(begun.update)
        for name, parameter in begun.model.named_parameters():
            average[name].lerp_(parameter.detach(), 1 - decay)
    trained, _ = begun.trained()
    for name, tensor in trained.items():
        torch.testing.assert_close(tensor, average[f"base.{name}"])
    assert not torch.equal(trained["head.weight"], begun.model.state_dict()["base.head.weight"])


def test_distillation_is_the_divergence_from_the_teacher(cache: Path) -> None:
    student, teacher = torch.randn(5, 10), torch.randn(5, 10)
    p = (teacher / 2).softmax(1)
    by_hand = 4 * (p * (p.log() - (student / 2).log_softmax(1))).sum(1).mean()
    torch.testing.assert_close(softened_divergence(student, teacher, tau=2.0), by_hand)
    assert float(softened_divergence(teacher, teacher, tau=3.0).abs()) < 1e-6
    recipe = recipe_of(distill={"alpha": 1.0, "tau": 2.0}, smoothing=0.0)
    begun = training(cache, recipe, model=plain_model())
    with torch.no_grad():
        parts = begun.objective.parts(begun.model.eval(), torch.randn(2, 1, 64, 64), torch.tensor([1, 2]))
    assert float(parts["task"]) == 0 and abs(float(parts["distill"])) < 1e-6  # it is still its own teacher
    assert all(not p.requires_grad for p in begun.objective.teacher.parameters())  # type: ignore[union-attr]


def test_the_keep_rate_warms_up_as_evits() -> None:
    shares = [warm_share(epoch, start=2, shrink=4) for epoch in (0, 1.99, 2, 4, 6, 9)]
    assert shares == pytest.approx([1, 1, 1, 0.5, 0, 0])
    assert warm_share(0, start=0, shrink=0) == 0
    assert warmed(Ratio(0.7), 0.5, patches=64).spec() == {"ratio": 0.85}
    assert warmed(Ratio(0.7, of="initial", rounding="floor"), 1.0, patches=64).spec() == {
        "ratio": 1.0, "of": "initial", "rounding": "floor",
    }  # fmt: skip
    assert warmed(Count(20), 0.25, patches=64) == Count(31)
    assert warmed(Count(100), 0.5, patches=64) == Count(100)
    assert warmed(Drop(8), 0.75, patches=64) == Drop(2)
    budget = Ratio("48/196")
    assert warmed(budget, 0.0, patches=64) is budget


def test_the_warm_up_reaches_budgets_inside_reducers_and_ends_at_them() -> None:
    evit = build({"name": "evit", "budget": {"ratio": 0.5}, "select": {"name": "ats", "budget": {"count": 16}}})
    schedule = KeepSchedule(nn.ModuleDict({"1": evit}), recipe_of(epochs=4, keep_start=1, keep_shrink=2), patches=64)
    assert schedule.set(0.5) == 1
    assert evit.budget == Ratio(1) and evit.select.budget == Count(64)
    schedule.set(2)
    assert evit.budget == Ratio(0.75) and evit.select.budget == Count(40)
    schedule.set(3)
    assert evit.budget == Ratio(0.5) and evit.select.budget == Count(16)


def test_a_warm_training_begins_dense_and_ends_reduced(cache: Path) -> None:
    evit = {"at": [1], "stack": [{"name": "evit", "budget": {"ratio": 0.25}}]}
    begun = training(cache, recipe_of(stages=[evit], epochs=2, keep_start=1, keep_shrink=0.5), model=plain_model())
    image = torch.randn(1, 1, 64, 64)
    kept = []
    for _ in range(begun.recipe.epochs):
        for _ in begun._rest_of_epoch():
            kept.append(int(begun.model.trace(image)[1].tokens[0, 2]))
    assert kept == [65, 65, 65, 18]  # 64 patches and the class token; then 16, the fused one, and the class token


def test_the_learning_rate_warms_up_and_falls_along_a_cosine(cache: Path) -> None:
    recipe = recipe_of(epochs=10, lr=1.0, min_lr=0.0, warmup=2)
    optimizer = make_optimizer(tiny_model(), nn.ModuleDict(), recipe)
    scheduler = make_scheduler(optimizer, recipe, updates_per_epoch=10)
    rates = []
    for update in (0, 10, 50, 99):
        scheduler.step_update(update)
        rates.append(optimizer.param_groups[0]["lr"])
    assert rates == pytest.approx([0.1, 0.55, 0.5, 0.0], abs=1e-3)


def test_mixed_precision_trains_the_packed_path(cache: Path) -> None:
    begun = training(cache, recipe_of(stages=[ATS], amp="bfloat16", epochs=2), model=plain_model())
    begun.run()
    assert all(p.dtype == torch.float32 and bool(torch.isfinite(p).all()) for p in begun.model.parameters())


def test_a_training_that_diverges_is_ended_with_the_remedy(cache: Path) -> None:
    broken = plain_model()
    nn.init.constant_(broken.head.weight, float("nan"))
    with pytest.raises(FinetuneError, match="not finite after update .* lower lr"):
        training(cache, recipe_of(), model=broken).run()


def test_the_accuracy_after_an_epoch_is_of_the_full_reduction(cache: Path) -> None:
    recipe = recipe_of(stages=[ATS], holdout=8, keep_start=1)
    begun = training(cache, recipe, model=plain_model())
    images = scenes(cache, recipe)
    begun.keep.set(0)
    assert images.held_out is not None
    placed = reduce_tokens(plain_model(), recipe.placement(4))
    expected = (
        (placed(images.held_out.batch(0, 8)).argmax(1) == torch.from_numpy(images.held_out.labels)).double().mean()
    )
    assert begun.accuracy(images.held_out) == float(expected)
    assert begun.model.training and begun.model.base.training


def test_two_trainings_of_one_recipe_are_one(cache: Path) -> None:
    recipe = recipe_of(stages=[ATS], mixup=0.5, drop_path=0.1)
    another = recipe_of(stages=[ATS], mixup=0.5, drop_path=0.1, seed=1)
    first, second, other = (training(cache, one) for one in (recipe, recipe, another))
    for begun in (first, second, other):
        begun.run()
    weights = [begun.trained()[0]["head.weight"] for begun in (first, second, other)]
    assert torch.equal(weights[0], weights[1]) and not torch.equal(weights[0], weights[2])
