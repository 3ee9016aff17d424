"""What a budget counts in a clip, from the spec to the row: trials that count otherwise share the first blocks."""

from __future__ import annotations

import torch

from ablations.measure.context import TrialContext, dense_predictions
from ablations.measure.evaluate import run_group
from ablations.measure.opening import facts_of, target_of
from ablations.models.clips import XVIT
from ablations.models.loading import open_model
from ablations.spec.expand import expand
from ablations.spec.model import parse_spec
from ablations.workloads.embedded import moving_workload
from reducers import Count, TopK, at, reduce_tokens

FRAMES, CLIPS = 8, 4
SPEC = """
name: a
title: A
base: {x: target, target: [0.5], stages: [{at: 3, stack: [{name: topk, budget: {count: auto}}]}]}
arms: [{variant: frame}, {variant: clip, host: {over: clip}}, {variant: tube, host: {over: tube}}]
"""


def test_trials_that_count_frames_clips_and_places_are_each_brought_to_the_cost() -> None:
    clips = moving_workload(CLIPS)
    loaded = open_model(XVIT, weights=None, workload_name="moving_digits")
    facts, cpu = facts_of(XVIT, loaded), torch.device("cpu")
    dense = dense_predictions(loaded.model, clips, batch=4, device=cpu)
    context = TrialContext(clips, loaded.model, facts, dense, cpu, calibration=clips)
    trials = expand(parse_spec(SPEC), target_of(facts, clips, clips, batch=4))
    kept = {}
    for trial, result in zip(trials, run_group(trials, context), strict=True):
        row, over = result.row, trial.variant
        assert row["status"] == "ok", row["error"]
        assert row["over"] == over and abs(row["gmacs_mean"] / dense.gmacs - 0.5) < 0.02
        count = int(row["budget"].removeprefix("K = "))
        fast = reduce_tokens(loaded.model, at(3, TopK(Count(count))), host={"over": over}).eval()
        with torch.inference_mode():
            logits, trace = fast.trace(clips.batch(0, CLIPS))
        assert result.images is not None
        assert result.images["prediction"].tolist() == logits.argmax(1).tolist()
        assert (trace.tokens[:, -1] == FRAMES + (count if over == "clip" else FRAMES * count)).all()
        kept[over] = trace.kept(11).unflatten(1, (FRAMES, -1))
    assert len(set(kept["clip"].sum(2).flatten().tolist())) > 1, "frames share the clip's budget"
    assert (kept["tube"] == kept["tube"][:, :1]).all() and not (kept["frame"] == kept["frame"][:, :1]).all()
