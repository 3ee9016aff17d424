"""The process that ``cluster.LocalCluster`` starts: a Ray cluster on the loopback address that does as it is told.

It takes one line of JSON for each thing to do and answers with one; when its input ends, so does the cluster.
"""

from __future__ import annotations

import json
import sys
from contextlib import suppress
from typing import Any

from ray.cluster_utils import Cluster


def answer(value: object) -> None:
    """One line on standard output."""
    sys.stdout.write(json.dumps(value) + "\n")
    sys.stdout.flush()


def lose(cluster: Cluster, node: Any) -> None:
    """End a node at once, with its workers.

    Ray itself leaves those to find out, and on a busy machine they first finish what they are at.
    """
    import psutil  # Ray's own, which importing Ray makes known

    (raylet,) = node.all_processes["raylet"]
    workers = psutil.Process(raylet.process.pid).children(recursive=True)
    for worker in workers:
        with suppress(psutil.NoSuchProcess):
            worker.suspend()
    cluster.remove_node(node, allow_graceful=False)
    for worker in workers:
        with suppress(psutil.NoSuchProcess):
            worker.kill()


def serve() -> None:
    """A head without cores, and the nodes that are asked for."""
    common: dict[str, Any] = {
        "node_ip_address": "127.0.0.1", "include_dashboard": False, "object_store_memory": 100 * 2**20,
    }  # fmt: skip
    cluster = Cluster(initialize_head=True, head_node_args={**common, "num_cpus": 0})
    nodes: dict[str, Any] = {}
    answer({"address": cluster.address})
    for line in sys.stdin:
        what = json.loads(line)
        if "add" in what:
            nodes[what["add"]] = cluster.add_node(
                **common, num_cpus=what["cpus"], num_gpus=what["gpus"], env_vars=what["env"]
            )
        else:
            lose(cluster, nodes.pop(what["lose"]))
        answer({"done": True})
    cluster.shutdown()


if __name__ == "__main__":
    serve()
