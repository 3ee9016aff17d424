"""The task ``embed``: features beside the dense model's, on models without a head and pictures without classes."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pyarrow as pa
import pytest
import timm
import torch
from PIL import Image
from safetensors.torch import save_file
from timm.models import save_for_hf

from ablations.measure.evaluate import run_trial, try_trial
from ablations.measure.opening import open_context, open_subject
from ablations.models.loading import create_model, head_classes, open_model
from ablations.models.weight_files import ModelError
from ablations.records.schema import IMAGE_SCHEMA, images_as_known
from ablations.run.session import Settings
from ablations.spec.expand import expand
from ablations.spec.model import parse_spec
from ablations.store.store import Store
from ablations.tasks.embed import cosine
from ablations.trial.code import code_of
from ablations.trial.stages import Training
from ablations.trial.staleness import changed_code, reason
from ablations.trial.trial import Trial, trial_from
from ablations.workloads import ImageSource, WorkloadError, open_images
from ablations.workloads.base import NO_LABEL
from analysis.frame import read_results
from analysis.report import write_analysis
from reducers import reduce_tokens
from tests.ablations.code_edits import FIXED, changed, edited

Ablate = Callable[..., int]

EMBED = dataclasses.replace(FIXED, task="embed")
CPU = torch.device("cpu")

SPEC = """\
name: tiny
title: A tiny question
arms:
  - {variant: dense, stages: [{at: 3, stack: [{name: identity}]}]}
  - {variant: ATS, stages: [{at: 3, stack: [{name: ats, budget: {count: auto}}]}], target: [0.8]}
  - {variant: top-K, stages: [{at: 3, stack: [{name: topk, budget: {count: auto}}]}], target: [0.8]}
"""


@pytest.fixture
def spec(tmp_path: Path) -> Path:
    path = tmp_path / "tiny.yaml"
    path.write_text(SPEC)
    return path


@pytest.fixture
def headless(tmp_path: Path) -> Path:
    """Weights of the small embedded model without its classifier."""
    torch.manual_seed(3)
    weights = create_model("digits_vit_tiny").state_dict()
    path = tmp_path / "headless.safetensors"
    save_file({name: value for name, value in weights.items() if not name.startswith("head.")}, path)
    return path


@pytest.fixture
def pictures(tmp_path: Path) -> Path:
    """A folder of pictures, one of them deeper, and no classes."""
    root, random = tmp_path / "pictures", np.random.RandomState(0)
    (root / "more").mkdir(parents=True)
    for number in range(12):
        small = Image.fromarray(random.randint(0, 256, (6, 6, 3)).astype(np.uint8))
        folder = root / "more" if number == 3 else root
        small.resize((100, 98), Image.Resampling.BICUBIC).save(folder / f"{number:02d}.png")
    return root


@pytest.fixture
def tower(tmp_path: Path) -> str:
    """A tiny model of timm's without a classifier, as a folder."""
    torch.manual_seed(1)
    model = timm.create_model("test_vit", num_classes=0, img_size=96)
    save_for_hf(model, tmp_path / "tower", model_args={"img_size": 96}, safe_serialization=True)
    config = json.loads((tmp_path / "tower/config.json").read_text())
    config["pretrained_cfg"] = {**config["pretrained_cfg"], "input_size": [3, 96, 96], "num_classes": 0}
    (tmp_path / "tower/config.json").write_text(json.dumps(config))
    return f"local-dir:{tmp_path / 'tower'}"


# --- keys -------------------------------------------------------------------------------------------------------------


def test_classification_says_nothing_in_a_key_and_another_task_does() -> None:
    assert "task" not in FIXED.description and trial_from(FIXED.description).task == "classify"
    assert trial_from(EMBED.description) == EMBED and json.loads(EMBED.description)["task"] == "embed"
    assert EMBED.key != FIXED.key and EMBED.computation != FIXED.computation
    assert EMBED.random_seed == FIXED.random_seed, "the same tokens are drawn, whatever is asked"


