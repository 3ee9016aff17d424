"""The task ``dense``: patches against masks by a head on the map that is put together again, by which rule ever."""

from __future__ import annotations

import dataclasses
import itertools
import json
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pyarrow.parquet as pq
import pytest
import torch

from ablations.measure.context import TrialContext
from ablations.measure.evaluate import run_trial, try_trial
from ablations.measure.opening import open_context, open_subject
from ablations.records.columns import IMAGE, ROW
from ablations.records.patch_iou import ious, miou
from ablations.spec.expand import expand
from ablations.spec.model import parse_spec
from ablations.spec.plain_yaml import SpecError
from ablations.store.store import Store
from ablations.tasks import task_of
from ablations.tasks.dense import TASK, fitted_head
from ablations.trial.code import code_of
from ablations.trial.stages import Stages
from ablations.trial.target import Target
from ablations.trial.trial import Trial, trial_from
from ablations.workloads import ImageSource, WorkloadError
from ablations.workloads.embedded import first_workload, training_scenes
from analysis.frame import read_results
from analysis.report import write_analysis
from reducers import Count, Drop, Placement, Ratio, ToMe, TopK, at, reduce_tokens
from reducers.methods import STViTR
from tests.ablations.code_edits import FIXED, changed, edited
from tests.reducers.conftest import make_vit

DENSE = dataclasses.replace(FIXED, task="dense")
CLASSES = 11  # ten digits and the background


@pytest.fixture(scope="module")
def context(tmp_path_factory: pytest.TempPathFactory) -> TrialContext:
    """The small embedded model on a few scenes of cluttered digits."""
    patched = pytest.MonkeyPatch()
    patched.setattr("ablations.tasks.dense.SCENES", 96)
    patched.setattr("ablations.tasks.dense._STEPS", 25)
    cache = tmp_path_factory.mktemp("cache")
    subject = open_subject(ImageSource("embedded:v1", limit=60), "digits_vit_tiny", task="dense")
    yield open_context(subject, torch.device("cpu"), cache=cache)
    patched.undo()


def trial_of(context: TrialContext, placement: Placement, **fields: object) -> Trial:
    facts, workload = context.facts, context.workload
    return Trial(
        spec="tiny", variant="one", x=None, stages=Stages.of_placement(placement), model=facts.name,
        weights=facts.weights, weights_digest=facts.weights_digest, workload=workload.name,
        data_digest=workload.digest, images=len(workload), batch=32, seed=0, task="dense", **fields,
    )  # fmt: skip


