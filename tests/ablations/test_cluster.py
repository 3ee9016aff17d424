"""Runs on a Ray cluster of several nodes, all of them on this machine: nodes that are lost, files, code, whole GPUs."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
import threading
from collections.abc import Iterator
from datetime import UTC, datetime, timedelta
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import pytest

from ablations.run.ray.cluster import dependencies, runtime_environment
from ablations.run.ray.worker import NodeError, check_node
from ablations.store.store import Store
from tests.ablations.cluster import LocalCluster
from tests.ablations.runs import (
    LONGER,
    PATIENCE,
    ROOT,
    TINY,
    assert_same_results,
    environment,
    fingerprints,
    grid,
    launch,
    run,
    serial,
    stored,
    wait_until,
)
from tests.s3 import local_s3

DRIVER = """
import json, sys
from pathlib import Path
from ablations.run.contexts import save_context
from ablations.run.progress import RunProgress
from ablations.run.ray.driver import run_on_ray
from ablations.run.serial import timed_trials
from ablations.run.session import Settings, open_session

out, spec, limit = sys.argv[1:]
session = open_session(
    Settings(Path(out), model="digits_vit_tiny", weights="random", limit=int(limit), batch=60, specs=(spec,))
)
work = session.computations(session.all_trials)
timed = timed_trials(work)
progress = RunProgress(work, timed=timed, store=session.store)
with progress:
    places = run_on_ray(
        work, contexts={name: save_context(session, name) for name in session.subjects},
        facts=session.all_facts, store=session.store, progress=progress, timed=timed, time_limit=200.0,
    )
print(json.dumps({"places": places, "finished": progress.finished, "failures": progress.failures}))
"""


def drive(out: Path, spec: Path, env: dict[str, str], *, limit: int = 240) -> dict[str, Any]:
    """Run everything of a spec on Ray; where each job ran."""
    done = subprocess.run(
        [sys.executable, "-c", DRIVER, out, spec, str(limit)],
        cwd=ROOT, env=env, capture_output=True, text=True, timeout=2 * PATIENCE, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    found: dict[str, Any] = json.loads(done.stdout.splitlines()[-1])
    return found


def any_from_the_future(out: Path) -> bool:
    """Whether a result says that it was made more than an hour from now."""
    soon = datetime.now(UTC) + timedelta(hours=1)
    return any(datetime.fromisoformat(row["created"]) > soon for row in Store(out).rows().values())


@pytest.fixture
def cluster() -> Iterator[LocalCluster]:
    with LocalCluster() as running:
        yield running


@pytest.mark.slow
def test_a_run_on_three_nodes_that_loses_one_finds_what_a_serial_run_finds(
    cluster: LocalCluster, tmp_path: Path
) -> None:
    """One node's clock is two hours slow, another's fast; one is lost while it computes, another joins later."""
    out, spec = tmp_path / "out", grid(tmp_path, 40)
    cluster.add("slow clock", SIEVIT_TEST_CLOCK="-7200")
    cluster.add("lost", SIEVIT_TEST_CLOCK="7200")
    process = launch("run", "--out", out, *TINY, *LONGER, "--specs", spec, env=cluster.environment())
    wait_until(lambda: stored(out) >= 4 and any_from_the_future(out), process)  # the one to be lost is at work
    kept = Store(out).finished()
    before = fingerprints(out, kept)
    cluster.lose("lost")
    cluster.add("new")
    printed = process.communicate(timeout=2 * PATIENCE)[0]
    assert process.returncode == 0, printed
    assert re.search("its node was lost.*: its trials are tried again", printed)
    assert 4 <= len(kept) < 40, "it was lost in the middle"
    rows = serial(tmp_path / "serial", spec, *LONGER)
    assert Store(out).finished() == set(rows) and len(rows) == 40
    assert_same_results(out, tmp_path / "serial", rows)
    assert fingerprints(out, kept) == before, "what was finished was not computed again"


@pytest.mark.slow
def test_nodes_fetch_each_file_once_and_run_the_code_that_was_shipped(cluster: LocalCluster, tmp_path: Path) -> None:
    """As if they saw none of the driver's files: each node has a cache of its own, shared by its workers."""
    spec = grid(tmp_path, 48)
    for name in ("one", "two"):
        cluster.add(name, cpus=2, SIEVIT_CACHE=str(tmp_path / name))
    found = drive(tmp_path / "out", spec, cluster.environment(SIEVIT_FETCH="always"))
    assert found["finished"] == 48 and not found["failures"]
    assert len({place["node"] for place in found["places"]}) == 2
    assert len({place["process"] for place in found["places"]}) > 2
    for name in ("one", "two"):
        fetched = [path for path in (tmp_path / name / "fetched").iterdir() if path.suffix != ".lock"]
        assert sorted({path.suffix for path in fetched}) == [".json", ".npy", ".npz"]
        assert len(fetched) == len({path.read_bytes() for path in fetched}), "none of them twice"
    times = {path: path.stat().st_mtime_ns for path in tmp_path.glob("*/fetched/*.npy")}
    drive(tmp_path / "again", spec, cluster.environment(SIEVIT_FETCH="always"))
    assert {path: path.stat().st_mtime_ns for path in times} == times, "a second run finds them there"
    for place in found["places"]:
        assert "py_modules_files" in place["code"] and not Path(place["code"]).is_relative_to(ROOT)
    serial(tmp_path / "serial", spec, *LONGER)
    assert_same_results(tmp_path / "out", tmp_path / "serial", Store(tmp_path / "serial").finished())


