"""The command line: what it prints, what it leaves, and how it ends."""

from __future__ import annotations

import json
import re
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pyarrow.parquet as pq
import pytest
import yaml
from PIL import Image

from ablations.cli.main import COMMANDS, main
from ablations.run.record import sample_rows
from ablations.spec.arms import SPECS
from ablations.workloads import open_workload
from reducers import TokenReducer
from reducers import registry as known_reducers

Ablate = Callable[..., int]


def rows(out: Path) -> dict[str, dict[str, object]]:
    return {row["key"]: row for row in pq.read_table(out / "results.parquet").to_pylist()}


def test_a_run_leaves_results_record_and_samples(ablate: Ablate, spec_path: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    assert ablate("run", "--specs", spec_path) == 0
    found = rows(out)
    assert len(found) == 4 and {row["status"] for row in found.values()} == {"ok"}
    run = json.loads((out / "run.json").read_text())
    assert run["specs"]["tiny"]["answers"] == "ranking"
    assert run["specs"]["tiny"]["title"] == "A tiny question" and run["specs"]["tiny"]["trials"] == list(found)
    assert (run["workload"], run["model"], run["weights"]) == ("embedded", "digits_vit_tiny", "random")
    assert run["images"] == 10
    assert run["skipped"] == [] and run["grid"] == [8, 8] and "--limit 10" in run["command"]
    for key in found:
        assert pq.read_metadata(out / "images" / f"{key}.parquet").num_rows == 10
    samples = json.loads((out / "samples" / "index.json").read_text())
    assert samples["grid"] == [8, 8] and len(samples["images"]) == 8
    for entry in samples["images"]:
        with Image.open(out / "samples" / entry["file"]) as picture:
            assert (picture.mode, picture.size) == ("RGB", (64, 64))
        assert entry["image"] == f"pairs/{entry['row']}"
    assert not (out / "ray").exists()


def test_the_second_run_computes_nothing(
    ablate: Ablate, spec_path: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert ablate("run", "--specs", spec_path) == 0
    before = {path: path.stat().st_mtime_ns for path in (tmp_path / "out" / "trials").iterdir()}
    capsys.readouterr()
    assert ablate("run", "--specs", spec_path) == 0
    assert "nothing to compute" in capsys.readouterr().out
    assert {path: path.stat().st_mtime_ns for path in (tmp_path / "out" / "trials").iterdir()} == before


def test_a_changed_spec_computes_only_what_is_new(
    ablate: Ablate, spec_path: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert ablate("run", "--specs", spec_path) == 0
    spec_path.write_text(spec_path.read_text().replace("[48, 96]", "[48, 128]"))
    capsys.readouterr()
    assert ablate("run", "--specs", spec_path) == 0
    assert "\n2 to compute" in capsys.readouterr().out
    assert ablate("status", tmp_path / "out") == 0
    (sums,) = (line for line in capsys.readouterr().out.splitlines() if line.startswith("all "))
    assert sums.split() == ["all", "4", "4", "0", "0", "2"]
    assert {row["x"] for row in rows(tmp_path / "out").values()} == {16.0, 42.0}


def test_specs_run_one_after_the_other_share_a_folder_but_not_with_another_model(
    ablate: Ablate, spec_path: Path, tmp_path: Path
) -> None:
    other = tmp_path / "other.yaml"
    other.write_text(spec_path.read_text().replace("name: tiny", "name: other"))
    assert ablate("run", "--specs", spec_path) == 0
    assert ablate("run", "--specs", other) == 0
    assert [row["spec"] for row in rows(tmp_path / "out").values()] == ["tiny"] * 4 + ["other"] * 4
    assert ablate("run", "--specs", other, "--batch", "5") == 0
    assert [row["spec"] for row in rows(tmp_path / "out").values()] == ["other"] * 4


def test_trials_that_ask_the_same_are_computed_once(
    ablate: Ablate, spec_path: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    other = tmp_path / "other.yaml"
    other.write_text(spec_path.read_text().replace("name: tiny", "name: other"))
    assert ablate("run", "--specs", f"{spec_path} {other}") == 0
    assert "8 to compute (4 computations" in capsys.readouterr().out
    found = list(rows(tmp_path / "out").values())
    assert [row["top1"] for row in found[:4]] == [row["top1"] for row in found[4:]]
    assert len({row["key"] for row in found}) == 8


def test_a_failing_trial_is_recorded_and_the_others_finish(
    ablate: Ablate, spec_path: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    class Refuses(TokenReducer):
        """A reducer that works nowhere."""

        name = "refuses"

        def __init__(self) -> None:
            super().__init__()

        def decide(self, signals: object, state: object) -> None:
            raise RuntimeError("this reducer refuses block 3")

    monkeypatch.setitem(known_reducers._METHODS, "refuses", Refuses)
    with spec_path.open("a") as file:
        file.write("  - {variant: broken, vary: {}, stages: [{at: 3, stack: [{name: refuses}]}]}\n")
    assert ablate("run", "--specs", spec_path) == 1
    printed = capsys.readouterr()
    assert "1 trials failed" in printed.err and "RuntimeError: this reducer refuses block 3" in printed.err
    found = list(rows(tmp_path / "out").values())
    assert [row["status"] for row in found] == ["ok"] * 4 + ["failed"]
    assert found[4]["error"] == "RuntimeError: this reducer refuses block 3" and found[4]["top1"] is None

    monkeypatch.setattr(Refuses, "decide", lambda self, signals, state: None)  # the reducer is mended
    assert ablate("run", "--specs", spec_path) == 0
    assert "\n1 to compute" in capsys.readouterr().out
    assert [row["status"] for row in rows(tmp_path / "out").values()] == ["ok"] * 5


def test_a_dry_run_computes_and_records_nothing(ablate: Ablate, spec_path: Path, tmp_path: Path) -> None:
    assert ablate("run", "--specs", spec_path, "--dry-run") == 0
    assert not (tmp_path / "out" / "run.json").exists() and not any((tmp_path / "out" / "trials").iterdir())


@pytest.mark.parametrize(
    ("arguments", "expected"),
    [
        (["run", "--specs", "k_valus"], "did you mean 'k_values'"),
        (["run", "--specs", "k_values", "--model", "deit_tinny"], "did you mean"),
        (["run", "--specs", "k_values", "--workload", "imagefoldr"], "imagefolder"),
        (["run", "--specs", "k_values", "--weights", "missing.safetensors"], "missing.safetensors"),
        (["run", "--specs", "k_values", "--limit", "0"], "--limit 0"),
        (["run", "--specs", "k_values", "--batch", "-2"], "--batch -2"),
        (["run", "--specs", "k_values", "--workers", "0"], "--workers 0"),
        (["run", "--specs", "k_values", "--out", "/proc/results"], "cannot be written to /proc/results"),
        (["validate", "missing.yaml"], "missing.yaml"),
        (["validate", "--model", "resnet18", "k_values"], "resnet18"),
        (["status", "/nowhere"], "no run.json"),
    ],
)
def test_bad_input_ends_with_one_message_and_status_2(
    arguments: list[str], expected: str, ablate: Ablate, capsys: pytest.CaptureFixture[str]
) -> None:
    assert ablate(*arguments) == 2
    printed = capsys.readouterr().err
    assert "error: " in printed and expected in printed and "Traceback" not in printed


def test_list_and_validate_show_the_plan(ablate: Ablate, capsys: pytest.CaptureFixture[str]) -> None:
    assert ablate("list", "--trials") == 0
    listed = capsys.readouterr().out
    count = re.search(r"^k_values +(\d+) +always +Effect of K", listed, re.MULTILINE)
    assert count is not None
    numbers = dict.fromkeys(("always", "on clips", "if named"), 0)
    for _, trials, runs in re.findall(r"^(\w+) +(\d+) +(always|on clips|if named) ", listed, re.MULTILINE):
        numbers[runs] += int(trials)
    always, clips, others = numbers.values()
    said = f"\n{always} trials where no spec is named ({clips} on clips), {others} in the others\n"
    assert said in listed and min(numbers.values()) > 0
    assert ablate("validate", "k_values") == 0
    shown = capsys.readouterr().out
    assert f"k_values: Effect of K ({count[1]} trials)" in shown and "K = 31" in shown and "nothing was run" in shown
    assert ablate("list", "--reducers") == 0
    table = capsys.readouterr().out
    for name in ("identity", "random", "topk", "ats", "evit", "tome"):
        assert f"\n{name} " in table
    count = re.search(r"^(\d+) methods; a page on each: docs/methods", table, re.MULTILINE)
    assert count is not None and int(count[1]) == len(known_reducers.available()) >= 26
    header = table.splitlines()[0].split()
    assert header[2:6] == ["count", "weights", "stacks", "site"]
    assert all(len(line) <= 220 for line in table.splitlines())


def test_list_shows_every_shipped_spec_and_marks_those_that_run_only_where_they_are_named(
    ablate: Ablate, capsys: pytest.CaptureFixture[str]
) -> None:
    assert ablate("list") == 0
    listed = capsys.readouterr().out
    marks = dict(re.findall(r"^(\w+) +(always|if named|on clips) ", listed, re.MULTILINE))
    shipped = {path.stem: yaml.safe_load(path.read_text()) for path in SPECS.glob("*.yaml")}
    said = {True: "always", False: "if named", "clips": "on clips"}
    assert marks == {name: said[spec.get("default", True)] for name, spec in shipped.items()}
    words = " ".join(listed.split())
    for spec in shipped.values():
        assert spec["title"] in words and spec["question"].split()[0] in words
    assert "How many tokens does an image keep" in words
    named = sum(mark == "if named" for mark in marks.values())
    assert f"{len(marks)} specs; {named} of them run only where --specs names them" in words and named


@pytest.mark.parametrize("command", [[], *([name] for name in COMMANDS)])
def test_help_teaches_with_examples(command: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as end:
        main([*command, "--help"])
    assert end.value.code == 0
    printed = capsys.readouterr().out
    assert printed.startswith(" ".join(["usage: sievit", *command]))
    assert "\nexamples:\n  " in printed and "\nexit status: 0 " in printed
    (examples,) = re.findall(r"\nexamples:\n((?:  .*\n)+)", printed)
    assert f"  {' '.join(['sievit', *command])}" in examples
    assert "python -m ablations " not in printed


def test_an_unknown_command_is_refused() -> None:
    with pytest.raises(SystemExit) as end:
        main(["explode"])
    assert end.value.code == 2


def test_samples_go_from_plain_to_busy() -> None:
    workload = open_workload("embedded", data=None, model="digits_vit_tiny", limit=60, strict=False, cache=None)
    assert workload.clutter is not None
    clutter = workload.clutter[sample_rows(workload)]
    assert len(clutter) == 8 and list(clutter) == sorted(clutter)
    assert list(clutter[:2]) == sorted(workload.clutter)[:2] and list(clutter[-2:]) == sorted(workload.clutter)[-2:]


def test_images_are_skipped_and_reported_or_refused(
    ablate: Ablate, spec_path: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = tmp_path / "images"
    for wnid in ("n01440764", "n01484850"):
        (folder / wnid).mkdir(parents=True)
        for number in range(3):
            noise = np.random.default_rng([number, *wnid.encode()]).integers(0, 255, (160, 160, 3)).astype(np.uint8)
            Image.fromarray(noise).save(folder / wnid / f"good{number}.png")
    (folder / "n01440764" / "broken.png").write_bytes(b"not an image")
    options = ["--specs", spec_path, "--workload", "imagefolder", "--data", folder, "--model", "test_vit"]
    spec_path.write_text(spec_path.read_text().replace("[48, 96]", "[48]").replace("at: 3", "at: 1"))
    assert ablate("run", *options) == 0
    run = json.loads((tmp_path / "out" / "run.json").read_text())
    assert (run["images"], run["calibration_images"]) == (5, 1), "six that can be read, one of them to calibrate on"
    assert len(run["skipped"]) == 1 and "broken.png" in run["skipped"][0][0]
    assert run["images_account"]["skipped"] == {"not an image, or of an unknown format": 1}
    assert pq.read_table(tmp_path / "out" / "results.parquet")["coverage"].null_count == 2
    assert ablate("run", *options, "--strict") == 2
    assert "broken.png" in capsys.readouterr().err


@pytest.mark.parametrize(("option", "value"), [("--time-limit", "-5"), ("--workers", "0")])
def test_settings_that_mean_nothing_are_refused_before_anything_is_opened(
    option: str, value: str, ablate: Callable[..., int], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert ablate("run", option, value) == 2
    assert f"error: {option} {value}: " in capsys.readouterr().err and not (tmp_path / "out").exists()
