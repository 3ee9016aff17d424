"""What every method that is trained must do in training, tested over the whole registry: registered means tested."""

from __future__ import annotations

import copy
import dataclasses
from collections.abc import Iterator

import pytest
import torch
from torch import Tensor

from ablations.measure.finetune.objective import Objective, TrainingViT, needs_teacher
from ablations.measure.finetune.schedule import make_optimizer
from ablations.trial.recipe import Recipe, parse_recipe
from reducers import ATS, Placement, Ratio, ReducerError, Stack, TokenReducer, at, available, reduce_tokens
from reducers.methods import HVTPool
from reducers.reducer import HasLosses, TrainsInPhases
from tests.finetune.conftest import recipe_of
from tests.reducers.conftest import DEPTH, make_vit
from tests.reducers.test_contract import CASES, fresh, model_for, placed, unit
from tests.samples import in_turn

PHASES = (0.0, 0.3, 0.6, 0.95)  # of a training: curricula train one part after the other


def parts_of(reducer: TokenReducer) -> list[TokenReducer]:
    """The reducers at work: a stack's members, and a selector inside another."""
    return [part for part in reducer.modules() if isinstance(part, TokenReducer)]


def is_trained(reducer: TokenReducer) -> bool:
    return any(part.traits.trained or isinstance(part, HasLosses) for part in parts_of(reducer))


TRAINED = {name: reducer for name, reducer in CASES.items() if is_trained(reducer)}
each = in_turn(TRAINED)


class Lesson:
    """A reduced model in training, random weights in its reducers, and what its training minimises."""

    def __init__(self, reducer: TokenReducer) -> None:
        depth = max(DEPTH, unit(reducer)) + 1  # so that another block reads what the last reducer leaves
        self.model = TrainingViT(make_vit(depth=depth), placed(reducer)).train()
        with torch.no_grad():  # a layer that starts at zero would hide the ones before it
            for parameter in self.model.reducers.parameters():
                parameter.add_(0.1 * torch.randn_like(parameter))
        recipe = recipe_of(smoothing=0.0)
        teacher = make_vit(seed=1, depth=depth) if needs_teacher(self.model, recipe) else None
        self.objective = Objective(recipe, teacher, classes=7)

    def parts(self, seed: int = 0) -> dict[str, Tensor]:
        """The named losses of six random images."""
        generator = torch.Generator().manual_seed(seed)
        images = torch.randn(6, 3, 48, 48, generator=generator)
        return self.objective.parts(self.model, images, torch.arange(6) % 7)

    def enter(self, share: float) -> None:
        """What the loop does before an update."""
        for member in self.model.reducing():
            if isinstance(member, TrainsInPhases):
                member.train_phase(share, self.model.base)

    def frozen(self) -> set[str]:
        return {name for name, parameter in self.model.named_parameters() if not parameter.requires_grad}

    def phases(self) -> Iterator[float]:
        for share in PHASES:
            self.enter(share)
            yield share


@pytest.fixture
def images() -> Tensor:
    return torch.randn(5, 3, 48, 48, generator=torch.Generator().manual_seed(1))


@each
def test_every_parameter_is_trained_by_a_finite_gradient(reducer: TokenReducer) -> None:
    lesson = Lesson(reducer)
    seen = {name: 0.0 for name, _ in lesson.model.reducers.named_parameters()}
    for _ in lesson.phases():
        for seed in range(3):
            lesson.model.zero_grad(set_to_none=True)
            parts = lesson.parts(seed)
            assert "task" in parts
            assert all(part.ndim == 0 and torch.isfinite(part) for part in parts.values()), parts
            torch.stack(list(parts.values())).sum().backward()
            for name, parameter in lesson.model.named_parameters():
                assert parameter.grad is None or torch.isfinite(parameter.grad).all(), name
            for name, parameter in lesson.model.reducers.named_parameters():
                if parameter.grad is not None:
                    seen[name] += float(parameter.grad.abs().sum())
    assert [name for name, total in seen.items() if total == 0] == [], "no loss reaches these in any phase"