@pytest.mark.parametrize(
    ("file", "old", "new", "whose"),
    [
        ("ablations/tasks/embed.py", "1e-30", "1e-20", {"embed"}),
        ("ablations/records/mean.py", "_HALVINGS = 80", "_HALVINGS = 60", {"embed"}),
        ("ablations/tasks/classify.py", "min(5, ", "min(4, ", {"classify"}),
        ("ablations/records/wilson.py", "Z95 = ", "Z95 = 1 + ", {"classify"}),
        ("ablations/tasks/base.py", "dtype=np.float64", "dtype=np.float32", {"classify", "embed"}),
        ("ablations/measure/metrics.py", "GIGA = 1e9", "GIGA = 1e8", {"classify", "embed"}),
        ("ablations/records/sign_flips.py", "DRAWS = 9999", "DRAWS = 99", set()),
    ],
)
def test_a_key_covers_the_code_of_its_own_task_alone(file: str, old: str, new: str, whose: set[str]) -> None:
    sources = edited(file, (old, new))
    assert {trial.task for trial in (FIXED, EMBED) if changed(sources, trial)} == whose


def test_a_result_of_a_task_that_is_not_there_or_not_asked_is_stale() -> None:
    later = dataclasses.replace(FIXED, task="propagate", code="evaluation=0")
    assert changed_code(later) == "no task 'propagate'"
    assert reason(EMBED, {"result_version": 1, "models": []}) == ("another task (embed)", "`--task embed` asks")
    told = dataclasses.replace(EMBED, code=code_of(EMBED))
    assert changed_code(told) == "" and "task" not in reason(told, {"result_version": 1, "task": "embed"})[0]


def test_images_of_earlier_versions_are_read_and_strange_ones_refused() -> None:
    known = IMAGE_SCHEMA.empty_table()
    earlier = known.drop_columns(["cosine"])
    assert images_as_known(earlier).schema.equals(IMAGE_SCHEMA) and images_as_known(known).equals(known)
    for strange in (known.drop_columns(["loss"]), earlier.append_column("cosin", pa.array([], pa.float64()))):
        with pytest.raises(ValueError, match="no version up to this one"):
            images_as_known(strange)


# --- numbers ----------------------------------------------------------------------------------------------------------


def test_cosine_is_of_directions_alone() -> None:
    one = torch.tensor([[3.0, 4.0], [1.0, 0.0], [0.0, 0.0], [1e-20, 0.0]])
    other = torch.tensor([[6.0, 8.0], [0.0, -2.0], [1.0, 1.0], [-1e20, 0.0]])
    np.testing.assert_allclose(cosine(one, other).numpy(), [1, 0, 0, -1], atol=1e-12)


def test_features_are_compared_with_the_dense_models_image_by_image(headless: Path, tmp_path: Path) -> None:
    """And identity changes nothing, without a head and with one."""
    stages = {"dense": "{name: identity}", "random": "{name: random, budget: {count: 20}}"}
    arms = ", ".join(f"{{variant: {name}, stages: [{{at: 3, stack: [{one}]}}]}}" for name, one in stages.items())
    for weights in (str(headless), "random"):
        subject = open_subject(
            ImageSource(limit=10), "digits_vit_tiny", weights=weights, batch=4, task="embed", cache=tmp_path / "cache"
        )
        context = open_context(subject, CPU, cache=tmp_path / "cache")
        assert context.facts.classes == (10 if weights == "random" else 0)
        dense, reduced = expand(parse_spec(f"{{name: a, title: A, arms: [{arms}]}}"), subject.target)
        row = run_trial(dense, context).row
        assert row["cosine"] == pytest.approx(1, abs=1e-6) and row["cosine_low"] == pytest.approx(1, abs=1e-5)
        assert row["gmacs_mean"] == pytest.approx(row["dense_gmacs"])
        result = run_trial(reduced, context)
        fast = reduce_tokens(context.model, reduced.stages.placement(12)).eval()
        images = subject.workload.batch(0, 10)
        with torch.inference_mode():
            torch.manual_seed(reduced.random_seed)
            seen = fast.features(images)
            plain = context.model.forward_head(context.model.forward_features(images), pre_logits=True)  # type: ignore[operator]
        expected = torch.nn.functional.cosine_similarity(seen, plain, dim=1).numpy()
        np.testing.assert_allclose(result.images["cosine"], expected, atol=1e-5)
        assert result.row["cosine"] == pytest.approx(expected.mean(), abs=1e-5) and expected.std() > 0.001
        assert result.row["top1"] is result.row["agreement"] is result.row["dense_top1"] is None
        assert "correct" not in result.images and result.row["task"] == "embed"


