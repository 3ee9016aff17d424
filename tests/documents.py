"""What the documents say at present: the imports and commands in README, CONTRIBUTING, docs and examples."""

from __future__ import annotations

import ast
import re
import textwrap
from pathlib import Path

ROOT = Path(__file__).parent.parent
OURS = ("reducers", "ablations", "analysis", "benchmarks")


def documents() -> list[Path]:
    files = [ROOT / "README.md", ROOT / "CONTRIBUTING.md", *sorted((ROOT / "docs").rglob("*.md"))]
    return files + sorted(path for path in (ROOT / "examples").rglob("*") if path.suffix in (".py", ".sh", ".yaml"))


def code_of(path: Path) -> list[str]:
    """The Python in a document: fenced blocks, indented ones that begin with an import, whole examples."""
    text = path.read_text(encoding="utf-8")
    if path.suffix == ".py":
        return [text]
    fenced = re.findall(r"```(?:python)?\n(.*?)```", text, re.DOTALL)
    indented = [textwrap.dedent(one) for one in re.findall(r"(?:^ {4}.*\n)+", text, re.MULTILINE)]
    return [one for one in fenced + indented if re.search(r"^(from|import) ", one, re.MULTILINE)]


def imports_of(code: str) -> list[tuple[str, tuple[str, ...]]]:
    """What a piece of code imports of ours."""
    found: list[tuple[str, tuple[str, ...]]] = []
    for node in ast.walk(ast.parse(code)):
        if isinstance(node, ast.ImportFrom) and node.module:
            found.append((node.module, tuple(alias.name for alias in node.names)))
        elif isinstance(node, ast.Import):
            found += [(alias.name, ()) for alias in node.names]
    return [one for one in found if one[0].split(".")[0] in OURS]


def documented_imports() -> list[tuple[str, tuple[str, ...]]]:
    return sorted({one for path in documents() for code in code_of(path) for one in imports_of(code)})


def documented_commands() -> set[tuple[str, str]]:
    """(module, command) of every ``python -m module command``, "" where no command follows; and of every ``sievit
    command`` in code or in a comment that shows one.
    """
    pattern = re.compile(rf"python3? -m ((?:{'|'.join(OURS)})(?:\.\w+)*)(?:[ \\\n]+([a-z]+)\b)?")
    text = "\n".join(path.read_text(encoding="utf-8") for path in documents())
    installed = re.findall(r"(?:`|&& |^(?: {4}|# +)?)sievit ([a-z]+)\b", text, re.MULTILINE)
    return {*pattern.findall(text), *(("ablations", command) for command in installed)}