@each
def test_a_phase_follows_from_the_share_alone(reducer: TokenReducer) -> None:
    """A training that goes on from a checkpoint enters a phase without having passed those before."""
    straight, restarted = Lesson(reducer), Lesson(reducer)
    found = {share: straight.frozen() for share in straight.phases()}
    for share in reversed(PHASES):
        restarted.enter(share)
        assert restarted.frozen() == found[share]


@each
def test_a_training_pass_leaves_nothing_on_the_module(reducer: TokenReducer, images: Tensor) -> None:
    lesson = Lesson(reducer)
    with torch.no_grad():
        before = lesson.model.eval()(images)
    state = copy.deepcopy(lesson.model.reducers.state_dict())
    torch.stack(list(_trained(lesson).values())).sum().backward()
    lesson.model.zero_grad(set_to_none=True)
    copy.deepcopy(lesson.model.reducers)  # as a moving average of the weights does; a graph could not be copied
    assert all(torch.equal(value, state[name]) for name, value in lesson.model.reducers.state_dict().items())
    with torch.no_grad():
        assert torch.equal(lesson.model.eval()(images), before)


def _trained(lesson: Lesson) -> dict[str, Tensor]:
    lesson.model.train()
    return lesson.parts()


@each
@torch.no_grad()
def test_images_of_different_lengths_alone_and_in_a_batch(reducer: TokenReducer, images: Tensor) -> None:
    """After an adaptive method, which leaves ragged images, unless the method refuses those and says so."""
    try:
        first = Placement({0: ATS(Ratio(0.8))})
        model = reduce_tokens(model_for(reducer).double(), first | placed(reducer))
        together, trace = model.trace(images.double())
    except ReducerError as refused:
        pytest.skip(f"refused: {refused}")
    for i in range(len(images)):
        alone, own = model.trace(images[i : i + 1].double())
        assert torch.equal(own.tokens[0], trace.tokens[i])
        torch.testing.assert_close(alone[0], together[i], rtol=0, atol=1e-9)
        torch.testing.assert_close(own.macs[0], trace.macs[i])


TAUGHT = [name for name, cls in available().items() if cls.trained]


@pytest.mark.parametrize("name", TAUGHT)
def test_a_trained_method_says_how_it_was_trained(name: str) -> None:
    cls = available()[name]
    assert cls.trained_as, "the published training in a sentence"
    fields = {field.name for field in dataclasses.fields(Recipe)} - {"stages", "seed"}
    assert set(cls.schedule) <= fields
    assert isinstance(parse_recipe({**cls.schedule}, workload="embedded"), Recipe)


@each
def test_trained_methods_are_stacked_or_refused_by_name(reducer: TokenReducer, images: Tensor) -> None:
    """At one block, with one that keeps everything: the same as alone; what does more than decide is refused."""
    if not reducer.only_decides:
        with pytest.raises(ReducerError, match="cannot be stacked"):
            Stack(ATS(Ratio(0.8)), fresh(reducer))
        return
    with torch.no_grad():
        alone = reduce_tokens(make_vit(), placed(reducer))(images)
        stacked = reduce_tokens(make_vit(), placed(Stack(fresh(reducer))))(images)
    assert torch.equal(alone, stacked)


def test_positions_of_hvt_are_trained_without_weight_decay() -> None:
    base = make_vit("average")
    model = TrainingViT(base, at([1, 2], HVTPool(site="input", positions=True)))
    optimizer = make_optimizer(base, model.reducers, recipe_of(weight_decay=0.05))
    decay = {id(p): group["weight_decay"] for group in optimizer.param_groups for p in group["params"]}
    (pooling,) = model.reducing()
    assert [decay[id(table)] for table in pooling.parameters()] == [0.0, 0.0]
    assert decay[id(base.blocks[0].mlp.fc1.weight)] == 0.05
