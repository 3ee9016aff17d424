"""A Ray cluster of several nodes on this machine, for tests: nodes join it, and are lost without notice.

It lives in a process of its own (``cluster_server``), so that Ray reads its settings afresh there and everything ends
with the test.
"""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from types import TracebackType
from typing import Any, Self

from tests.ablations.runs import ROOT, environment

_QUIET = {
    "RAY_ENABLE_WINDOWS_OR_OSX_CLUSTER": "0",  # stay on the loopback address
    "RAY_USAGE_STATS_ENABLED": "0",
    "RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO": "0",
}


class LocalCluster:
    """A head without cores, so that no trial runs where the driver is, and the nodes that are added."""

    def __enter__(self) -> Self:
        self._process = subprocess.Popen(
            [sys.executable, str(Path(__file__).with_name("cluster_server.py"))],
            cwd=ROOT, env=environment(**_QUIET), stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True,
        )  # fmt: skip
        self.address: str = self._answer()["address"]
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        with self._process:  # closes its pipes, by which it shuts the cluster down
            try:
                self._process.communicate(timeout=60)
            except subprocess.TimeoutExpired:
                self._process.kill()

    def add(self, name: str, *, cpus: float = 1, gpus: float = 0, **env: str) -> None:
        """A node joins; ``env`` is of its workers."""
        self._do({"add": name, "cpus": cpus, "gpus": gpus, "env": env})

    def lose(self, name: str) -> None:
        """A node is gone at once, with all that ran on it."""
        self._do({"lose": name})

    def environment(self, **more: str) -> dict[str, str]:
        """Of a driver that joins the cluster."""
        return environment(RAY_ADDRESS=self.address, **more)

    def _do(self, what: dict[str, Any]) -> None:
        assert self._process.stdin is not None
        self._process.stdin.write(json.dumps(what) + "\n")
        self._process.stdin.flush()
        self._answer()

    def _answer(self) -> dict[str, Any]:
        assert self._process.stdout is not None
        for line in self._process.stdout:
            if line.startswith('{"'):
                answer: dict[str, Any] = json.loads(line)
                return answer
        raise RuntimeError("the cluster has ended")