MIXED = """\
name: mixed
title: Trials that share a GPU, trainings and timings that want one whole
base:
  stages: [{at: 3, stack: [{name: topk, budget: {count: $K}}]}]
  x: K
arms:
  - {variant: shared, vary: {K: [8, 12, 16, 20, 24, 28, 32, 36, 40, 44, 48, 52]}}
  - {variant: trained, vary: {K: [16, 32]}, training: {epochs: 2, images: 960, batch: 32, holdout: 0}}
  - {variant: timed, vary: {K: [16, 32]}, measure: speed, batch: [4]}
"""


@pytest.mark.slow
def test_trainings_and_timings_have_a_gpu_to_themselves_beside_trials_that_share_one(
    cluster: LocalCluster, tmp_path: Path
) -> None:
    """The GPUs are made up; what Ray assigns, and when, is not."""
    spec = tmp_path / "mixed.yaml"
    spec.write_text(MIXED)
    cluster.add("cpus only", cpus=4)
    cluster.add("gpus", cpus=4, gpus=2)
    found = drive(tmp_path / "out", spec, cluster.environment())
    assert found["finished"] == 16 and not found["failures"], found["failures"]
    places = found["places"]
    assert len({place["node"] for place in places}) == 1, "the node without a GPU computes nothing"
    for place in places:
        assert len(place["gpus"]) == 1 and place["taken"]["GPU"] == (1.0 if place["whole"] else 0.25)
    assert sum(place["whole"] for place in places) >= 3 and sum(place["timed"] for place in places) == 2
    for place in places:
        beside = [
            other for other in places
            if other is not place and other["gpus"] == place["gpus"]
            and other["began"] < place["ended"] and place["began"] < other["ended"]
        ]  # fmt: skip
        if place["whole"]:
            assert not beside, "a whole GPU is shared with nobody"
        running = [other for other in beside if other["began"] <= place["began"] < other["ended"]]
        assert len(running) <= 3, "four at most on one GPU"
    assert any(
        one["began"] < whole["ended"] and whole["began"] < one["ended"]
        for whole in places if whole["whole"] and not whole["timed"] for one in places if not one["whole"]
    ), "while one GPU trains, trials share the other"  # fmt: skip
    rows = Store(tmp_path / "out").rows().values()
    assert {row["status"] for row in rows} == {"ok"}
    assert all((row["images_per_second"] is not None) == (row["variant"] == "timed") for row in rows)


@pytest.mark.slow
def test_a_cluster_that_has_no_node_yet_is_waited_for_and_asked_for_what_it_then_has(
    cluster: LocalCluster, tmp_path: Path
) -> None:
    late = threading.Timer(20.0, lambda: cluster.add("late", cpus=2, gpus=1))
    late.start()
    found = drive(tmp_path / "out", grid(tmp_path, 8), cluster.environment())
    late.join()
    assert found["finished"] == 8 and not found["failures"]
    assert all(place["taken"]["GPU"] == 0.25 for place in found["places"])