def test_a_trial_of_one_task_is_not_evaluated_in_a_context_of_another(tmp_path: Path) -> None:
    subject = open_subject(ImageSource(limit=4), "digits_vit_tiny", weights="random", task="embed", cache=tmp_path)
    context = open_context(subject, CPU, cache=tmp_path)
    spec = parse_spec("{name: a, title: A, arms: [{variant: v, stages: [{at: 3, stack: [{name: identity}]}]}]}")
    (trial,) = expand(spec, dataclasses.replace(subject.target, task="classify"))
    assert "the task changed after the trial was planned" in try_trial(trial, context).row["error"]
    tuned = dataclasses.replace(trial, task="embed", training=Training('{"epochs":1}'))
    tuned = dataclasses.replace(tuned, code=code_of(tuned))
    assert "finetuning reads labels, and the task embed knows none" in try_trial(tuned, context).row["error"]


# --- whole runs -------------------------------------------------------------------------------------------------------


def check_run(ablate: Ablate, out: Path, capsys: pytest.CaptureFixture[str]) -> Trial:
    """Status, a repetition and the report of a run; one of its trials."""
    rows = Store(out).rows()
    assert len(rows) == 3 and {row["status"] for row in rows.values()} == {"ok"}
    named = {row["variant"]: row for row in rows.values()}
    assert named["dense"]["cosine"] == pytest.approx(1, abs=1e-6) and -1 < named["top-K"]["cosine"] < 1 - 1e-6
    images = Store(out).load_images(named["top-K"]["key"])
    assert images["cosine"].null_count == 0 and images["correct"].null_count == images.num_rows
    assert np.mean(images["cosine"].to_pylist()) == pytest.approx(named["top-K"]["cosine"], rel=1e-12)
    capsys.readouterr()
    assert ablate("status", "--out", out) == 0 and "3 of 3 trials finished" in capsys.readouterr().out
    assert ablate("reproduce", named["ATS"]["key"], "--out", out) == 0, "to the last bit"
    written = write_analysis(read_results(out))
    assert written.figures == () and [path.name for path in written.tables] == ["tiny-features.csv"]
    page = written.report.read_text()
    assert "3 finished trials" in page and "At 80 % of the dense cost" in page and "No trial failed" in page
    assert "top-1" not in page.partition('<h2 id="failures">')[0] and 'class="warn">Spec' not in page
    return trial_from(named["ATS"]["trial"])


