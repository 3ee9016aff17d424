"""What a failure calls for, what is tried again, the watch over work that hangs, and what a job takes of a machine."""

from __future__ import annotations

import dataclasses
import subprocess
import sys
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest
import torch

from ablations.measure.failures import ATTEMPTS, again, device_lost, in_words, out_of_gpu_memory, out_of_memory
from ablations.run.jobs import Computation, Job, computations, schedule, timings
from ablations.run.ray.cluster import plan
from ablations.run.ray.tries import NODES, TRIES, Tries
from ablations.run.ray.watchdog import Watch, place_of_stall
from ablations.spec.expand import expand
from ablations.spec.model import parse_spec
from ablations.trial.stages import Training
from ablations.trial.target import Target
from ablations.trial.trial import Trial, TrialError
from tests.ablations.runs import PATIENCE, ROOT, SPEC

GPU_FULL = torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB")


def cpu_full() -> BaseException:
    """What torch itself raises where the machine's memory does not suffice."""
    with pytest.raises(RuntimeError) as caught:
        torch.empty(1 << 52, dtype=torch.uint8)
    return caught.value


# --- what a failure calls for -----------------------------------------------------------------------------------------


def test_a_full_gpu_halves_the_batch_until_one_image_is_left() -> None:
    tried, at_once = [], 48
    while (following := again(GPU_FULL, alone=True, attempts=len(tried) + 1, at_once=at_once)) is not None:
        tried.append(following)
        at_once = following
    assert tried == [24, 12, 6, 3, 1]


@pytest.mark.parametrize("error", [GPU_FULL, MemoryError("no room")])
def test_what_ran_out_of_memory_in_a_group_is_first_tried_alone_as_it_was(error: BaseException) -> None:
    assert again(error, alone=False, attempts=1, at_once=48) == 48


def test_a_full_machine_is_recorded_with_its_remedy() -> None:
    for error in (cpu_full(), MemoryError("no room")):
        assert out_of_memory(error) and not out_of_gpu_memory(error)
        assert again(error, alone=True, attempts=1, at_once=48) is None, "fewer images would need another plan"
        assert "the machine's memory ran out with 48 images" in in_words(error, at_once=48)
        assert "smaller --batch" in in_words(error, at_once=48) and str(error) in in_words(error, at_once=48)


def test_what_may_pass_is_tried_once_more_and_what_is_decided_is_not() -> None:
    for passing in (RuntimeError("a moment"), OSError("a moment")):
        assert again(passing, alone=True, attempts=1, at_once=8) == 8
        assert again(passing, alone=True, attempts=ATTEMPTS, at_once=8) is None
    for decided in (TrialError("not finite"), KeyError("name"), NotImplementedError("no"), AssertionError("ours")):
        assert again(decided, alone=True, attempts=1, at_once=8) is None


def test_a_gpu_that_is_lost_to_the_process_is_told_from_one_that_is_full() -> None:
    assert device_lost(RuntimeError("CUDA error: an illegal memory access was encountered"))
    assert not device_lost(GPU_FULL) and not device_lost(RuntimeError("sizes do not match"))


# --- what is tried again ----------------------------------------------------------------------------------------------


@pytest.fixture
def work(target: Target) -> list[Computation]:
    trials = expand(parse_spec(SPEC), target)
    return computations(trials, {target.facts.name: target.facts}, batches={target.facts.name: target.batch})


def nothing_finished(trial: Trial, timed: bool) -> bool:
    return False


def test_trials_of_a_worker_that_crashed_are_tried_one_by_one_and_given_up_in_the_end(work: list[Computation]) -> None:
    tries = Tries(nothing_finished)
    jobs, given_up, finished = tries.after(Job(tuple(work)), "killed", with_node=False)
    assert [job.computations for job in jobs] == [(one,) for one in work] and not given_up and not finished
    for number in range(2, TRIES + 1):
        jobs, given_up, _ = tries.after(Job((work[0],)), "killed", with_node=False)
        assert bool(jobs) == (number < TRIES)
    assert [(one.computation, one.reason) for one in given_up] == [(work[0], f"killed (tried {TRIES} times)")]


def test_a_job_that_lost_its_node_stays_whole_and_is_not_to_blame(work: list[Computation]) -> None:
    tries, job = Tries(nothing_finished), Job(tuple(work))
    for _ in range(NODES - 1):
        assert tries.after(job, "its node was lost", with_node=True) == ([job], [], [])
    jobs, given_up, _ = tries.after(job, "its node was lost", with_node=True)
    assert not jobs and len(given_up) == len(work), "no end of nodes either"


def test_what_a_lost_worker_had_stored_is_not_computed_again(work: list[Computation]) -> None:
    done = work[1].trial.key
    tries = Tries(lambda trial, timed: trial.key == done)
    jobs, given_up, finished = tries.after(Job(tuple(work)), "killed", with_node=False)
    assert finished == [work[1]] and not given_up
    assert [job.computations[0] for job in jobs] == [work[0], *work[2:]]
    ((job,), _, _) = Tries(lambda trial, timed: trial.key == done).after(Job(tuple(work)), "gone", with_node=True)
    assert job.computations == (work[0], *work[2:])


def test_trials_of_one_training_stay_together_once(work: list[Computation]) -> None:
    training = Training.of({"epochs": 1})
    trained = [dataclasses.replace(one, trial=dataclasses.replace(one.trial, training=training)) for one in work]
    tries, job = Tries(nothing_finished), Job(tuple(trained))
    assert tries.after(job, "killed", with_node=False)[0] == [job]
    assert len(tries.after(job, "killed", with_node=False)[0]) == len(trained)


