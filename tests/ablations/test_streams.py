"""Printing to streams that nobody reads any more: no error, no message, and nothing else of the process changes."""

from __future__ import annotations

import io
import os
import subprocess
import sys
from pathlib import Path
from typing import TextIO

import pytest

from ablations.records.streams import say, silence

ROOT = Path(__file__).parents[2]


def pipe() -> tuple[TextIO, TextIO]:
    reader, writer = os.pipe()
    return os.fdopen(reader, encoding="utf-8"), os.fdopen(writer, "w", encoding="utf-8")


def leads_nowhere(stream: TextIO) -> bool:
    return os.fstat(stream.fileno()).st_rdev == os.stat(os.devnull).st_rdev  # noqa: PTH116  # no file of a folder


def test_a_line_is_there_as_soon_as_it_is_said() -> None:
    reader, writer = pipe()
    with reader, writer:
        say("eins, zwei, 3 μs", writer)
        assert reader.readline() == "eins, zwei, 3 μs\n"
    say("to nobody", None)  # sys.stdout of a process that was started without one
    text = io.StringIO()
    say("a", text)
    say("b", text)
    assert text.getvalue() == "a\nb\n"


def test_after_its_reader_has_gone_a_stream_takes_everything_and_no_other_is_touched() -> None:
    reader, writer = pipe()
    other_reader, other = pipe()
    with other_reader, other, writer:
        say("first", writer)
        assert reader.readline() == "first\n"
        reader.close()
        free = os.dup(0)
        os.close(free)
        for _ in range(3):
            say("second", writer)
        assert leads_nowhere(writer) and not leads_nowhere(other)
        writer.write("what a library prints\n")
        writer.flush()
        say("still", other)
        assert other_reader.readline() == "still\n"
        again = os.dup(0)
        os.close(again)
        assert again == free, "no file stays open"


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="needs a disk that is full")
def test_a_full_disk_is_no_reader_either() -> None:
    with open("/dev/full", "w", encoding="utf-8") as full:  # noqa: PTH123  # a device
        say("text", full)
        assert leads_nowhere(full)


def test_what_waits_in_a_stream_is_let_go() -> None:
    reader, writer = pipe()
    writer.write("half a line")
    reader.close()
    silence(writer)
    writer.close()  # else BrokenPipeError


def test_a_process_whose_reader_goes_ends_as_it_would_have() -> None:
    """Python itself would say so as it ends, with a status of 120."""
    program = "import sys; from ablations.records.streams import say; say('x', sys.stdout); print('y'); sys.exit(3)"
    reader, writer = os.pipe()
    os.close(reader)
    done = subprocess.run(
        [sys.executable, "-c", program], cwd=ROOT, stdout=writer, stderr=subprocess.PIPE, text=True, check=False
    )
    os.close(writer)
    assert (done.returncode, done.stderr) == (3, "")
