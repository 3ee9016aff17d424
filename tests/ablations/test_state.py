"""Watching a run from its files: how far it is, what failed, what is stale and why."""

from __future__ import annotations

import dataclasses
import os
import re
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from contextlib import ExitStack
from pathlib import Path

import pytest

from ablations.records.files import read_json, write_json
from ablations.records.names import LIVE
from ablations.spec.expand import expand
from ablations.spec.model import parse_spec
from ablations.store import status as state
from ablations.store.status import Signs, lines, look, pace, watch
from ablations.store.store import Store
from ablations.trial import code as code_version
from ablations.trial.target import Target
from ablations.trial.trial import Trial, failed
from tests.ablations.results import finished
from tests.ablations.runs import ROOT, SPEC, TINY, launch, one_thread, wait_until

Ablate = Callable[..., int]


@pytest.fixture
def trials(target: Target) -> list[Trial]:
    return expand(parse_spec(SPEC), target)


@pytest.fixture
def store(tmp_path: Path, trials: list[Trial], target: Target) -> Store:
    """A run of four trials on record, none of them finished."""
    store = Store(tmp_path / "out").create()
    facts = target.facts
    model = {"model": facts.name, "weights_digest": facts.weights_digest, "data_digest": target.data_digest}
    store.write_json(
        "run.json",
        {
            "model": facts.name, "weights": "random", "images": 10, "workload": "embedded", "batch": target.batch,
            "result_version": 1, "models": [model],
            "specs": {"tiny": {"title": "Tiny", "trials": [trial.key for trial in trials]}},
        },
    )  # fmt: skip
    return store


def shown(store: Store) -> str:
    return "\n".join(lines(look(store)))


def numbers(store: Store) -> list[int]:
    """planned, finished, failed, waiting, stale of all specs."""
    (line,) = (line for line in shown(store).splitlines() if line.startswith("all "))
    return [int(number) for number in line.split()[1:]]


def test_trials_are_counted_by_state_and_failures_told(store: Store, trials: list[Trial], target: Target) -> None:
    store.save(finished(trials[0], target.facts))
    store.save(failed(trials[1], target.facts, "no memory left"))
    assert numbers(store) == [4, 1, 1, 2, 0]
    text = shown(store)
    assert "1 of 4 trials finished (25 %); no run is at work" in text
    assert f"{trials[1].key}  tiny: ATS (x = {trials[1].x:g}): no memory left" in text
    assert "stale" in text.splitlines()[2] and "in no figure" not in text


def test_what_is_stale_is_told_with_the_reason(store: Store, trials: list[Trial], target: Target) -> None:
    old = {
        "other weights": dataclasses.replace(trials[0], weights_digest="0" * 64),
        "other images": dataclasses.replace(trials[0], data_digest="0" * 64),
        "another model (other)": dataclasses.replace(trials[0], model="other"),
        "another version of the code (evaluation)": dataclasses.replace(trials[0], code="evaluation=0123"),
        "another batch (77)": dataclasses.replace(trials[0], batch=77),
        "no longer asked for by a spec": dataclasses.replace(trials[0], variant="gone"),
    }
    for trial in old.values():
        store.save(finished(trial, target.facts))
    assert numbers(store) == [4, 0, 0, 4, 6]
    text = shown(store)
    assert "\nstale: 6 in no figure\n" in text
    for reason in old:
        assert re.search(rf"^ +1  {re.escape(reason)}[^:]*: .+ asks? for them$", text, re.MULTILINE), reason


def test_rows_that_name_no_code_are_stale(store: Store, trials: list[Trial], target: Target) -> None:
    result = finished(dataclasses.replace(trials[0], variant="old"), target.facts, trial=None, code=None)
    store.save(result)
    last = state.lines(look(store))[-1].strip()
    assert last == "1  written before results said which code they come from: no run asks for them"


def test_results_of_other_code_are_announced_before_they_are_computed_again(
    store: Store, trials: list[Trial], target: Target, monkeypatch: pytest.MonkeyPatch
) -> None:
    store.save(finished(trials[0], target.facts))
    assert look(store).stale == []
    monkeypatch.setattr("ablations.trial.staleness.code_of", lambda trial: "evaluation=new")
    assert shown(store).endswith(
        "stale: 1 of the plan, until the next run\n"
        "       1  another version of the code (evaluation): the next run computes 1 again"
    )


def test_what_is_stale_is_counted_once_whether_the_plan_asks_for_it_or_not(
    store: Store, trials: list[Trial], target: Target
) -> None:
    """Each result under one reason, each reason on one line: parts of the code that changed, with how many each."""
    one, both = "evaluation=0123", "evaluation=0123 calibration=0123"
    elsewhere = dataclasses.replace(trials[0], code=both, model="other")  # other code, whatever else it is
    for trial in (dataclasses.replace(trials[1], code=one), elsewhere, dataclasses.replace(trials[0], batch=77)):
        store.save(finished(trial, target.facts))
    for trial in trials[1:3]:  # of the plan, computed before the code changed
        store.save(finished(trial, target.facts, trial=dataclasses.replace(trial, code=both).description))
    text = shown(store)
    assert text.endswith(
        "stale: 3 in no figure, 2 of the plan, until the next run\n"
        "       4  another version of the code (calibration 3, evaluation 4): the next run computes 2 again; "
        "that code alone asks for the others\n"
        "       1  another batch (77): `--batch 77` asks for them"
    )
    assert numbers(store) == [4, 2, 0, 2, 3]


