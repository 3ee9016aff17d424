"""Run by tests/test_public_paths.py in a process of its own: tries imports and commands, and tells what came of each.

Reads {"imports": [[module, [names]], …], "commands": [[module, [words]], …]} and prints {"imports": [[error or null,
[warnings]], …], "commands": [[exit status, what was printed, [warnings]], …]}. A command ends when it has understood
its words: nothing that it would do is done.
"""

from __future__ import annotations

import argparse
import contextlib
import io
import json
import runpy
import sys
import warnings
from collections.abc import Iterator
from typing import Any

OURS = ("reducers", "ablations", "analysis", "benchmarks")
understand = argparse.ArgumentParser.parse_args


def understood(self: argparse.ArgumentParser, *arguments: Any, **options: Any) -> Any:
    understand(self, *arguments, **options)
    raise SystemExit(0)


@contextlib.contextmanager
def told() -> Iterator[list[str]]:
    """The deprecations that name a package of ours."""
    texts: list[str] = []
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        yield texts
    for one in caught:
        if issubclass(one.category, DeprecationWarning) and any(name in str(one.message) for name in OURS):
            texts.append(str(one.message))


def imported(module: str, names: list[str]) -> list[Any]:
    with told() as texts:
        error = None
        try:
            exec(f"from {module} import {', '.join(names)}" if names else f"import {module}", {})
        except ImportError as failure:
            error = str(failure)
    return [error, texts]


def called(module: str, words: list[str]) -> list[Any]:
    printed, status = io.StringIO(), 0
    sys.argv = [module, *words]
    with told() as texts, contextlib.redirect_stdout(printed), contextlib.redirect_stderr(printed):
        try:
            runpy.run_module(module, run_name="__main__", alter_sys=True)
        except SystemExit as end:
            status = end.code if isinstance(end.code, int) else int(end.code is not None)
        except ImportError as failure:
            status = 1
            printed.write(str(failure))
    return [status, printed.getvalue(), texts]


if __name__ == "__main__":
    asked = json.load(sys.stdin)
    argparse.ArgumentParser.parse_args = understood  # type: ignore[method-assign]
    found = {
        "imports": [imported(*one) for one in asked["imports"]],
        "commands": [called(*one) for one in asked["commands"]],
    }
    json.dump(found, sys.stdout)
