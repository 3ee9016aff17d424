"""IA-RED²: the interpreter, REINFORCE with its greedy baseline, and the curriculum."""

from __future__ import annotations

import itertools

import pytest
import torch
from torch import Tensor

from ablations.measure.finetune.objective import TrainingViT
from reducers import Decision, ReducerError, at, reduce_tokens
from reducers.maps import Mask
from reducers.methods import IARED2
from reducers.methods.ia_red2 import Interpreter, Phase, at_least_one, log_probability, phase_at, reward
from reducers.tokens import TokenBatch

from .conftest import make_vit

GROUPS = [0, 2]


def test_a_score_is_the_mean_over_heads_of_a_sigmoid():
    torch.manual_seed(0)
    interpreter = Interpreter(12, 3).double()
    with torch.no_grad():
        interpreter.policy.mul_(50)
    x = torch.randn(5, 12, dtype=torch.float64)
    query, key = interpreter.query(x), interpreter.key(interpreter.policy)
    for token in range(5):
        heads = [
            1 / (1 + torch.exp(-sum(query[token, 4 * h + i] * key[4 * h + i] for i in range(4)) / 2)) for h in range(3)
        ]
        torch.testing.assert_close(interpreter(x)[token], sum(heads) / 3)
    assert float(interpreter.macs(torch.tensor([5]))) == 5 * (12 * 12 + 12) + 12 * 12


def test_rewards_and_the_patch_that_always_stays():
    kept, right = torch.tensor([0.5, 0.5, 1.0]), torch.tensor([True, False, True])
    assert reward(kept, right, penalty=0.7).tolist() == pytest.approx([0.75, -0.7, 0.0])
    score = torch.tensor([[0.1, 0.3, 0.3], [0.9, 0.2, 0.1], [0.2, 0.1, 0.9]])
    valid = torch.tensor([[True, True, True], [True, True, True], [True, True, False]])
    found = at_least_one(score >= 0.5, score, valid)
    assert found.tolist() == [[False, True, False], [True, False, False], [True, False, False]]


def outcomes(patches: int) -> list[Tensor]:
    return [torch.tensor([choice]) for choice in itertools.product([False, True], repeat=patches)]


def test_reinforce_is_the_gradient_of_the_expected_reward():
    """Two patches, all four decisions written out: sum pi R grad log pi = grad sum pi R, and no baseline changes it."""
    logits = torch.tensor([[0.3, -0.8]], dtype=torch.float64, requires_grad=True)
    valid = torch.ones(1, 2, dtype=torch.bool)
    table = {(False, False): -1.0, (True, False): 0.75, (False, True): -1.0, (True, True): 0.0}

    def gradient(of: Tensor) -> Tensor:
        return torch.autograd.grad(of, logits)[0]

    p = logits.sigmoid()
    expected = sum(table[tuple(u[0].tolist())] * torch.where(u, p, 1 - p).prod() for u in outcomes(2))
    exact = gradient(expected)
    for baseline in (0.0, 0.75, -3.0):
        total = torch.zeros_like(logits)
        for u in outcomes(2):
            log_p = log_probability(u, logits.sigmoid(), valid)
            advantage = table[tuple(u[0].tolist())] - baseline
            total += log_p.detach().exp() * advantage * gradient(log_p.sum())
        torch.testing.assert_close(total, exact)
    u = torch.tensor([[True, False]])
    by_hand = torch.stack([1 - p[0, 0], -p[0, 1]])[None]  # of a sigmoid's log probability: u - p
    torch.testing.assert_close(gradient(log_probability(u, logits.sigmoid(), valid).sum()), by_hand)


def test_drawn_decisions_estimate_it_without_bias_and_with_less_variance():
    torch.manual_seed(0)
    p = torch.tensor([0.6, 0.3, 0.5], dtype=torch.float64)
    drawn = torch.rand(200_000, 3, dtype=torch.float64) < p
    score = drawn.double() - p  # the gradient of log pi by the logits
    gained = reward(drawn.double().mean(1), drawn[:, 0], penalty=1.0)
    baseline = reward(torch.tensor(2 / 3, dtype=torch.float64), torch.tensor(True), penalty=1.0)
    plain, less = gained[:, None] * score, (gained - baseline)[:, None] * score
    error = plain.std(0) / len(drawn) ** 0.5
    assert ((plain.mean(0) - less.mean(0)).abs() < 5 * error).all()
    assert float(baseline) != 0