def test_a_run_after_a_change_in_the_code_computes_again_what_uses_it(
    ablate: Ablate, spec_path: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Only the trials of the method that changed; rows of both versions are never in one table."""
    other = tmp_path / "other.yaml"
    other.write_text(spec_path.read_text().replace("name: tiny", "name: other"))
    assert ablate("run", "--specs", spec_path) == 0
    assert ablate("run", "--specs", other) == 0
    known = code_version._part
    monkeypatch.setattr(
        code_version,
        "_part",
        lambda part, methods, beside: known(part, methods, beside) + ("x" if "ats" in methods else ""),
    )
    code_version._code.cache_clear()
    try:
        capsys.readouterr()
        assert ablate("run", "--specs", spec_path) == 0
        assert "\n2 to compute" in capsys.readouterr().out
        assert list(read_json(tmp_path / "out" / "run.json")["specs"]) == ["tiny"], "the rows of the other are older"
        assert ablate("status", tmp_path / "out") == 0
        text = capsys.readouterr().out
        assert re.search(r"^all +4 +4 +0 +0 +6$", text, re.MULTILINE)
        assert "4  no longer asked for by a spec" not in text and "another version of the code (evaluation)" in text
    finally:
        code_version._code.cache_clear()


def test_a_run_at_work_is_seen_with_what_it_tells(store: Store, trials: list[Trial], target: Target) -> None:
    store.save(finished(trials[0], target.facts))
    store.write_json(LIVE, {"running": ["a", "b"], "seconds_left": 95.0, "retried": 1})
    assert "no run is at work" in shown(store), "what a run that has ended told is old"
    with store.lock():
        assert "a run is at work; 2 running; 1 tried again; about 1 min 35 s left" in shown(store)
        store.write_json(LIVE, {})
        store.save(finished(trials[1], target.facts))
        times = sorted((store.out / "trials").iterdir())
        os.utime(times[0], (1000, 1000))
        os.utime(times[1], (1010, 1010))
        assert "about 20 s left" in shown(store), "two more at one each ten seconds"


def test_the_pace_needs_no_clock_of_this_machine() -> None:
    assert pace([10**9 * second for second in (4, 0, 8)]) == pytest.approx(0.25)
    assert pace([5]) is None and pace([5, 5]) is None and pace([]) is None
    assert pace([0, *(10**11 + 10**9 * second for second in range(100))]) == pytest.approx(1.0), "of late"


def test_watching_ends_when_all_is_finished(store: Store, trials: list[Trial], target: Target) -> None:
    seen = []
    with ExitStack() as run:
        run.enter_context(store.lock())

        def wait(seconds: float) -> None:
            assert seconds == 7.0
            store.save(finished(trials[len(seen) - 1], target.facts))
            if len(seen) == len(trials):
                run.close()

        for text in watch(store, every=7.0, sleep=wait):
            seen.append(text[1].split()[0])
    assert seen == ["0", "1", "2", "3", "4"]


def test_watching_ends_when_the_run_does_whatever_is_left(store: Store, trials: list[Trial], target: Target) -> None:
    store.save(failed(trials[0], target.facts, "no memory"))
    seen = list(watch(store, every=1.0, sleep=lambda seconds: None))
    assert len(seen) == 2 and "no run is at work" in seen[-1][1], "interrupted, or with failures: nobody goes on"


def test_a_run_that_cannot_lock_its_place_lives_as_long_as_its_sign_changes(store: Store) -> None:
    signs = Signs(store, patience=0.2)
    assert signs.running() is False
    store.write_json("lease.json", {"run": "a", "count": 1})
    assert signs.running() is None and "or died there" in shown(store), "one look tells nothing"
    store.write_json("lease.json", {"run": "a", "count": 2})
    assert signs.running() is True
    time.sleep(0.3)
    assert signs.running() is False, "no sign for a while"
    assert len(list(watch(store, every=0.01, sleep=lambda seconds: None, times=3))) == 3


@pytest.mark.slow
def test_another_terminal_follows_a_run(spec_path: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    run = launch("run", "--serial", "--out", out, *TINY, "--specs", spec_path)
    wait_until((out / "run.json").exists, run)
    looked = subprocess.run(
        [sys.executable, "-m", "ablations", "status", str(out), "--watch", "1"],
        cwd=ROOT, env=one_thread(), capture_output=True, text=True, timeout=180, check=False,
    )  # fmt: skip
    printed = run.communicate(timeout=120)[0]
    assert run.returncode == 0, printed
    assert looked.returncode == 0, looked.stderr
    assert "4 of 4 trials finished (100 %)" in looked.stdout and "\x1b" not in looked.stdout


def test_a_folder_without_a_run_is_named(tmp_path: Path, ablate: Ablate, capsys: pytest.CaptureFixture[str]) -> None:
    write_json(tmp_path / "run.json", {"specs": []})
    assert ablate("status", tmp_path) == 2
    assert "holds no run.json" in capsys.readouterr().err
    assert ablate("status", tmp_path, "--watch", "0.1") == 2
    assert "give 1 second or more" in capsys.readouterr().err


def test_a_status_does_not_keep_a_run_out(store: Store) -> None:
    """Looking takes the lock for a moment, shared: a run that starts just then must not be refused."""
    stop = threading.Event()
    refused = []

    def look_on() -> None:
        while not stop.is_set():
            Signs(store).running()

    thread = threading.Thread(target=look_on)
    thread.start()
    try:
        for _ in range(200):
            try:
                with Store(store.out).lock():
                    pass
            except OSError as error:
                refused.append(error)
    finally:
        stop.set()
        thread.join()
    assert refused == []
