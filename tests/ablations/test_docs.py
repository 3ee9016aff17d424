"""The pages on the methods: current, complete, and true to the code."""

from __future__ import annotations

import re
from collections.abc import Callable
from pathlib import Path
from types import ModuleType

import pytest
import torch
import yaml

from ablations.catalogue import docs
from ablations.catalogue.docstrings import functions, markdown, parted, statements
from ablations.catalogue.methods import classes_of, placement_code, properties, reducer_code
from reducers import ATS, Count, Drop, EViT, Ratio, Stack, ToMe, TopK, at, available, placement_from
from reducers import methods as all_methods

NAMES = [name for name, cls in available().items() if cls.__module__.startswith("reducers.methods.")]


@pytest.fixture(scope="module")
def pages() -> dict[str, str]:
    return docs.pages()


def test_the_pages_are_current(pages: dict[str, str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(docs, "pages", lambda: pages)
    assert docs.stale() == [], "run `sievit docs` (make docs)"


def test_every_method_has_a_page_and_a_line_in_the_index(pages: dict[str, str]) -> None:
    assert set(pages) == {docs.INDEX, "families.md", *(f"methods/{name}.md" for name in NAMES)}
    for name in NAMES:
        assert f"[`{name}`]({name}.md)" in pages[docs.INDEX]
        for heading in (f"# `{name}`", "## Settings", "## Example", "| source |", "| work of its own |"):
            assert heading in pages[f"methods/{name}.md"], (name, heading)


@pytest.mark.parametrize("name", NAMES)
def test_the_examples_say_the_same_in_python_and_in_yaml(name: str, pages: dict[str, str]) -> None:
    code, data = re.findall(r"```(?:python|yaml)\n(.*?)```", pages[f"methods/{name}.md"], re.DOTALL)
    imports, call = code.rsplit("fast = reduce_tokens(model, ", 1)
    space: dict[str, object] = {}
    exec(imports, space)
    placement = eval(call.strip()[:-1], space)
    assert placement.spec() == placement_from(yaml.safe_load(data)["stages"], depth=12).spec()


def test_properties_tell_methods_apart() -> None:
    known = {about.name: about for about in properties()}
    assert (known["ats"].count, known["topk"].count) == ("adaptive", "fixed")
    assert (known["dynamicvit"].weights, known["tome"].weights) == ("trained", "off the shelf")
    assert known["dynamicvit"].site == "input" and known["topk"].site == "attention"
    assert known["small_input"].site == "image" and not known["small_input"].stacks
    assert known["stvit"].why_not == "it replaces the computation of its blocks" and known["evit"].stacks
    assert known["small_input"].why_not == "it changes the input image"
    assert known["rlt"].why_not == "it chooses by the input's pixels, before any block"
    assert known["rlt"].site == "pixels" and known["rlt"].inputs == ("clips",) and known["evs"].stacks


def test_code_is_what_a_person_would_type() -> None:
    assert reducer_code(TopK(Count(9), score="value_norm")) == "TopK(Count(9), score='value_norm')"
    evit = EViT(Ratio(0.7, of="initial"), select=ATS(Ratio("1/3")))
    assert reducer_code(evit) == "EViT(Ratio(0.7, of='initial'), select=ATS(Ratio('1/3')))"
    placement = at(range(3, 6), evit) | at([7, 9], Stack(ToMe(Drop(3)), TopK(Count(4)))) | at(11, TopK(Count(2)))
    assert placement_code(placement) == (
        "at(range(3, 6), EViT(Ratio(0.7, of='initial'), select=ATS(Ratio('1/3')))) | "
        "at([7, 9], Stack(ToMe(Drop(3)), TopK(Count(4)))) | at(11, TopK(Count(2)))"
    )
    budgets, methods = classes_of(placement)
    assert budgets == ["Count", "Drop", "Ratio"] and set(methods) == {"ATS", "EViT", "Stack", "ToMe", "TopK"}
    assert all(hasattr(all_methods, name) for name in methods if name != "Stack")


def test_tagged_statements_are_found_wherever_they_stand(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    source = '''"""A module. Its constant is ours [D]. So is nothing else."""

LIMIT = 4  # from memory [R]
# a comment that goes on
# over two lines [D: because it must]; the rest is plain


def score(x, *, low=0.5):
    """Scores ``x`` (D, [M]). As recalled [R/D]."""
    return x * low


def _hidden():
    """Not for readers."""


class Thing:
    """A thing."""

    def act(self):
        """Acts at once [D]."""
'''
    (tmp_path / "tagged.py").write_text(source)
    monkeypatch.syspath_prepend(tmp_path)
    import tagged

    assert isinstance(tagged, ModuleType)
    assert list(statements(tagged)) == [
        "Its constant is ours [D].", "As recalled [R/D].", "Acts at once [D].", "From memory [R]",
        "A comment that goes on over two lines [D: because it must]; the rest is plain",
    ]  # fmt: skip
    assert functions(tagged) == ["**`score(x, *, low=0.5)`**", "Scores `x` (D, [M]). As recalled [R/D]."]
    assert markdown("``a``\n# b\n> c") == "`a`\n\\# b\n\\> c"


def test_the_work_of_a_method_is_counted_alike_every_time_and_leaves_randomness_alone() -> None:
    placement = at([3], ATS(Count(50)))
    before = torch.get_rng_state()
    first = docs.work_of(placement)
    assert torch.equal(torch.get_rng_state(), before)
    assert first == docs.work_of(placement) and 0 < first.share < 0.01 and first.parameters == 0


def test_what_changed_is_said_and_written(
    tmp_path: Path, pages: dict[str, str], monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str],
    ablate: Callable[..., int],
) -> None:  # fmt: skip
    monkeypatch.setattr(docs, "pages", lambda: pages)
    monkeypatch.setattr(docs.stale, "__defaults__", (tmp_path / "pages",))
    monkeypatch.setattr(docs.write, "__defaults__", (tmp_path / "pages",))
    assert ablate("docs", "--check") == 1
    assert ablate("docs") == 0 and f"{len(pages)} pages changed" in capsys.readouterr().out
    (tmp_path / "pages" / "methods" / "gone.md").write_text("a method that is no more")
    (tmp_path / "pages" / "methods" / "ats.md").write_text("changed by hand")
    assert ablate("docs", "--check") == 1
    assert "stale: methods/ats.md\nstale: methods/gone.md" in capsys.readouterr().out
    assert ablate("docs") == 0 and not (tmp_path / "pages" / "methods" / "gone.md").exists()
    assert ablate("docs", "--check") == 0


def test_a_docstring_is_parted_into_its_prose_and_the_meaning_of_each_setting() -> None:
    prose, settings = parted("""Do it.

    More on it [D].

    Args:
        first: of two; see ``a: b``.
        second: goes on
            over a line.

    And after it.
    """)
    assert prose == "Do it.\n\nMore on it [D].\n\nAnd after it."
    assert settings == {"first": "of two; see ``a: b``.", "second": "goes on over a line."}
    assert parted("No list.") == ("No list.", {})


@pytest.mark.parametrize("name", NAMES)
def test_every_setting_of_a_method_is_explained_in_its_docstring(name: str) -> None:
    cls = available()[name]
    _, settings = parted(cls.__doc__ or "")
    assert list(settings) == [parameter.name for parameter in cls.settings()], "in the constructor's order"
    assert all(text.endswith((".", "…")) for text in settings.values())
