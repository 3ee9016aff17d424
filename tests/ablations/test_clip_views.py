"""Several views of a clip: one answer, the cost of all."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
import torch

from ablations.measure.context import TrialContext, dense_predictions
from ablations.measure.evaluate import run_trial
from ablations.measure.metrics import motion_of, of_views
from ablations.measure.opening import default_batch, facts_of, target_of
from ablations.models.clips import XVIT
from ablations.models.loading import open_model
from ablations.run.record import clip_grid
from ablations.spec.expand import expand
from ablations.spec.model import parse_spec
from ablations.trial.trial import Trial
from ablations.workloads.base import Workload, WorkloadError, data_digest
from ablations.workloads.embedded import moving_workload
from reducers import ATS, Count, at, reduce_tokens

SPEC = "{name: a, title: A, arms: [{variant: v, stages: [{at: 3, stack: [{name: ats, budget: {count: 12}}]}]}]}"


def opened_on(clips: Workload) -> tuple[TrialContext, Trial]:
    """The small X-ViT with random weights on these clips, and a trial of ATS at block 3."""
    loaded = open_model(XVIT, weights="random", workload_name="moving_digits")
    facts, cpu = facts_of(XVIT, loaded), torch.device("cpu")
    dense = dense_predictions(loaded.model, clips, batch=4, device=cpu)
    (trial,) = expand(parse_spec(SPEC), target_of(facts, clips, None, batch=4))
    return TrialContext(clips, loaded.model, facts, dense, cpu), trial


@pytest.fixture(scope="module")
def clips() -> Workload:
    return moving_workload(8)


def in_views(clips: Workload, views: int = 2) -> Workload:
    """Clips that are shown ``views`` times, each time a little darker."""
    dimmed = [(clips.pixels * (1 - 0.2 * view)).astype(np.uint8) for view in range(views)]
    pixels = np.concatenate(dimmed, axis=1)
    digest = data_digest(pixels, labels=clips.labels, ids=clips.ids, mean=clips.mean, std=clips.std, views=views)
    return replace(clips, pixels=pixels, views=views, digest=digest, masks=None, second=None)


def test_a_batch_has_the_views_of_each_clip_one_after_the_other(clips: Workload) -> None:
    both = in_views(clips).batch(2, 4)
    assert both.shape == (4, 8, 1, 48, 48) and in_views(clips).frames == 8
    assert (both[[0, 2]] == clips.batch(2, 4)).all() and (both[1] != both[0]).any()


def test_views_must_divide_the_frames(clips: Workload) -> None:
    with pytest.raises(WorkloadError, match="no 3 views"):
        replace(clips, views=3)


def test_answers_are_the_mean_over_views() -> None:
    logits = torch.tensor([[1.0, 0.0], [0.0, 3.0], [2.0, 0.0], [0.0, 1.0]])
    assert of_views(logits, 2).tolist() == [[0.5, 1.5], [1.0, 0.5]]
    assert of_views(logits, 1) is logits


def test_a_trial_on_views_averages_logits_and_adds_up_costs(clips: Workload) -> None:
    workload = in_views(clips)
    context, trial = opened_on(workload)
    result = run_trial(trial, context)
    fast = reduce_tokens(context.model, at(3, ATS(Count(12)))).eval()
    with torch.inference_mode():
        logits, trace = fast.trace(workload.batch(0, 8))
    mean = logits.unflatten(0, (8, 2)).mean(1)
    images = result.images
    assert images is not None
    assert images["prediction"].tolist() == mean.argmax(1).tolist()
    assert np.allclose(images["gmacs"], trace.macs.unflatten(0, (8, 2)).sum(1).numpy() / 1e9)
    assert (np.array(images["tokens"]) == trace.tokens.unflatten(0, (8, 2)).sum(1).numpy()).all()
    kept = np.unpackbits(np.frombuffer(images["kept"][0][-1], dtype=np.uint8)).astype(bool)
    both = torch.cat([trace.covered(11)[0], trace.covered(11)[1]]).numpy()
    assert (kept[: len(both)] == both).all()
    assert result.row["views"] == 2
    one, _ = opened_on(clips)
    assert context.dense.gmacs == pytest.approx(2 * one.dense.gmacs)


def test_batches_shrink_with_views(clips: Workload) -> None:
    assert default_batch(clips) == 15 and default_batch(in_views(clips)) == 7


def test_motion_is_what_changes_from_frame_to_frame() -> None:
    pixels = np.zeros((2, 4, 2, 2, 1), dtype=np.uint8)
    pixels[0, 2:] = 255  # between the second and the third frame everything changes
    pixels[1, :, 0, 0] = np.array([0, 51, 102, 153])[:, None]
    found = motion_of(pixels)
    assert np.allclose(found, [[0, 0, 1, 0], [0.05] * 4])
    assert np.allclose(motion_of(pixels, views=2), [[0, 0, 0, 0], [0.05] * 4])


def test_a_clip_of_one_view_says_so_and_how_much_moves(clips: Workload) -> None:
    context, trial = opened_on(clips)
    result = run_trial(trial, context)
    assert result.row["views"] == 1 and result.images is not None
    assert np.allclose(result.images["motion"], motion_of(clips.pixels))


def test_patches_of_a_clip_lie_step_by_step(clips: Workload) -> None:
    loaded = open_model(XVIT, weights="random", workload_name="moving_digits")
    assert clip_grid(clips, facts_of(XVIT, loaded)) == (8, 6, 6)
    assert clip_grid(in_views(clips), facts_of(XVIT, loaded)) == (8, 6, 6)