# --- the watch --------------------------------------------------------------------------------------------------------

HANGS = """
import sys, time
from pathlib import Path
from ablations.run.ray.watchdog import Watch

def stuck():
    {stuck}

watch = Watch(1.0)
with watch.over(Path(sys.argv[1])):
    for _ in range(6):  # more than the limit in all, but never at a stretch
        time.sleep(0.4)
        watch.beat()
    print("alive", flush=True)
    stuck()
print("never")
"""


@pytest.mark.parametrize("stuck", ["time.sleep(3600)", "sum(iter(int, 1))"])
def test_a_process_that_hangs_ends_and_says_where(stuck: str, tmp_path: Path) -> None:
    """Asleep, or busy for ever in compiled code that lets no other thread of Python run."""
    path = tmp_path / "watch" / "one.txt"
    done = subprocess.run(
        [sys.executable, "-c", HANGS.format(stuck=stuck), path],
        cwd=ROOT, capture_output=True, text=True, timeout=PATIENCE, check=False,
    )  # fmt: skip
    assert done.returncode == 1 and done.stdout == "alive\n", done.stderr
    assert "in stuck" in path.read_text()
    assert place_of_stall(path) is not None


def test_work_that_goes_on_is_left_in_peace(tmp_path: Path) -> None:
    path = tmp_path / "watch" / "one.txt"
    for limit in (0.5, None):
        watch = Watch(limit)
        with watch.over(path):
            for _ in range(4):
                time.sleep(0.2)
                watch.beat()
        assert not path.exists() and place_of_stall(path) is None
    time.sleep(0.6)  # and the clock has stopped


def test_a_limit_that_leaves_no_time_is_refused() -> None:
    with pytest.raises(ValueError, match="no time"):
        Watch(0)


def test_the_place_of_a_stall_is_in_this_projects_code(tmp_path: Path) -> None:
    path = tmp_path / "stacks.txt"
    path.write_text(
        "Timeout (0:00:12)!\nThread 0x0000 (most recent call first):\n"
        '  File "/usr/lib/python3/threading.py", line 320 in wait\n\n'
        "Thread 0x0001 (most recent call first):\n"
        '  File "/site-packages/torch/nn/modules/linear.py", line 125 in forward\n'
        '  File "/code/reducers/runtime/attention.py", line 88 in attend\n'
        '  File "/code/ablations/measure/evaluate.py", line 200 in batch\n'
    )
    assert place_of_stall(path) == "attention.py:88 in attend"
    path.write_text("")
    assert place_of_stall(path) is None, "killed, not timed out"


# --- what a job takes -------------------------------------------------------------------------------------------------

Node = Mapping[str, float]
HEAD: Node = {"CPU": 0.0}


@pytest.mark.parametrize(
    ("nodes", "workers", "joined", "at_once", "gpu"),
    [
        ([{"CPU": 2.0}], None, False, 2, None),
        ([{"CPU": 8.0}], 3, False, 3, None),
        ([{"CPU": 2.0}], 8, False, 2, None),
        ([HEAD, {"CPU": 4.0}, {"CPU": 4.0}], None, True, 8, None),
        ([HEAD, {"CPU": 4.0}], 64, True, 64, None),  # a cluster that grows on demand
        ([{"CPU": 16.0, "GPU": 1.0}], None, False, 4, 0.25),
        ([{"CPU": 16.0, "GPU": 1.0}], 2, False, 2, 0.5),
        ([{"CPU": 16.0, "GPU": 4.0}], 6, False, 6, 0.5),  # two a GPU, and no GPU without any
        ([{"CPU": 2.0, "GPU": 1.0}], None, False, 2, 0.25),  # cores are short
        ([{"CPU": 64.0}, {"CPU": 8.0, "GPU": 1.0}, {"CPU": 8.0, "GPU": 2.0}], None, True, 12, 0.25),  # only GPUs
    ],
)
def test_as_many_jobs_at_once_as_the_nodes_hold(
    nodes: list[Node], workers: int | None, joined: bool, at_once: int, gpu: float | None
) -> None:
    cluster = plan(nodes, workers=workers, joined=joined)
    assert cluster.at_once == at_once and cluster.share.get("GPU") == gpu and cluster.share["CPU"] == 1
    assert cluster.whole.get("GPU") == (None if gpu is None else 1.0)


def test_trainings_and_timings_ask_for_a_whole_device(work: list[Computation]) -> None:
    with_gpu = plan([{"CPU": 16.0, "GPU": 2.0}], workers=None, joined=True)
    cores = plan([{"CPU": 4.0}, {"CPU": 16.0}], workers=None, joined=True)
    trained = dataclasses.replace(work[0], trial=dataclasses.replace(work[0].trial, training=Training("{}")))
    (ordinary, *_), (training,), (timing,) = (
        schedule(work, workers=2),
        schedule([trained], workers=2),
        timings([work[0].trial]),
    )

    def taken(job: Job, cluster: Any) -> dict[str, float]:
        (bundle,) = cluster.taken_by(whole=job.whole_device, timed=job.timed).bundles
        return dict(bundle)

    assert taken(ordinary, with_gpu) == {"CPU": 1.0, "GPU": 0.25}
    assert taken(training, with_gpu) == taken(timing, with_gpu) == {"CPU": 1.0, "GPU": 1.0}
    assert taken(ordinary, cores) == taken(training, cores) == {"CPU": 1.0}
    assert taken(timing, cores) == {"CPU": 16.0}, "alone on its machine"
