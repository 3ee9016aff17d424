"""ATS against slow references written from the specification, and its invariants (14.3)."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from reducers import ATS, Count, Ratio, ReducerError, at, reduce_tokens
from reducers.methods.ats import cumulative, sample_inverse, sample_nearest, sample_official, significance
from reducers.scores import class_attention_value_norm

from .conftest import make_vit


def reference_inverse(scores: np.ndarray, points: int) -> list[int]:
    """The first token whose cumulative share reaches each point (2k - 1) / 2K; repeats once."""
    cdf = np.cumsum(scores) / np.sum(scores)
    chosen = set()
    for k in range(1, points + 1):
        chosen.add(next(i for i, value in enumerate(cdf) if value >= (2 * k - 1) / (2 * points) - 1e-12))
    return sorted(chosen)


def reference_nearest(cdf: np.ndarray, grid: np.ndarray) -> list[int]:
    return sorted({int(np.argmin(np.abs(u - cdf))) for u in grid})


def reference_official(scores: np.ndarray, points: int) -> list[int]:
    """As the release samples one image: ascending, min-max CDF, left-padded with zeros to the number of points."""
    order = np.argsort(scores, kind="stable")
    cdf = np.cumsum(scores[order] / scores.sum())
    cdf = (cdf - cdf.min()) / (cdf.max() - cdf.min())
    grid = np.linspace(cdf[cdf > 0].min(), 1.0, points)
    pad = max(points - len(cdf), 0)
    padded = np.concatenate([np.zeros(pad), cdf])
    return sorted(int(order[np.argmin(np.abs(u - padded)) - pad]) for u in set(grid.tolist()))


def both(scores: list[np.ndarray]) -> tuple[torch.Tensor, torch.Tensor]:
    width = max(len(s) for s in scores)
    padded = torch.zeros(len(scores), width, dtype=torch.float64)
    valid = torch.zeros(len(scores), width, dtype=torch.bool)
    for row, s in enumerate(scores):
        padded[row, : len(s)] = torch.from_numpy(s)
        valid[row, : len(s)] = True
    return padded, valid


@pytest.fixture
def scores() -> list[np.ndarray]:
    random = np.random.RandomState(3)
    return [np.exp(1.5 * random.randn(n)) for n in (196, 120, 40, 7, 2, 1)]


def chosen(mask: torch.Tensor) -> list[list[int]]:
    return [row.nonzero().squeeze(1).tolist() for row in mask]


@pytest.mark.parametrize("points", [1, 5, 48, 196])
def test_inverse_transform_equals_the_slow_reference(scores, points):
    padded, valid = both(scores)
    cdf = cumulative(significance(padded, valid), valid)
    found = chosen(sample_inverse(cdf, torch.full((len(scores),), points)) & valid)
    assert found == [reference_inverse(s, points) for s in scores]


@pytest.mark.parametrize("points", [1, 5, 48, 196])
def test_nearest_lookup_equals_the_slow_reference(scores, points):
    padded, valid = both(scores)
    cdf = cumulative(significance(padded, valid), valid)
    grid = torch.tensor([(2 * k - 1) / (2 * points) for k in range(1, points + 1)], dtype=torch.float64)
    grid = grid.expand(len(scores), -1)
    found = chosen(sample_nearest(cdf, valid, grid, torch.ones_like(grid, dtype=torch.bool)))
    expected = [reference_nearest(np.cumsum(s) / s.sum(), grid[0].numpy()) for s in scores]
    assert found == expected


def test_the_official_variant_equals_the_release_on_one_image_alone(scores):
    some = [s for s in scores if len(s) > 1]
    padded, valid = both(some)
    found = chosen(sample_official(significance(padded, valid), valid, 196))
    assert found == [sorted(set(reference_official(s, 196))) for s in some]
    assert all(np.argmin(s) not in kept for s, kept in zip(some, found, strict=True)), "the lowest is always lost"


def test_every_token_is_kept_once_when_all_are_alike():
    even = torch.ones(1, 12)
    valid = torch.ones(1, 12, dtype=torch.bool)
    cdf = cumulative(significance(even, valid), valid)
    assert sample_inverse(cdf, torch.tensor([12])).all()


def test_one_dominant_token_leaves_one_and_zero_scores_are_defined():
    valid = torch.ones(2, 9, dtype=torch.bool)
    one_hot = torch.zeros(2, 9)
    one_hot[0, 4] = 3.0  # the second row is all zero: taken as all alike
    cdf = cumulative(significance(one_hot, valid), valid)
    picked = sample_inverse(cdf, torch.tensor([9, 9]))
    assert picked[0].nonzero().tolist() == [[4]]
    assert picked[1].all()


def test_a_factor_on_all_scores_changes_nothing(scores):
    padded, valid = both(scores)
    for factor in (1e-6, 7.0, 1e6):
        a = sample_inverse(cumulative(significance(padded, valid), valid), torch.full((len(scores),), 30))
        b = sample_inverse(cumulative(significance(padded * factor, valid), valid), torch.full((len(scores),), 30))
        assert torch.equal(a, b)


def test_k_bounds_the_count_and_a_token_of_two_points_share_makes_it_smaller(scores):
    padded, valid = both(scores)
    shares = significance(padded, valid)
    kept = sample_inverse(cumulative(shares, valid), torch.full((len(scores),), 20)).sum(1)
    assert (kept <= 20).all()
    assert (kept[shares.amax(1) >= 2 / 20] < 20).all()


def test_both_readings_of_the_score_agree_for_one_head():
    attention, values = torch.rand(10, 1), torch.randn(10, 1, 8)
    concat = class_attention_value_norm(attention, values, heads="concat")
    torch.testing.assert_close(concat, class_attention_value_norm(attention, values, heads="per_head"))
    attention, values = torch.rand(10, 3), torch.randn(10, 3, 8)
    by_hand = torch.stack([sum(attention[j, h] * values[j, h].norm() for h in range(3)) for j in range(10)])
    torch.testing.assert_close(class_attention_value_norm(attention, values, heads="per_head"), by_hand)


def test_the_release_samples_as_many_points_as_there_were_patches(images):
    model = make_vit()
    _, natural = reduce_tokens(model, at([1, 2], ATS(Ratio(0.2), variant="official"))).trace(images)
    _, same = reduce_tokens(model, at([1, 2], ATS(Count(36), variant="official"))).trace(images)
    _, fewer = reduce_tokens(model, at([1, 2], ATS(Count(9), variant="official"))).trace(images)
    assert torch.equal(natural.tokens, same.tokens)
    assert (fewer.tokens[:, -1] <= 10).all()


def test_a_dropped_class_token_leaves_the_head_the_mean_of_the_survivors(images):
    model = make_vit()
    reduced = reduce_tokens(model, at(3, ATS(Count(2), keep_class_token=False, score="value_norm")))
    logits, trace = reduced.trace(images)
    gone = ~trace.class_kept(3)
    assert gone.any(), "with two points the class token is dropped in some image"
    assert torch.isfinite(logits).all()
    kept = trace.kept(3)
    assert torch.equal(kept.sum(1) + trace.class_kept(3).long(), trace.tokens[:, -1])


@pytest.mark.parametrize("option", [{"variant": "papr"}, {"heads": "all"}, {"lookup": "near"}, {"score": "attention"}])
def test_unknown_settings_are_refused_with_the_choices(option):
    with pytest.raises(ReducerError, match="choose one of"):
        ATS(Count(5), **option)
