"""Joining a Ray cluster or starting a private one, what is shipped to its nodes, and what a job may take of them."""

from __future__ import annotations

import importlib.metadata
import logging
import os
import re
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import chdir, suppress
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import ray
from ray import tune
from ray.exceptions import RayError
from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

from ablations.run.ray.address import address, check_address
from ablations.system import cores

log = logging.getLogger(__name__)

_OBJECT_STORE = 128 * 2**20  # bytes: rows are stored as files, so next to nothing travels
_NODE_PATIENCE = 900.0  # seconds until a growing cluster has its first node to compute on
_HEALTH_PATIENCE = 60.0  # seconds for the head to say that it is well
_PER_GPU = 4  # trials that share a GPU unless --workers says otherwise: small models leave most of it idle
WORKER_SETTINGS = {
    "OMP_NUM_THREADS": "1",  # one core a trial
    # Tune runs each job in a new thread, and glibc would give each a heap of its own, which add up to gigabytes
    "MALLOC_ARENA_MAX": "1",
}
"""Environment of every worker."""
SHIPPED = ("code", "environment", "nothing")
_CODE = ("ablations", "reducers")


@dataclass(frozen=True)
class Cluster:
    """What there is to run on."""

    joined: bool  # an existing cluster, not a private Ray on this machine
    at_once: int  # jobs side by side
    share: Mapping[str, float]  # what an ordinary job takes: a core, and a part of a GPU where there are any
    whole: Mapping[str, float]  # what a job takes that wants its device to itself
    timed: Mapping[str, float]  # what a timing takes: a GPU, or all cores of a node
    folder: Path | None = None  # where Ray keeps its own files, if that is the run's own

    def taken_by(self, *, whole: bool, timed: bool) -> tune.PlacementGroupFactory:
        """The resources of a job as Tune asks for them."""
        wanted = self.timed if timed else self.whole if whole else self.share
        return tune.PlacementGroupFactory([dict(wanted)])


def start(workers: int | None, *, folder: Path | None = None) -> Cluster:
    """Join the cluster of ``RAY_ADDRESS``, or start a private one on this machine's loopback address.

    ``folder`` is what ``ray_folder`` found for a private one.

    Raises:
        ConnectionError: there is no cluster at that address, or none that could compute.
        ValueError: ``SIEVIT_SHIP`` or ``RAY_ADDRESS`` cannot be what was meant.
    """
    quiet: dict[str, Any] = {"log_to_driver": False, "logging_level": logging.ERROR, "configure_logging": True}
    joined = address()
    before = signal.getsignal(signal.SIGTERM)
    if joined:
        check_address()
        _check_health(joined)
        # workers look for code in the driver's folder first: in an empty one they find none but what is shipped
        with tempfile.TemporaryDirectory() as empty, chdir(empty):
            ray.init(address=joined, runtime_env=runtime_environment(), namespace="sievit", **quiet)
    else:
        ray.init(
            "local",  # never one that happens to run on this machine
            num_cpus=max(1, workers or cores()),
            include_dashboard=False,
            object_store_memory=_OBJECT_STORE,
            _node_ip_address="127.0.0.1",
            **quiet,
        )
    signal.signal(signal.SIGTERM, before)  # Ray's own handler would end the process before the results are compacted
    for name in ("ray", "ray.tune", "ray.train"):
        logging.getLogger(name).setLevel(logging.CRITICAL)
    return replace(plan(_nodes_that_compute(joined), workers=workers, joined=joined is not None), folder=folder)


def _check_health(joined: str) -> None:
    """Whatever listens there must speak as Ray does: Ray itself would ask it for ever."""
    if not joined.rpartition(":")[2].isdecimal():
        return
    asked = [sys.executable, "-m", "ray.scripts.scripts", "status", "--address", joined]
    try:
        healthy = subprocess.run(asked, capture_output=True, timeout=_HEALTH_PATIENCE, check=False).returncode == 0
    except subprocess.TimeoutExpired:
        healthy = False
    if not healthy:
        raise ConnectionError(
            f"what answers at RAY_ADDRESS={joined} is no Ray cluster in good health; `ray status --address {joined}` "
            "says more"
        )


