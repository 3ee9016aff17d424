"""Tables, findings, the page, and the command line."""

from __future__ import annotations

import json
import re
import subprocess
import sys
import xml.etree.ElementTree as ElementTree
from html.parser import HTMLParser
from pathlib import Path

import pandas as pd
import pytest

from analysis import comparison, findings, published, tables
from analysis.__main__ import main
from analysis.frame import Results, Setting, read_results
from analysis.matching import merge_seeds
from analysis.report import Written, write_analysis
from tests.analysis.synthetic import DENSE_TOP1, Maker

DEIT_TINY = Setting("imagefolder", "deit_tiny_patch16_224", "file", 928, "w", "d")
EVIL = '<script>alert("x")</script> & 100 % of $x_1$ | \\input{y}'


class Page(HTMLParser):
    """Tags, ids, links and addresses of a page."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.ids: list[str] = []
        self.targets: list[str] = []
        self.addresses: list[str] = []
        self.tags: list[str] = []
        self.feed(text)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append(tag)
        for name, value in attrs:
            if name == "id" and value:
                self.ids.append(value)
            if name == "href" and value and value.startswith("#"):
                self.targets.append(value[1:])
            elif name in ("href", "src", "srcset", "data") and value:
                self.addresses.append(value)


def spec(results: Results, name: str) -> pd.DataFrame:
    return results.finished[results.finished["spec"] == name]


def test_a_table_holds_the_numbers_of_the_trials(results: Results) -> None:
    rows = spec(results, "methods")
    table = tables.measured(rows, results.images)
    assert table["variant"].iloc[0] == "dense" and table["share_of_dense"].iloc[0] == 1
    assert len(table) == 26
    row = rows[(rows["variant"] == "ToMe") & (rows["x"] == 0.45)].iloc[0]
    ours = table[table["keys"] == row["key"]].iloc[0]
    assert ours["top1"] == row["top1"] and ours["gmacs"] == row["gmacs_mean"]
    assert ours["difference"] == pytest.approx(row["top1"] - row["dense_top1"])
    assert ours["difference_low"] < ours["difference"] < ours["difference_high"]
    assert ours["tokens_out"] == row["tokens"][-1]


def test_a_table_is_shown_with_units_intervals_and_keys(results: Results) -> None:
    shown = tables.display(tables.measured(spec(results, "score_functions"), results.images))
    assert list(shown.columns)[3:9] == [
        "GMACs",
        "GMACs, reference",
        "share of dense (%)",
        "top-1 (%)",
        "to dense (points)",
        "tokens out",
    ]
    row = shown[shown["variant"] == "random (3 seeds)"].iloc[0]
    assert re.fullmatch(r"\d+\.\d \[\d+\.\d, \d+\.\d\]", row["top-1 (%)"])
    assert re.fullmatch(r"[−+]?\d+\.\d \[[−+]?\d+\.\d, [−+]?\d+\.\d\]", row["to dense (points)"])
    assert re.fullmatch(r"[0-9a-f]{16} \+2", row["trial"]) and "±" in row["GMACs"]


def test_percent_has_no_negative_zero() -> None:
    assert tables.percent(-0.0001, sign=True) == "0.0" and tables.percent(-0.0001) == "0.0"
    assert tables.percent(0.0123, sign=True) == "+1.2" and tables.percent(-0.0123) == "−1.2"
    assert tables.with_bounds(0.5, float("nan"), float("nan")) == "50.0"


def test_markdown_and_latex_cannot_be_broken_by_a_cell() -> None:
    frame = pd.DataFrame({"a": [EVIL], "b": ["two\nlines"]})
    markdown = tables.to_markdown(frame)
    assert markdown.count("\n") == 3 and "<script" not in markdown and "\\|" in markdown
    source = tables.to_latex(frame, caption="50 % & more", label="t")
    assert r"\textbackslash{}input\{y\}" in source and r"\caption{50 \% \& more}" in source and r"\$x\_1\$" in source


def test_published_numbers_stand_apart_and_say_what_differs(results: Results, written: Written) -> None:
    folder = results.folder / "tables"
    text = (folder / "stage_placement.md").read_text()
    ours, theirs = text.split("## Published")
    assert "73.1" not in ours and "73.1" in theirs and "DeiT-S" in theirs and "Table A.4" in theirs
    assert "other model (DeiT-S); other data (ImageNet-1k val)" in theirs and "Not measured here" in theirs
    assert "published" not in (folder / "stage_placement.csv").read_text()
    assert len(pd.read_csv(folder / "stage_placement_published.csv")) == 4
    assert pd.read_csv(folder / "methods.csv")["variant"].iloc[0] == "dense"
    assert (folder / "methods.tex").read_text().count(r"\begin{tabular}") == 2


def test_published_rows_fit_the_question() -> None:
    stacking = published.published_rows("evit_stacking", DEIT_TINY)
    assert {79.5, 79.8} <= set(stacking["top1"]) and set(stacking["table"]) == {"Table A.5", "README"}
    methods = published.published_rows("methods", DEIT_TINY)
    assert methods["model"].iloc[0] == "DeiT-Ti" and "other model" not in methods["differs"].iloc[0]
    assert "all 50,000 images of ImageNet-1k val (here 928 images)" in methods["differs"].iloc[0]
    assert set(methods["model"]) <= {"DeiT-Ti", "DeiT-S", "DeiT-B"} and "Kinetics-400" not in set(methods["dataset"])
    assert published.published_rows("unheard_of", DEIT_TINY).empty
    assert published.published_rows("score_functions", DEIT_TINY).empty
    assert "curves only" in published.published_note("score_functions")
    placed = published.published_rows("stage_placement", DEIT_TINY)
    assert not placed["differs"].str.contains("trained").any()  # Table A.4 is off the shelf


def test_a_clear_leader_is_told_from_one_that_is_not(results: Results) -> None:
    rows = merge_seeds(spec(results, "class_token"))
    found = comparison.comparisons(rows, by="variant", images=results.images)
    cheapest = found[0]
    assert cheapest.names[0] == "class token kept" and cheapest.clear
    head = comparison.tally(found, "Class token")
    assert head is not None and f"class token kept leads at {len(found)} of {len(found)} costs" in head.text
    scores = findings.answers("score_functions", spec(results, "score_functions"), results.images)
    assert "Clearly behind wherever compared: " in scores[0].text and "random" in scores[0].text
    assert any("not distinguishable from it: class attention" in finding.text for finding in scores)
    assert all(key in set(results.trials["key"]) for finding in scores for key in finding.keys)


def test_a_dearer_leader_has_not_beaten_a_cheaper_trial() -> None:
    maker = Maker(images=2000)
    for name, keep, accuracy in (("A", 0.50, 0.88), ("B", 0.47, 0.70)):
        maker.add("s", name, reducer=[{"name": name}], blocks=[3], keep=keep, accuracy=accuracy)
    found = comparison.comparisons(merge_seeds_of(maker), by="variant", images=maker.images)
    assert found[0].standing == ("cheaper",) and not found[0].clear
    assert "Behind, but also cheaper" in comparison.say(found[0], 0.16).detail


def merge_seeds_of(maker: Maker) -> pd.DataFrame:
    from analysis.frame import tidy

    return merge_seeds(tidy(maker.frame()))


def test_findings_answer_each_question(results: Results) -> None:
    def said(name: str) -> str:
        return " ".join(f.text for f in findings.answers(name, spec(results, name), results.images))

    assert re.search(r"ATS: K = 8: 0\.\d+ GMACs, \d+\.\d %", said("k_values"))
    assert "Best placement: block" in said("stage_placement")
    assert "class token kept: never lost its class token" in said("class_token")
    assert re.search(r"class token sampled: lost the class token in \d", said("class_token"))
    assert "Against EViT alone at the same cost, stacking" in said("evit_stacking")
    assert re.search(r"saves \d+\.\d to \d+\.\d % of its GMACs", said("evit_stacking"))
    assert "not distinguishable from the dense model" in said("methods")


def test_the_limits_of_the_images_are_said_in_words(results: Results) -> None:
    setting = results.settings()[0]
    text = " ".join(findings.limits(setting, results.finished, results.images))
    assert "the same 400 images" in text and "80 % of repetitions" in text and "does not say that they are zero" in text
    assert re.search(r"known to ± \d\.\d points", text)


def test_the_page_is_one_file_with_every_figure_and_no_address(results: Results, written: Written) -> None:
    text = written.report.read_text(encoding="utf-8")
    page = Page(text)
    assert page.tags.count("img") == 14 and all(a.startswith("data:image/svg+xml;base64,") for a in page.addresses)
    assert not {"script", "link", "iframe"} & set(page.tags)
    assert "url(" not in text and "@import" not in text
    assert set(page.targets) <= set(page.ids) and len(page.ids) == len(set(page.ids))
    assert 'name="viewport"' in text and "@media print" in text
    for key in results.trials["key"]:
        assert f"k-{key}" in page.ids


def test_the_page_opens_with_answers_and_lists_what_failed(results: Results, written: Written) -> None:
    text = written.report.read_text(encoding="utf-8")
    assert text.index("In short:") < text.index("<img")
    assert "By which score should tokens be chosen?" in text
    assert "ReducerError: r = 40 of 64 tokens" in text and "1 of this spec's trials failed" in text
    assert "No image was skipped." in text and "python -m ablations run" in text and "2.15" in text


def test_figures_are_written_as_png_and_svg(written: Written) -> None:
    assert len(written.figures) == 28 and all(path.stat().st_size > 1000 for path in written.figures)
    for path in written.figures:
        if path.suffix == ".svg":
            assert ElementTree.parse(path).getroot().tag.endswith("svg")
        else:
            assert path.read_bytes().startswith(b"\x89PNG")
    names = {path.stem for path in written.figures}
    assert {"methods", "k_values_effect", "stage_placement_by_block", "evit_stacking_gain"} <= names


def test_writing_twice_writes_the_same(results: Results, written: Written) -> None:
    before = {path: path.read_bytes() for path in (*written.figures, *written.tables, written.report)}
    again = write_analysis(results)
    assert {path: path.read_bytes() for path in (*again.figures, *again.tables, again.report)} == before


def test_everything_from_files_is_escaped(tmp_path: Path) -> None:
    maker = Maker(images=30)
    for keep in (0.3, 0.6):
        maker.add(
            EVIL,
            EVIL,
            reducer=[{"name": EVIL}],
            blocks=[3],
            keep=keep,
            accuracy=0.8,
            budget=EVIL,
            device=EVIL,
        )
    maker.fail(EVIL, EVIL, EVIL)
    about = {EVIL: {"title": EVIL, "question": EVIL, "caption": EVIL}}
    run = {"specs": about, "skipped": [[EVIL, EVIL]], "command": EVIL, "versions": {EVIL: EVIL}}
    written = write_analysis(read_results(maker.save(tmp_path, run=run)))
    text = written.report.read_text(encoding="utf-8")
    assert "<script" not in text and "&lt;script&gt;" in text
    assert "script" not in Page(text).tags
    assert all(path.parent.parent == tmp_path for path in written.figures)


def test_unknown_specs_and_thin_data_still_get_figure_and_table(tmp_path: Path) -> None:
    maker = Maker(images=30)
    maker.add(
        "my_idea", "only", reducer=[{"name": "new"}], blocks=[2], keep=0.5, accuracy=0.8,
        dense_top1=None, dense_gmacs=None, coverage=None, class_kept=None, tokens=None, tokens_std=None,
        budget=None,
    )  # fmt: skip
    maker.fail("broken", "x", "no memory")
    out = maker.save(tmp_path, samples=False)
    for path in (out / "images").iterdir():
        path.unlink()
    written = write_analysis(read_results(out))
    assert [path.name for path in written.figures] == ["my_idea.png", "my_idea.svg"]
    assert written.skipped_specs == ("score_functions", "k_values", "stage_placement", "class_token",
                                     "evit_stacking", "methods", "broken")  # fmt: skip
    text = written.report.read_text(encoding="utf-8")
    assert "Spec broken has no finished trial" in text and "no memory" in text and "ONLY 30 IMAGES" in text


def test_only_the_dense_model_is_said_to_be_only_that(tmp_path: Path) -> None:
    maker = Maker(images=30)
    maker.add("methods", "dense", reducer=[], blocks=[], keep=1.0, accuracy=DENSE_TOP1)
    text = write_analysis(read_results(maker.save(tmp_path))).report.read_text(encoding="utf-8")
    assert "there is nothing to compare" in text


def test_two_models_in_one_folder_get_files_of_their_own(tmp_path: Path) -> None:
    maker = Maker(images=30)
    for model in ("small", "tiny"):
        for name in ("A", "B"):
            reducer = [{"name": name, "of": model}]
            maker.add("methods", name, reducer=reducer, blocks=[3], keep=0.5, accuracy=0.8, model=model)
    written = write_analysis(read_results(maker.save(tmp_path)))
    names = [path.name for path in written.figures]
    assert len(set(names)) == len(names) and any("small" in n for n in names) and any("tiny" in n for n in names)
    page = Page(written.report.read_text(encoding="utf-8"))
    assert len(page.ids) == len(set(page.ids))


def test_command_line_writes_and_says_what(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    maker = Maker(images=30)
    maker.add("my_idea", "only", reducer=[{"name": "new"}], blocks=[2], keep=0.5, accuracy=0.8)
    maker.fail("my_idea", "other", "no memory")
    out = maker.save(tmp_path, samples=False)
    assert main([str(out)]) == 0
    said = capsys.readouterr().out
    assert "1 finished trials, 1 failed: 3 figures" in said and str(out / "report.html") in said
    assert main([str(out), "--quiet"]) == 0 and capsys.readouterr().out == ""


def test_command_line_refuses_a_missing_or_empty_folder(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for folder in (tmp_path / "nowhere", tmp_path):
        assert main([str(folder)]) == 2
        assert f"make ablations OUT={folder}" in capsys.readouterr().err


def test_command_line_reports_a_run_in_which_everything_failed(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    maker = Maker(images=30)
    maker.fail("methods", "ATS", "weights of the wrong shape")
    assert main([str(maker.save(tmp_path, samples=False))]) == 1
    assert "no trial finished" in capsys.readouterr().err
    assert "weights of the wrong shape" in (tmp_path / "report.html").read_text(encoding="utf-8")


def test_help_teaches(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit, match="0"):
        main(["--help"])
    said = capsys.readouterr().out
    assert "OUT/report.html" in said and "exit status" in said and "example" in said


def test_analysis_needs_neither_torch_nor_the_other_packages() -> None:
    program = (
        "import sys, json, analysis.__main__; "
        "print(json.dumps([m for m in ('torch', 'timm', 'ray', 'reducers', 'ablations', 'matplotlib.pyplot') "
        "if m in sys.modules]))"
    )
    found = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True)
    assert set(json.loads(found.stdout)) <= {"matplotlib.pyplot"}  # seaborn imports it; no figure is made through it