def test_probabilities_of_nought_and_one_stay_finite():
    p = torch.tensor([[0.0, 1.0, 0.5]], requires_grad=True)
    found = log_probability(torch.tensor([[True, False, True]]), p, torch.tensor([[True, True, False]]))
    assert torch.isfinite(found).all() and found < -20
    found.sum().backward()
    assert torch.isfinite(p.grad).all()


def test_an_interpreter_learns_which_patch_matters():
    """A world in which the prediction is right where the first patch is kept: it alone stays."""
    torch.manual_seed(0)
    patches = torch.randn(4, 8)
    interpreter = Interpreter(8, 2)
    optimizer = torch.optim.Adam(interpreter.parameters(), lr=0.02)
    valid = torch.ones(32, 4, dtype=torch.bool)
    for _ in range(300):
        score = interpreter(patches).expand(32, -1)
        drawn = torch.rand(32, 4) < score
        greedy = score[:1] >= 0.5
        advantage = reward(drawn.float().mean(1), drawn[:, 0], penalty=1.0) - reward(
            greedy.float().mean(1), greedy[:, 0], penalty=1.0
        )
        optimizer.zero_grad()
        (-(advantage * log_probability(drawn, score, valid)).mean()).backward()
        optimizer.step()
    assert (interpreter(patches) >= 0.5).tolist() == [True, False, False, False]


def test_the_curriculum_takes_group_after_group():
    shares = [0.0, 0.1, 0.12, 0.3, 0.34, 0.44, 0.5, 0.67, 0.9, 0.9999]
    found = [phase_at(share, groups=3, interpreter_share=1 / 3) for share in shares]
    assert [phase.group for phase in found] == [0, 0, 0, 0, 1, 1, 1, 2, 2, 2]
    assert [phase.interpreter for phase in found] == [
        True, True, False, False, True, True, False, True, False, False,
    ]  # fmt: skip


def taught(share: float, *, kind: str = "class") -> tuple[TrainingViT, IARED2]:
    reducer = IARED2()
    model = TrainingViT(make_vit(kind), at(GROUPS, reducer)).train()
    with torch.no_grad():
        for interpreter in reducer.interpreters.values():
            interpreter.policy.mul_(50)
    reducer.train_phase(share, model.base)
    return model, reducer


@pytest.mark.parametrize("share", [0.0, 0.3, 0.5, 0.9])
def test_only_whose_turn_it_is_learns(share, images):
    model, reducer = taught(share)
    outputs, state = model.observed(images)
    targets = outputs.logits.argmax(1)
    parts = reducer.losses(state, outputs, targets, None)
    task = torch.nn.functional.cross_entropy(outputs.logits, targets)
    (task + sum(parts.values())).backward()
    learned = {name for name, parameter in model.named_parameters() if parameter.grad is not None}
    group = 0 if share < 0.5 else 1
    if share in (0.0, 0.5):
        assert parts.keys() == {"policy"}
        assert all(name.startswith(f"reducers.0.interpreters.{GROUPS[group]}.") for name in learned)
        assert len(learned) == 5
    else:
        assert parts == {}
        first = GROUPS[group]
        blocks = {int(name.split(".")[2]) for name in learned if name.startswith("base.blocks.")}
        assert blocks == set(range(first, 4))
        outside = {name for name in learned if not name.startswith("base.blocks.")}
        assert outside == {"base.norm.weight", "base.norm.bias", "base.head.weight", "base.head.bias"}