def test_of_a_model_of_stages_the_map_is_that_of_the_last_one(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A Swin's patches are 2 x 2 pixels at first and 8 x 8 in the end."""
    monkeypatch.setattr("ablations.tasks.dense.SCENES", 16)
    monkeypatch.setattr("ablations.tasks.dense._STEPS", 3)
    subject = open_subject(ImageSource("embedded", limit=6), "digits_swin_tiny", weights="random", task="dense")
    context = open_context(subject, torch.device("cpu"), cache=tmp_path)
    assert (context.facts.grid, context.facts.map_grid) == ((32, 32), (8, 8))
    result = run_trial(trial_of(context, at(4, TopK(Ratio(0.5), score="attention_received"))), context)
    assert context.targets.shape == (6, 65) and 0 <= result.row["miou"] <= 1
    assert (result.images["union"].sum(1) >= 64).all(), "every patch is in a union"


# --- keys -------------------------------------------------------------------------------------------------------------


def test_the_rule_stands_in_a_key_where_it_is_another_than_the_last_features() -> None:
    assert "restore" not in DENSE.description and trial_from(DENSE.description) == DENSE
    keys = {dataclasses.replace(DENSE, restore=rule).key for rule in ("last", "zero", "owner")}
    assert len(keys) == 3 and DENSE.key in keys
    zero = dataclasses.replace(DENSE, restore="zero")
    assert json.loads(zero.description)["restore"] == "zero" and trial_from(zero.description) == zero
    assert zero.random_seed == DENSE.random_seed and zero.family == DENSE.family, "the same tokens at the same cost"


@pytest.mark.parametrize(
    ("file", "old", "new"),
    [
        ("ablations/tasks/dense.py", "SCENES = 512", "SCENES = 256"),
        ("ablations/tasks/dense.py", "_DECAY = 1e-4", "_DECAY = 1e-3"),
        ("ablations/workloads/embedded.py", "HEAD_SEED = 2", "HEAD_SEED = 3"),
        ("reducers/restore.py", "entering.origin.clamp(min=0)", "entering.origin.clamp(min=1)"),
    ],
)
def test_the_head_and_the_rules_are_part_of_the_code_of_a_key(file: str, old: str, new: str) -> None:
    assert changed(edited(file, (old, new)), DENSE)
    if not file.startswith("reducers"):
        assert not changed(edited(file, (old, new)), FIXED)
    assert code_of(DENSE) != code_of(FIXED)


# --- what is counted --------------------------------------------------------------------------------------------------


def test_a_patch_is_of_the_class_where_a_pixel_of_the_digit_lies_in_it() -> None:
    workload = first_workload(12)
    targets = TASK.targets(workload, (8, 8))
    assert targets.shape == (12, 65) and np.array_equal(targets[:, 0], workload.labels)
    for image in range(12):
        for patch, (row, column) in enumerate(itertools.product(range(8), range(8))):
            pixels = workload.masks[image, 8 * row : 8 * row + 8, 8 * column : 8 * column + 8]
            assert targets[image, 1 + patch] == (workload.labels[image] if pixels.any() else 10)


def test_intersections_and_unions_are_those_of_a_count_patch_by_patch() -> None:
    random = np.random.RandomState(0)
    truth, said = random.randint(0, 3, (5, 9)), random.randint(0, 3, (5, 9))
    head = np.concatenate([np.eye(3), np.zeros((1, 3))])
    features, logits = torch.nn.functional.one_hot(torch.from_numpy(said), 3).float(), torch.eye(5)[:, :2]
    labels = np.concatenate([np.zeros((5, 1), dtype=np.int64), truth], axis=1)
    found = TASK.keep(torch.cat([features.flatten(1), logits], 1), labels=labels, fitted={"head": head})
    for image, one in itertools.product(range(5), range(3)):
        ours, theirs = said[image] == one, truth[image] == one
        assert found["intersection"][image, one] == (ours & theirs).sum()
        assert found["union"][image, one] == (ours | theirs).sum()
    chosen = [1, 1, 4]  # a resampled image counts twice
    counts = TASK.values(found)[chosen].sum(0)
    together = [(said[chosen] == one) & (truth[chosen] == one) for one in range(3)]
    either = [(said[chosen] == one) | (truth[chosen] == one) for one in range(3)]
    expected = [a.sum() / b.sum() for a, b in zip(together, either, strict=True)]
    assert ious(counts) == pytest.approx(expected) and miou(counts) == pytest.approx(np.mean(expected))
    assert found["correct"].tolist() == [True, False, True, True, True]


def test_a_class_that_nobody_says_and_nobody_is_does_not_count() -> None:
    assert miou(np.array([2.0, 0, 3, 4, 0, 4])) == pytest.approx((2 / 4 + 3 / 4) / 2)
    assert np.isnan(ious(np.array([2.0, 0, 3, 4, 0, 4]))[1]) and miou(np.zeros(6)) == 0


def test_the_head_separates_what_can_be_separated_and_is_the_same_again() -> None:
    random = np.random.RandomState(1)
    labels = random.randint(0, 4, 400)
    features = (random.randn(400, 6) + 8 * np.eye(4, 6)[labels]) * [1, 100, 1e-3, 1, 1, 1] + 5
    head = fitted_head(features.astype(np.float32), labels, classes=4)
    assert head.shape == (7, 4) and ((features @ head[:-1] + head[-1]).argmax(1) == labels).all()
    assert np.array_equal(head, fitted_head(features.astype(np.float32), labels, classes=4))


def test_the_paired_test_is_that_of_every_swap_where_few_images_differ() -> None:
    random = np.random.RandomState(2)
    unions = random.randint(4, 9, (6, 3)).astype(float)
    first, second = (np.concatenate([random.randint(0, 5, (6, 3)), unions], axis=1) for _ in range(2))
    seen, above = miou(first.sum(0)) - miou(second.sum(0)), 0
    for swaps in itertools.product([False, True], repeat=6):
        swapped = np.array(swaps)[:, None]
        one, other = np.where(swapped, second, first), np.where(swapped, first, second)
        above += miou(one.sum(0)) - miou(other.sum(0)) >= seen - 1e-12
    assert TASK.better(first, second) == above / 64
    assert 0 <= TASK.interval(first)[0] <= miou(first.sum(0)) <= TASK.interval(first)[1] <= 1
    assert TASK.interval(first) == TASK.interval(first) and TASK.interval(first[:1]) == (0.0, 1.0)


def test_the_interval_covers_as_often_as_it_says() -> None:
    """Images of one class, whose union is ten patches: the metric is a mean, and its interval that of a mean."""
    random, inside = np.random.RandomState(3), 0
    for _ in range(40):
        values = np.stack([random.binomial(10, 0.6, 50), np.full(50, 10)], axis=1).astype(float)
        low, high = TASK.interval(values)
        inside += low <= 0.6 <= high
    assert inside >= 34


# --- what is refused --------------------------------------------------------------------------------------------------


def test_images_without_masks_are_refused_by_name() -> None:
    bare = dataclasses.replace(first_workload(2), masks=None, name="imagefolder")
    with pytest.raises(WorkloadError, match=r"imagefolder has none: take WORKLOAD=embedded or embedded:v1"):
        TASK.check(bare)
    for name in ("classify", "embed"):
        task_of(name).check(bare)


def test_scenes_of_the_head_are_never_evaluated() -> None:
    evaluated, scenes = first_workload(60), training_scenes("embedded:v1", 24)
    assert not {*evaluated.ids} & {*scenes.ids} and scenes.masks is not None
    assert not any((image == other).all() for image in scenes.pixels for other in evaluated.pixels)


# --- trials -----------------------------------------------------------------------------------------------------------


@torch.no_grad()
def test_map_logits_and_trace_of_one_pass_are_those_of_three() -> None:
    images = torch.randn(3, 3, 48, 48)
    fast = reduce_tokens(make_vit(), at([1, 2], TopK(Ratio(0.6))))
    for rule in ("last", "zero"):
        dense, logits, trace = fast.trace_features(images, rule)
        assert torch.equal(dense, fast.features(images, restore=rule)) and torch.equal(logits, fast(images))
        assert torch.equal(trace.macs, fast.cost(images))


def test_without_reduction_every_rule_gives_the_plain_models_map(context: TrialContext) -> None:
    plain = TASK.of_plain(context.dense.reference)
    for rule in ("last", "zero", "owner"):
        result = run_trial(trial_of(context, Placement(), restore=rule), context)
        row = result.row
        assert row["miou"] == plain["dense_miou"] == row["dense_miou"] and row["restore"] == rule
        assert row["miou_low"] <= row["miou"] <= row["miou_high"] and row["top1"] == row["dense_top1"]
        assert row["agreement"] == 1 and row["gmacs_mean"] == pytest.approx(row["dense_gmacs"])
    assert 0.3 < row["miou"] < row["background_iou"] < 1, "a head of a few scenes reads digits off the patches"
    assert set(result.row) <= set(ROW) and set(result.images) <= set(IMAGE)
    counts = TASK.values(result.images)
    assert counts.shape == (60, 2 * CLASSES) and row["miou"] == miou(counts.sum(0))


def test_rules_matter_where_patches_are_dropped_and_not_where_they_are_merged(context: TrialContext) -> None:
    drops, merges = at(3, TopK(Ratio(0.4))), at(3, ToMe(Drop(30)))
    dropped = {rule: run_trial(trial_of(context, drops, restore=rule), context).row for rule in ("last", "zero")}
    assert dropped["last"]["miou"] != dropped["zero"]["miou"]
    assert dropped["last"]["top1"] == dropped["zero"]["top1"], "the class token knows of no rule"
    refused = try_trial(trial_of(context, drops, restore="owner"), context).row
    assert refused["status"] == "failed" and 'use restore="zero"' in refused["error"]
    merged = {run_trial(trial_of(context, merges, restore=rule), context).row["miou"] for rule in ("last", "owner")}
    assert len(merged) == 1
    recovered = run_trial(trial_of(context, at(range(6, 12), STViTR(Count(9))), restore="owner"), context).row
    assert recovered["gmacs_mean"] < recovered["dense_gmacs"] and 0 < recovered["miou"] < recovered["dense_miou"]


def test_a_result_is_kept_and_read_again(context: TrialContext, tmp_path: Path) -> None:
    result = run_trial(trial_of(context, at(3, TopK(Ratio(0.5)))), context)
    store = Store(tmp_path).create()
    store.save(result)
    images = store.load_images(result.key)
    assert TASK.values(images.to_pydict()).tolist() == TASK.values(result.images).tolist()


# --- specs and runs ---------------------------------------------------------------------------------------------------

SPEC = """\
name: tiny
title: A tiny question
arms:
  - variant: top-K, $restore
    restore: [last, zero]
    target: [0.8]
    stages: [{at: 3, stack: [{name: topk, budget: {count: auto}}]}]
  - {variant: merged, stages: [{at: 3, stack: [{name: tome, budget: {drop: 9}}]}]}
"""


def test_a_spec_spans_rules_and_another_task_refuses_them(context: TrialContext) -> None:
    target = Target(context.facts, "embedded:v1", "d" * 64, 60, 32, "c" * 64, "dense")
    trials = expand(parse_spec(SPEC), target)
    assert [(trial.variant, trial.restore) for trial in trials] == [
        ("top-K, last", "last"), ("top-K, zero", "zero"), ("merged", "last"),
    ]  # fmt: skip
    assert len({trial.computation for trial in trials}) == 3
    with pytest.raises(SpecError, match=r"restore: it puts tokens back .* classify reads no map .* --task dense"):
        expand(parse_spec(SPEC), dataclasses.replace(target, task="classify"))
    with pytest.raises(SpecError, match="restore"):
        parse_spec(SPEC.replace("[last, zero]", "[last, nearest]"))


@pytest.mark.slow
def test_a_run_is_kept_found_again_and_reproduced(
    ablate: Callable[..., int], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "tiny.yaml").write_text(SPEC)
    words = (
        "--task", "dense", "--workload", "embedded:v1", "--model", "digits_vit_tiny", "--limit", "24",
        "--specs", tmp_path / "tiny.yaml", "--out", tmp_path / "out",
    )  # fmt: skip
    assert ablate("run", "--serial", *words) == 0
    table = pq.read_table(tmp_path / "out/results.parquet").to_pylist()
    assert sorted(row["restore"] for row in table) == ["last", "last", "zero"]
    assert all(0 < row["miou"] <= 1 and row["task"] == "dense" for row in table)
    capsys.readouterr()
    assert ablate("reproduce", table[0]["key"], "--out", tmp_path / "out") == 0
    assert "the same: " in capsys.readouterr().out
    written = write_analysis(read_results(tmp_path / "out"))
    assert written.figures == () and [path.name for path in written.tables] == ["tiny-patches.csv"]
    page = written.report.read_text()
    told = {row["variant"]: row["miou"] for row in table}
    lead = max(("top-K, last", "top-K, zero"), key=lambda name: told[name])
    assert f"At 80 % of the dense cost: {lead}, mIoU (%) {100 * told[lead]:.1f}; " in page and "swap test" in page
    assert "task dense" in page and "No trial failed" in page
    assert "top-1" not in page.partition('<h2 id="failures">')[0]
    assert ablate("recommend", "--cost", "0.8", *words[:-4], "--out", tmp_path / "found") != 0
    assert "is no mean" in capsys.readouterr().err
