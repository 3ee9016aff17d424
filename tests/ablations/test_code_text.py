"""What a definition says to a digest: all that computes, and no words. On small packages of their own."""

from __future__ import annotations

import ast
import textwrap
from pathlib import Path

import pytest

from ablations.trial.code_sources import Sources
from ablations.trial.code_text import Place, canonical, is_prose


def text(source: str) -> str:
    return canonical(ast.parse(textwrap.dedent(source)))


def written(folder: Path, **files: str) -> Sources:
    """A package ``p`` with these modules; ``run`` in its module ``a`` is where a trial begins."""
    (folder / "p").mkdir(parents=True)
    for name, source in {"__init__": "", **files}.items():
        (folder / "p" / f"{name}.py").write_text(textwrap.dedent(source))
    return Sources({"p": folder / "p"}, doors=("p.door:enter",), closed=("p.shut",), methods="p")


def digest(folder: Path, **files: str) -> str:
    return written(folder / str(len(list(folder.iterdir()))), **files).digest(["p.a:run"], (), {})


def test_annotations_messages_and_layout_are_no_code() -> None:
    one = 'def f(x: int) -> int:\n    """Says."""\n    if x:\n        raise ValueError("no")\n    return (x + 1)\n'
    other = 'def f(x):\n    # remark\n    if x: raise ValueError(f"not {x}, but …")\n    return x + 1\n'
    assert text(one) == text(other)
    for different in ("x + 2", "x - 1", "-x"):
        assert text(one.replace("(x + 1)", different)) != text(one)
    assert text(one.replace("ValueError", "KeyError")) != text(one)


@pytest.mark.parametrize(
    ("one", "other"),
    [
        ("x = 'two words'", "x = 'other words here'"),
        ("f(what='the plain model is run')", "f(what='it runs')"),
        ("def f(x='some words'): ...", "def f(x='none at all'): ..."),
        ("x = f'{a} of {b} images'", "x = f'of {a}, images: {b}'"),
        ("assert x, 'short'", "assert x"),
        ("log.info('hello')", ""),
        ("if TYPE_CHECKING:\n    from a import b", ""),
        ("class C:\n    summary = 'one'\n    x = 1", "class C:\n    source = 'else'\n    x = 1"),
        ("x: int = 1", "x: float = 1"),
    ],
)
def test_these_say_the_same(one: str, other: str) -> None:
    assert text(one) == text(other)


@pytest.mark.parametrize(
    ("one", "other"),
    [
        ("x = 'word'", "x = 'other'"),
        ("x = {'two words': 1}", "x = {'other words': 1}"),
        ("x['two words']", "x['other words']"),
        ("x == 'two words'", "x == 'other words'"),
        ("x in ('two words', 'or three')", "x in ('two words', 'or four')"),
        ("einsum('batch heads, heads rest', x)", "einsum('batch heads, batch rest', x)"),
        ("rearrange(x, 'batch tokens -> tokens batch')", "rearrange(x, 'batch tokens -> batch tokens')"),
        ("x = f'{a}.weight'", "x = f'{a}.bias'"),
        ("x.startswith('two words')", "x.startswith('other words')"),
        ("'two words'.encode()", "'other words'.encode()"),
        ("match x:\n    case 'two words': f()", "match x:\n    case 'other words': f()"),
        ("assert x", "assert y"),
        ("def f(x=1): ...", "def f(x=2): ..."),
        ("@a\ndef f(): ...", "@b\ndef f(): ..."),
        ("x.info('hello')", ""),
        ("x = 1", "x = 1.0"),
        ("f(a, b)", "f(b, a)"),
        ("a = 1\nb = 2", "b = 2\na = 1"),
    ],
)
def test_these_do_not(one: str, other: str) -> None:
    assert text(one) != text(other)


def test_prose_has_two_words() -> None:
    for each in ("out of memory", "the GPU's memory", "K tokens, kept", "not {}, but this"):
        assert is_prose(each), each
    for each in ("word", "b n d -> b d n", "x 3", "K = 57", "blocks.0.weight", "", "1e-6 2", "rand-m9-mstd0.5-inc1"):
        assert not is_prose(each), each


RUN = "from p.b import f\n\ndef run():\n    return f(2)\n"
MADE = "LIMIT = 3\n\ndef f(x):\n    return min(x, LIMIT)\n"