def test_the_policy_loss_is_that_of_two_passes_run_by_hand(images):
    """The greedy pass as inference runs it, and the rewards image by image."""
    model, reducer = taught(0.5)
    torch.manual_seed(5)
    outputs, state = model.observed(images)
    (draw,) = state.noted(reducer)
    with torch.no_grad():
        reducer._phase = None
        model.eval()
        greedy_logits, trace = model.trace(images)
        model.train()
        reducer._phase = Phase(1, interpreter=True)
    entering = trace.tokens[:, 1] - 1  # the first group is greedy in both
    torch.testing.assert_close(draw.greedy, (trace.tokens[:, -1] - 1) / entering)
    targets = torch.tensor([int(greedy_logits[0].argmax()), int(outputs.logits[1].argmax()), 0, 1, 2])
    found = reducer.losses(state, outputs, targets, None)["policy"]
    right, greedy_right = outputs.logits.argmax(1) == targets, greedy_logits.argmax(1) == targets
    total = 0.0
    for image in range(len(images)):
        ours = 1 - float(draw.kept[image]) ** 2 if right[image] else -1.0
        theirs = 1 - float(draw.greedy[image]) ** 2 if greedy_right[image] else -1.0
        total -= (ours - theirs) * float(draw.log_probability[image].detach()) / len(images)
    assert float(found.detach()) == pytest.approx(total, rel=1e-5)
    mixed = torch.nn.functional.one_hot(targets, 7).float()
    torch.testing.assert_close(reducer.losses(state, outputs, mixed, None)["policy"], found)


def test_draws_follow_the_probabilities(images):
    model, reducer = taught(0.0)
    _, state = model.observed(images.repeat(200, 1, 1, 1))
    shares = state.noted(reducer)[0].kept.unflatten(0, (200, len(images)))
    with torch.no_grad():
        batch = TokenBatch.from_images(
            model.base._pos_embed(model.base.patch_embed(images)), prefix=1, has_class_token=True, track=False
        )
        chances = batch.layout.pad_patches(reducer.interpreters["0"](batch.x)).mean(1)
    torch.testing.assert_close(shares.mean(0), chances, rtol=0, atol=0.03)


@torch.no_grad()
def test_a_threshold_of_nought_is_the_plain_model_and_higher_ones_keep_less(images):
    plain = make_vit().double()
    torch.manual_seed(3)
    reducer = IARED2(threshold=0)
    model = reduce_tokens(plain, at(GROUPS, reducer))
    torch.testing.assert_close(model(images.double()), plain(images.double()), rtol=0, atol=1e-10)
    before = torch.full((len(images),), 37)
    for threshold in (0.4, 0.5, 0.6, 1.0):
        reducer.threshold = threshold
        _, trace = model.trace(images.double())
        assert (trace.tokens.diff(dim=1) <= 0).all()
        assert (trace.tokens[:, -1] <= before).all()
        before = trace.tokens[:, -1]
    assert (before == 2).all(), "the class token, and the patch of highest score"
    spent = 2 * (32 * 32) + (37 + 2) * (32 * 32 + 32)
    assert (trace.reducer_macs == spent).all()


@pytest.mark.parametrize("kind", ["class", "registers"])
@torch.no_grad()
def test_the_gathered_pass_is_the_masked_one(kind, images):
    class Masked(IARED2):
        """The same decision as a mask: the slow form."""

        def decide(self, signals, state):
            layout = signals.layout
            valid = getattr(self, "alive", layout.valid_patches)
            score = layout.pad_patches(self.interpreters[str(state.block)](signals.output()))
            self.alive = at_least_one(score >= self.threshold, score, valid)
            return Decision(Mask.of(layout, layout.spread(self.alive, prefix=True).float()))

    base = make_vit(kind)
    gathered, masked = IARED2(), Masked()
    fast = reduce_tokens(base, at(GROUPS, gathered))
    with torch.no_grad():
        for interpreter in gathered.interpreters.values():
            interpreter.policy.mul_(50)
    slow = reduce_tokens(base, at(GROUPS, masked))
    masked.load_state_dict(gathered.state_dict())
    _, trace = fast.trace(images)
    assert (trace.tokens[:, -1] < trace.tokens[:, 0]).any()
    torch.testing.assert_close(slow(images), fast(images), rtol=0, atol=2e-4)


def test_wrong_settings_are_refused():
    for setting in ({"threshold": 1.5}, {"penalty": -1.0}, {"interpreter_share": "third"}):
        with pytest.raises(ReducerError, match="must be a"):
            IARED2(**setting)
