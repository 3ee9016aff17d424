"""One run at a time without locks: whoever lives is seen, whoever died is replaced, and no clock is compared."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest

from ablations.records.storage import Disk, StoreError
from ablations.store.lease import NAME, PATIENCE, holder, leased
from tests.ablations.runs import ROOT, one_thread

_BEAT = 0.2  # seconds


@pytest.fixture
def place(tmp_path: Path) -> Disk:
    return Disk(tmp_path)


def test_a_living_run_keeps_others_out_and_leaves_nothing(place: Disk) -> None:
    with leased(place, beat=_BEAT):
        with pytest.raises(StoreError, match=r"another run \(process \d+ on .*--out"), leased(place, beat=_BEAT):
            raise AssertionError("two runs at once")
        assert holder(place) is not None
    assert holder(place) is None
    with leased(place, beat=_BEAT):
        pass


def test_a_dead_run_is_replaced_whatever_the_clocks_say(place: Disk) -> None:
    code = (
        "import os, signal, sys; from pathlib import Path\n"
        "from ablations.store.lease import leased; from ablations.records.storage import Disk\n"
        f"with leased(Disk(Path(sys.argv[1])), beat={_BEAT}):\n"
        "    os.kill(os.getpid(), signal.SIGKILL)"
    )
    done = subprocess.run([sys.executable, "-c", code, str(place.root)], cwd=ROOT, env=one_thread(), check=False)
    assert done.returncode == -9 and holder(place) is not None
    path = place.root / NAME
    far = time.time() + 10 * 365 * 86400  # written by a machine whose clock is ten years ahead
    os.utime(path, (far, far))
    started = time.monotonic()
    with leased(place, beat=_BEAT):
        assert time.monotonic() - started >= PATIENCE * _BEAT, "it was given time to show that it lives"
        now = holder(place)
        assert now is not None and now["pid"] == os.getpid()


def test_of_two_that_come_at_once_one_goes_on(place: Disk) -> None:
    ended: list[str] = []
    together = threading.Barrier(2)

    def run() -> None:
        together.wait()
        try:
            with leased(place, beat=_BEAT):
                time.sleep(6 * _BEAT)
                ended.append("ran")
        except StoreError:
            ended.append("kept out")

    threads = [threading.Thread(target=run) for _ in range(2)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert sorted(ended) == ["kept out", "ran"]


def test_a_run_that_was_taken_over_says_so_and_does_not_remove_the_others_sign(
    place: Disk, caplog: pytest.LogCaptureFixture
) -> None:
    with leased(place, beat=_BEAT):
        place.write(NAME, json.dumps({"run": "other", "host": "h", "pid": 1, "count": 0}).encode())
        time.sleep(3 * _BEAT)
    assert "has taken" in caplog.text
    found = holder(place)
    assert found is not None and found["run"] == "other"