@pytest.mark.slow  # it draws scenes to calibrate on
def test_a_model_without_a_head_on_the_embedded_workload(
    ablate: Ablate, tmp_path: Path, spec: Path, headless: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    words = ("run", "--weights", headless, "--specs", spec)
    assert ablate(*words) == 2
    assert ablate(*words, "--task", "embed") == 0
    trial = check_run(ablate, tmp_path / "out", capsys)
    assert trial.task == "embed" and trial.target == 0.8
    assert ablate(*words, "--task", "embed") == 0 and "nothing to compute" in capsys.readouterr().out


def test_pictures_without_classes(
    ablate: Ablate, tmp_path: Path, spec: Path, pictures: Path, tower: str, capsys: pytest.CaptureFixture[str]
) -> None:
    words = ["run", "--workload", "imagefolder", "--data", pictures, "--model", tower, "--weights", "", "--specs", spec]
    assert ablate(*words) == 2
    assert "comes without a classifier" in (said := capsys.readouterr().err) and "TASK=embed" in said
    assert ablate(*words, "--task", "embd") == 2
    assert "unknown task 'embd': did you mean embed?" in capsys.readouterr().err
    assert ablate(*words, "--task", "embed", "--labels", "order") == 2
    assert "the task embed reads no labels: leave LABELS=order" in capsys.readouterr().err
    assert ablate(*words, "--task", "embed", "--limit", "100") == 0
    trial = check_run(ablate, tmp_path / "out", capsys)
    run = Store(tmp_path / "out").read_json("run.json")
    assert run["classes"] == 0 and run["task"] == "embed" and run["images_account"]["used"] == 12
    assert trial.images == 9, "and 3 calibrate"


def test_a_folder_without_classes_is_refused_with_the_remedy(pictures: Path) -> None:
    flat = pictures / "more"
    with pytest.raises(WorkloadError, match=r"holds images but no class folders: .*TASK=embed"):
        open_images(ImageSource("imagefolder", str(flat)), "test_vit")
    workload = open_images(ImageSource("imagefolder", str(pictures)), "test_vit", labelled=False)
    assert len(workload) == 12 and workload.classes == 0 and set(workload.labels.tolist()) == {NO_LABEL}
    assert "more/03.png" in workload.ids


def test_of_splits_the_one_to_evaluate_is_taken_whatever_lies_in_it(pictures: Path, tmp_path: Path) -> None:
    root = tmp_path / "splits"
    root.mkdir()
    pictures.rename(root / "val")
    (root / "train").mkdir()
    Image.new("RGB", (96, 96), "red").save(root / "train" / "red.png")
    source = ImageSource("imagefolder", str(root))
    assert len(open_images(source, "test_vit", labelled=False)) == 12
    Image.new("RGB", (96, 96), "blue").save(root / "blue.png")
    assert len(open_images(source, "test_vit", labelled=False)) == 14, "then they are no splits"


def test_a_data_set_by_name_is_read_without_its_targets(tmp_path: Path) -> None:
    source = ImageSource("torchvision:FakeData", str(tmp_path), limit=3)
    plain = open_images(source, "test_vit", labelled=False, cache=tmp_path)
    assert plain.classes == 0 and plain.labels.tolist() == [NO_LABEL] * 3
    labelled = open_images(source, "test_vit", weights="random", cache=tmp_path)
    assert labelled.classes == 10 and labelled.labels.min() >= 0
    np.testing.assert_array_equal(plain.pixels, labelled.pixels)


def test_heads_are_asked_for_where_classes_are(tmp_path: Path, headless: Path) -> None:
    with pytest.raises(ModelError, match=r"comes without a classifier.*TASK=embed"):
        head_classes("vit_small_patch14_dinov2", weights=None)
    with pytest.raises(ModelError, match=r"2 missing .*They hold no classifier: .*TASK=embed"):
        open_model("digits_vit_tiny", weights=str(headless), workload_name="embedded")
    assert head_classes("vit_small_patch14_dinov2", weights=None, headless=True) == 0
    assert head_classes("test_vit", weights=None, headless=True) == 1000
    assert head_classes("digits_vit_tiny", weights=str(headless), headless=True) == 0
    loaded = open_model("digits_vit_tiny", weights=str(headless), workload_name="embedded", classes=10, headless=True)
    assert loaded.model.num_classes == 0


def test_finetuning_is_refused_by_name(tmp_path: Path, ablate: Ablate, capsys: pytest.CaptureFixture[str]) -> None:
    path = tmp_path / "tuned.yaml"
    path.write_text(
        "{name: tuned, title: T, arms: [{variant: v, training: {epochs: 1}, "
        "stages: [{at: 3, stack: [{name: topk, budget: {count: 8}}]}]}]}"
    )
    assert ablate("run", "--task", "embed", "--specs", path) == 2
    assert "is for the task classify alone" in (said := capsys.readouterr().err) and "TASK=embed" in said


def test_settings_know_their_task() -> None:
    assert Settings().task == "classify" and Settings(task="embed").task == "embed"
    with pytest.raises(ValueError, match="choose classify or dense or embed"):
        Settings(task="read")