def _nodes_that_compute(joined: str | None) -> list[Mapping[str, float]]:
    """The resources of each node with cores; a cluster that is still growing is given time to have one."""
    until, said = time.monotonic() + _NODE_PATIENCE, False
    while True:
        nodes = [node["Resources"] for node in ray.nodes() if node["Alive"] and node["Resources"].get("CPU", 0) >= 1]
        if nodes:
            return nodes
        if time.monotonic() > until:
            raise ConnectionError(
                f"the Ray cluster at {joined} has no node with a core to compute on; start one (with an autoscaler: "
                "min_workers: 1), for what it has decides what trials ask for"
            )
        if not said:
            log.info("the cluster has no node with a core yet: waiting for one")
            said = True
        time.sleep(2.0)


def plan(nodes: Sequence[Mapping[str, float]], *, workers: int | None, joined: bool) -> Cluster:
    """What a job takes of these nodes, and how many run at once.

    Where any node has GPUs, only GPUs compute: a grid that is computed half on one kind of device and half on another
    compares nothing. ``workers`` is a wish; a cluster that grows on demand may be asked for more than it has now, of
    the kinds that are there.
    """
    gpus = sum(node.get("GPU", 0.0) for node in nodes)
    cores = [int(node.get("CPU", 0)) for node in nodes]
    if not gpus:
        at_once = max(1, sum(cores))
        if workers:
            at_once = workers if joined else min(at_once, workers)
        one = {"CPU": 1.0}
        return Cluster(joined, at_once, one, one, {"CPU": float(max(1, *cores, 1))})
    each = max(1, -(-workers // int(gpus))) if workers and gpus >= 1 else workers or _PER_GPU
    fit = sum(min(int(node.get("CPU", 0)), int(node.get("GPU", 0.0) * each)) for node in nodes)
    at_once = workers if workers and joined else max(1, min(fit, workers or fit))
    whole = {"CPU": 1.0, "GPU": 1.0}
    return Cluster(joined, at_once, {"CPU": 1.0, "GPU": 1.0 / each}, whole, whole)


def ask_nodes(question: Callable[..., str | None], *arguments: object, patience: float = 60.0) -> str | None:
    """The first answer that a node has, asked of all at once; None where none has one within ``patience`` seconds."""
    task = ray.remote(question)
    asked = [
        task.options(
            num_cpus=0, max_retries=0, scheduling_strategy=NodeAffinitySchedulingStrategy(node["NodeID"], soft=False)
        ).remote(*arguments)
        for node in ray.nodes()
        if node["Alive"]
    ]
    answered, _ = ray.wait(asked, num_returns=len(asked), timeout=patience)
    for each in answered:
        with suppress(RayError):  # a node that went as well
            answer = ray.get(each)
            if answer is not None:
                return str(answer)
    return None


def runtime_environment() -> dict[str, Any]:
    """What Ray's runtime environment brings to every worker of a joined cluster.

    ``SIEVIT_SHIP=code`` (the default) ships this project's two packages, so that the nodes need its dependencies only;
    ``environment`` installs those as well, in the versions of this environment; ``nothing`` trusts the nodes.
    """
    chosen = os.environ.get("SIEVIT_SHIP") or SHIPPED[0]
    if chosen not in SHIPPED:
        raise ValueError(f"SIEVIT_SHIP={chosen!r} is unknown: choose {', '.join(SHIPPED)}")
    environment: dict[str, Any] = {"env_vars": dict(WORKER_SETTINGS)}
    if chosen == "nothing":
        return environment
    root = Path(__file__).resolve().parents[3]
    environment["py_modules"] = [str(root / name) for name in _CODE]
    environment["excludes"] = ["**/__pycache__/"]
    if chosen == "environment":
        environment["pip"] = {"packages": dependencies(), "pip_check": False}
    return environment


def dependencies() -> list[str]:
    """What the project depends on, each at the version that is installed here; Ray is the cluster's own."""
    found = []
    for requirement in importlib.metadata.requires("sievit") or []:
        name = re.split(r"[\s\[<>=!~;(]", requirement, maxsplit=1)[0]
        if "extra ==" not in requirement and name != "ray":
            found.append(f"{name}=={importlib.metadata.version(name)}")
    return found