def test_a_name_stands_for_what_it_means_however_it_was_imported(tmp_path: Path) -> None:
    whole = digest(tmp_path, a=RUN, b=MADE)
    alias = RUN.replace("import f", "import f as g").replace("f(2)", "g(2)")
    for other in (
        alias,
        "import p.b\n\ndef run():\n    return p.b.f(2)\n",
        "import p.b as c\n\ndef run():\n    return c.f(2)\n",
        "from p import b\n\ndef run():\n    return b.f(2)\n",
        "from .b import f\n\ndef run():\n    return f(2)\n",
        "def run():\n    from p.b import f\n    return f(2)\n",
        "from p.c import f\n\ndef run():\n    return f(2)\n",
    ):
        assert digest(tmp_path, a=other, b=MADE, c="from p.b import f\n") == whole, other
    assert digest(tmp_path, a=MADE + RUN.replace("from p.b import f\n", "")) == whole, "in one file"
    split = digest(tmp_path, a=RUN, b=f"from p.c import LIMIT\n{MADE[10:]}", c="LIMIT = 3\n")
    assert split == whole
    assert digest(tmp_path, a=RUN, b=MADE.replace("3", "4")) != whole


def test_what_is_imported_from_elsewhere_is_told_by_where_it_comes_from(tmp_path: Path) -> None:
    use = "def run(x):\n    return {}(x)\n"
    whole = digest(tmp_path, a="from math import floor\n" + use.format("floor"))
    assert digest(tmp_path, a="import math\n" + use.format("math.floor")) == whole
    assert digest(tmp_path, a="from math import floor as down\n" + use.format("down")) == whole
    assert digest(tmp_path, a="from math import ceil as floor\n" + use.format("floor")) != whole


def test_namesakes_are_not_confused(tmp_path: Path) -> None:
    """Both are reached; who uses which matters, also where they differ only in what they use in their turn."""
    run = "from p import b, c\n\ndef run(x):\n    return {}(x) - {}(x)\n"
    assert digest(tmp_path, a=run.format("b.f", "c.f"), b=MADE, c=MADE.replace("3", "4")) != digest(
        tmp_path, a=run.format("c.f", "b.f"), b=MADE, c=MADE.replace("3", "4")
    )


def test_a_local_name_hides_a_module_of_that_name(tmp_path: Path) -> None:
    hides = "from p import b\n\ndef run(b):\n    return b.f\n"
    assert written(tmp_path, a=hides, b=MADE).reached(Place("p.a", "run")) == {("p.a", "run")}


def test_what_cannot_be_told_takes_the_whole_module(tmp_path: Path) -> None:
    sources = written(tmp_path, a="from p import b\n\ndef run(n):\n    return getattr(b, n)\n", b=MADE)
    assert {("p.b", "f"), ("p.b", "LIMIT")} <= sources.reached(Place("p.a", "run"))
    by_name = written(tmp_path / "x", a="def run(load):\n    return load('p.b')\n", b=MADE)
    assert ("p.b", "f") in by_name.reached(Place("p.a", "run"))


def test_classes_that_annotations_name_are_followed_and_not_written(tmp_path: Path) -> None:
    run = "from p.b import {}\n\ndef run(x: {}):\n    return x.y\n"
    made = "class C:\n    y = 1\n\nAlias = C | None\n"
    assert digest(tmp_path, a=run.format("C", "C"), b=made) == digest(tmp_path, a=run.format("Alias", "Alias"), b=made)
    assert digest(tmp_path, a=run.format("C", "C"), b=made) != digest(
        tmp_path, a=run.format("C", "C"), b=made.replace("1", "2")
    )
    checked = "from typing import TYPE_CHECKING\nif TYPE_CHECKING:\n    " + run.format("C", "C")
    assert written(tmp_path / "t", a=checked, b=made).reached(Place("p.a", "run")) == {("p.a", "run")}


def test_what_an_import_does_belongs_to_what_the_module_defines(tmp_path: Path) -> None:
    whole = digest(tmp_path, a=RUN, b=MADE)
    assert digest(tmp_path, a=RUN, b=MADE + "LIMIT2 = 1\n") == whole, "another name does nothing"
    assert digest(tmp_path, a=RUN, b=MADE + "if __name__ == '__main__':\n    f(1)\n") == whole
    assert digest(tmp_path, a=RUN, b=MADE + "f(1)\n") != whole
    assert digest(tmp_path, a=RUN, b=MADE + "LIMIT += 1\n") != whole


def test_closed_rooms_and_the_doors_of_other_parts_are_not_entered(tmp_path: Path) -> None:
    run = "from p.shut import f\nfrom p.door import enter\n\ndef run():\n    return f(), enter()\n"
    one = digest(tmp_path, a=run, shut="def f():\n    return 1\n", door="def enter():\n    return 1\n")
    assert one == digest(tmp_path, a=run, shut="def f():\n    return 2\n", door="def enter():\n    return 2\n")


def test_a_warning_says_nothing_to_a_digest(tmp_path: Path) -> None:
    run = "import warnings\n\ndef run(x):\n    warnings.warn({})\n"
    assert digest(tmp_path, a=run.format("'short'")) == digest(tmp_path, a=run.format("f'{x}', stacklevel=2"))