HANGS = """\
name: hangs
title: A trial that hangs
arms: [{variant: hang, stages: [{at: 3, stack: [{name: faulty, how: hang}]}]}]
"""


@pytest.mark.slow
def test_where_a_trial_hung_is_told_though_its_node_alone_knows(cluster: LocalCluster, tmp_path: Path) -> None:
    """Results go to an object store, so what the worker leaves behind lies on the disk of its node."""
    spec = tmp_path / "hangs.yaml"
    spec.write_text(HANGS)
    with local_s3() as bucket:
        keys = {name: value for name, value in os.environ.items() if name.startswith("AWS_")}
        cluster.add("node", SIEVIT_CACHE=str(tmp_path / "node"), **keys)
        out, env = f"{bucket}/run", cluster.environment(SIEVIT_CACHE=str(tmp_path / "driver"))
        status, printed = run("run", "--out", out, *TINY, "--time-limit", "6", "--specs", spec, env=env)
        assert status == 1, printed
        (row,) = Store(out).rows().values()
        assert "no progress for 6 s, the time limit: it stood at faulty.py" in row["error"], row["error"]
        assert "lost: no progress for 6 s" in (Store(out).read_log(row["key"]) or "")


@pytest.mark.slow
def test_what_listens_and_is_no_cluster_is_refused(tmp_path: Path) -> None:
    with ThreadingHTTPServer(("127.0.0.1", 0), BaseHTTPRequestHandler) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        env = environment(RAY_ADDRESS=f"127.0.0.1:{server.server_port}")
        status, printed = run("run", "--out", tmp_path / "out", *TINY, "--specs", grid(tmp_path, 2), env=env)
        server.shutdown()
    assert status == 2 and "is no Ray cluster in good health" in printed, printed


def test_a_node_that_does_not_see_the_results_or_has_other_versions_is_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from ablations.measure.context import versions
    from ablations.run.ray import worker as runner_worker

    monkeypatch.setattr(runner_worker, "_PATIENCE", 0.0)
    monkeypatch.setattr(runner_worker.time, "sleep", lambda seconds: None)
    store = Store(tmp_path / "out").create()
    run = {"joined": True, "versions": versions(), "token": str(tmp_path / "token")}
    with pytest.raises(NodeError, match="does not see .*out: OUT must be on a disk that all nodes share"):
        check_node(run, store)
    (tmp_path / "token").touch()
    check_node(run, store)
    with pytest.raises(NodeError, match=r"torch .*, not 0\.1: install the versions of the driver"):
        check_node({**run, "versions": {**versions(), "torch": "0.1"}}, store)
    check_node({"joined": False}, store)


def test_the_code_is_shipped_and_the_environment_if_asked_for(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("SIEVIT_SHIP", raising=False)
    shipped = runtime_environment()
    assert [Path(folder).name for folder in shipped["py_modules"]] == ["ablations", "reducers"] and "pip" not in shipped
    assert shipped["env_vars"]["OMP_NUM_THREADS"] == "1"
    monkeypatch.setenv("SIEVIT_SHIP", "environment")
    packages = runtime_environment()["pip"]["packages"]
    assert packages == dependencies() and any(package.startswith("torch==") for package in packages)
    assert not any(package.startswith(("ray", "pytest", "onnx")) for package in packages)
    monkeypatch.setenv("SIEVIT_SHIP", "nothing")
    assert "py_modules" not in runtime_environment()
    monkeypatch.setenv("SIEVIT_SHIP", "everything")
    with pytest.raises(ValueError, match="choose code, environment, nothing"):
        runtime_environment()


@pytest.mark.parametrize(
    ("address", "expected"),
    [
        pytest.param("ray://127.0.0.1:10001", "a client is no part of the cluster", marks=pytest.mark.slow),
        pytest.param("127.0.0.1:1", "127.0.0.1:1", marks=pytest.mark.slow),
    ],
)
def test_an_address_without_a_cluster_ends_with_one_message(address: str, expected: str, tmp_path: Path) -> None:
    env = environment(RAY_ADDRESS=address)
    status, printed = run("run", "--out", tmp_path / "out", *TINY, "--specs", grid(tmp_path, 2), env=env)
    assert status == 2, printed
    assert "error: " in printed and expected in printed and "Traceback" not in printed
