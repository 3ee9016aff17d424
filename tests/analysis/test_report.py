"""Tables, findings, the page, and the command line."""

from __future__ import annotations

import copy
import json
import re
import subprocess
import sys
import xml.etree.ElementTree as ElementTree
from html.parser import HTMLParser
from pathlib import Path

import numpy as np
import pandas as pd
import pytest

from analysis import caveats, findings, page, published, stats, tables, verdict, words
from analysis.__main__ import main
from analysis.facts import comparison
from analysis.facts.matching import merge_seeds
from analysis.facts.outcomes import with_answers
from analysis.facts.overview import Overview
from analysis.facts.spec import Facts
from analysis.frame import Results, Setting, read_results, tidy
from analysis.plots import Drawn
from analysis.questions import beside, question_of
from analysis.report import Written, write_analysis
from tests.analysis.asked import answers, beside_print, question
from tests.analysis.conftest import plainly
from tests.analysis.runs import whole_run
from tests.analysis.synthetic import DENSE_TOP1, SPECS, Maker
from tests.samples import sampled

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
    rows = results.finished
    return with_answers(rows[rows["spec"] == name], results.images)


def test_a_table_holds_the_numbers_of_the_trials(results: Results) -> None:
    rows = spec(results, "methods")
    table = tables.measured(Facts(rows))
    assert table["variant"].iloc[0] == "dense" and table["share_of_dense"].iloc[0] == 1
    assert len(table) == 26
    row = rows[(rows["variant"] == "ToMe") & (rows["x"] == 0.45)].iloc[0]
    ours = table[table["keys"] == row["key"]].iloc[0]
    assert ours["top1"] == row["top1"] and ours["gmacs"] == row["gmacs_mean"]
    assert ours["difference"] == pytest.approx(row["top1"] - row["dense_top1"])
    assert ours["difference_low"] < ours["difference"] < ours["difference_high"]
    assert ours["tokens_out"] == row["tokens"][-1]


def test_a_table_is_shown_with_units_intervals_and_keys(results: Results) -> None:
    shown = tables.display(tables.measured(Facts(spec(results, "score_functions"))))
    assert list(shown.columns)[3:10] == [
        "GMACs",
        "GMACs, reference",
        "share of dense (%)",
        "top-1 (%)",
        "over seeds",
        "to dense (points)",
        "tokens out",
    ]
    row = shown[shown["variant"] == "random (3 seeds)"].iloc[0]
    assert re.fullmatch(r"\d+\.\d \[\d+\.\d, \d+\.\d\]", row["top-1 (%)"])
    assert re.fullmatch(r"[−+]?\d+\.\d \[[−+]?\d+\.\d, [−+]?\d+\.\d\]", row["to dense (points)"])
    assert re.fullmatch(r"[0-9a-f]{8} \+2", row["trial"]) and "±" in row["GMACs"]


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
    ours, theirs = text.split("## Beside print")[0], text.split("## Published")[1]
    assert "73.1" not in ours and "73.1" in theirs and "DeiT-S" in theirs and "Table A.4" in theirs
    assert "other model (DeiT-S); other data (ImageNet-1k val)" in theirs and "Not measured here" in theirs
    assert "published" not in (folder / "stage_placement.csv").read_text()
    assert len(pd.read_csv(folder / "stage_placement_published.csv")) == 4
    assert pd.read_csv(folder / "methods.csv")["variant"].iloc[0] == "dense"
    assert (folder / "methods.tex").read_text().count(r"\begin{tabular}") == 3  # ours, beside print, print


def test_published_rows_fit_the_question() -> None:
    stacking = published.published_rows(question_of("stacking").printed, DEIT_TINY)
    assert {79.5, 79.8} <= set(stacking["top1"]) and set(stacking["table"]) == {"Table A.5", "README"}
    methods = published.published_rows(question_of("front").printed, DEIT_TINY)
    assert methods["model"].iloc[0] == "DeiT-Ti" and "other model" not in methods["differs"].iloc[0]
    assert "all 50,000 images of ImageNet-1k val (here 928 images)" in methods["differs"].iloc[0]
    assert set(methods["model"]) <= {"DeiT-Ti", "DeiT-S", "DeiT-B"} and "Kinetics-400" not in set(methods["dataset"])
    assert published.published_rows(question_of("ranking").printed, DEIT_TINY).empty
    assert published.published_rows(question_of("scores").printed, DEIT_TINY).empty
    assert "curves only" in question_of("scores").note
    placed = published.published_rows(question_of("placement").printed, DEIT_TINY)
    assert not placed["differs"].str.contains("trained").any()  # Table A.4 is off the shelf


def test_a_clear_leader_is_told_from_one_that_is_not(results: Results) -> None:
    rows = merge_seeds(spec(results, "class_token"))
    found = comparison.comparisons(rows, by="variant")
    cheapest = found[0]
    assert cheapest.names[0] == "class token kept" and cheapest.clear
    head = words.tally(found, "treatment of the class token")
    assert (
        head is not None
        and f"class token kept has the highest top-1 at {len(found)} of {len(found)} costs" in head.text
        and head.headline
    )
    scores = answers(spec(results, "score_functions"))
    assert "Clearly behind wherever compared: " in scores[0].text and "random" in scores[0].text
    assert any("not distinguishable from it: class attention" in finding.text for finding in scores)
    assert all(key in set(results.trials["key"]) for finding in scores for key in finding.keys)


def test_a_dearer_leader_has_not_beaten_a_cheaper_trial() -> None:
    maker = Maker(images=2000)
    for name, keep, accuracy in (("A", 0.50, 0.88), ("B", 0.47, 0.70)):
        maker.add("s", name, reducer=[{"name": name}], blocks=[3], keep=keep, accuracy=accuracy)
    found = comparison.comparisons(merge_seeds_of(maker), by="variant")
    assert found[0].standing == ("cheaper",) and not found[0].clear
    assert "Behind, but also cheaper" in words.say(found[0], 0.16).detail


def merge_seeds_of(maker: Maker) -> pd.DataFrame:
    from analysis.frame import tidy

    return merge_seeds(with_answers(tidy(maker.frame()), maker.images))


def test_findings_answer_each_question(results: Results) -> None:
    def said(name: str) -> str:
        return " ".join(f.text for f in answers(spec(results, name)))

    assert re.search(r"ATS: K = 8: 0\.\d+ GMACs, \d+\.\d %", said("k_values"))
    assert re.search("(Best placement|No placement is clearly best): block", said("stage_placement"))
    assert "class token kept: never lost its class token" in said("class_token")
    assert re.search(r"class token sampled: lost the class token in \d", said("class_token"))
    assert "Against EViT alone at the same cost, stacking" in said("evit_stacking")
    assert re.search(r"saves \d+\.\d to \d+\.\d % of its GMACs", said("evit_stacking"))
    assert "not distinguishable from the dense model" in said("methods")


def test_a_spec_of_anyones_own_is_answered_by_the_kind_it_names(results: Results) -> None:
    rows = spec(results, "evit_stacking").assign(spec="mine")
    assert "stacking" in answers(tidy(rows, {"mine": {"answers": "stacking"}}))[0].text
    assert tidy(rows)["kind"].tolist() == ["ranking"] * len(rows)
    assert answers(tidy(rows))[0].text.startswith("No series is clearly best")


def test_the_limits_of_the_images_are_said_in_words(results: Results) -> None:
    setting = results.settings()[0]
    text = " ".join(findings.limits(setting, with_answers(results.of(setting), results.images)))
    assert "the same 400 images" in text and "80 % of repetitions" in text and "does not say that they are zero" in text
    assert re.search(r"known to ± \d\.\d points", text)


def test_the_page_is_one_file_with_every_figure_and_no_address(results: Results, written: Written) -> None:
    text = written.report.read_text(encoding="utf-8")
    found = Page(text)
    assert found.tags.count("img") == len(written.figures) // 2 and all(
        a.startswith("data:image/svg+xml;base64,") for a in found.addresses
    )
    assert not {"link", "iframe"} & set(found.tags) and found.tags.count("script") == 1
    assert not re.search("fetch|XMLHttpRequest|import\\b|eval|http", text[text.index("<script>") :])
    assert "url(" not in text and "@import" not in text
    assert set(found.targets) <= set(found.ids) and len(found.ids) == len(set(found.ids))
    assert 'name="viewport"' in text and "@media print" in text
    for key in results.trials["key"]:
        assert f"k-{key[:8]}" in found.ids and f"<code>{key}</code>" in text


def test_the_page_opens_with_answers_and_lists_what_failed(results: Results, written: Written) -> None:
    text = written.report.read_text(encoding="utf-8")
    assert text.index("Measured on:") < text.index("<img")
    assert "By which score should tokens be chosen?" in text
    assert "ReducerError: r = 40 of 64 tokens" in text and "1 of this spec's trials failed" in text
    assert "No image was skipped." in text and "python -m ablations run" in text and "2.15" in text


def test_each_question_is_answered_in_few_words_and_rows(results: Results, answered: pd.DataFrame) -> None:
    """Who wins, or within what the choice does not matter; and a table of the same."""
    for _, rows in answered.groupby("spec"):
        facts, asked = Facts(rows, results.images), question(rows)
        said, few = asked.verdict(facts), asked.few(facts)
        assert 3 < len(said.split()) <= verdict.WORDS and said.endswith("."), said
        assert 1 <= len(few) <= verdict.ROWS and len(few.columns) <= 5
        assert re.search(r"\d", said) and words.SAME not in said


def test_a_choice_that_does_not_matter_is_bounded_by_an_interval_for_all_pairs() -> None:
    """Two that answer alike but for a few images, one that is clearly worse, at three costs."""
    maker = Maker(images=2000)
    for name, accuracy in (("A", 0.80), ("B", 0.80), ("C", 0.60)):
        for share in (0.4, 0.5, 0.6):
            maker.add("s", name, reducer=[{"name": name}], blocks=[3], keep=share, accuracy=accuracy, target=share)
    rows = with_answers(tidy(maker.frame()), maker.images)
    facts = Facts(rows)
    found = facts.choice
    assert found is not None and set(found.best) == {"A", "B"} and found.last is not None and found.last[0] == "C"
    pairs = [rows[(rows["variant"] == name)].sort_values("target")["answers"].to_list() for name in ("A", "B")]
    tests = [stats.mcnemar(a, b, level=1 - 0.05 / 3) for a, b in zip(*pairs, strict=True)]
    widest = max(one.high if one.difference > 0 else -one.low for one in tests)
    assert found.bound == pytest.approx(widest)
    said = question(rows).verdict(facts)
    assert f"the choice matters by at most {100 * widest:.1f} points at any cost; C loses" in said
    thin = Facts(rows.assign(answers=[one[:40] for one in rows["answers"]], images=40))
    assert question(rows).verdict(thin).startswith(("40 images do not decide", "A or B", "3 of 3", "B or A"))


def test_where_cheap_trials_leave_the_choice_open_it_is_bounded_from_a_cost_on() -> None:
    """At the cheapest cost two answer other images rightly; above it they answer alike."""
    maker = Maker(images=500)
    for name in ("A", "B"):
        for share in (0.3, 0.5, 0.6):
            maker.add("s", name, reducer=[{"name": name}], blocks=[3], keep=share, accuracy=0.8, target=share)
    rows = with_answers(tidy(maker.frame()), maker.images)
    odd = (rows["variant"] == "A") & (rows["target"] == 0.3)
    rows["answers"] = [np.roll(one, 7) if moved else one for one, moved in zip(rows["answers"], odd, strict=True)]
    said = question(rows).verdict(Facts(rows))
    assert re.match(
        r"From 50 % of the dense cost on the choice between [AB] and [AB] matters by at most \d\.\d po", said
    )
    whole = Facts(rows).choice
    assert whole is not None and whole.bound is not None and whole.bound > verdict.OPEN


def test_one_that_is_clear_of_the_others_is_named_with_its_lead(results: Results) -> None:
    rows = spec(results, "class_token")
    said = question(rows).verdict(Facts(rows))
    assert re.match(r"class token kept is the best .*: clear of every other at 3 of 4 costs, by 5\.8 to 20\.2 po", said)
    told = question(rows).few(Facts(rows))["told apart from the next"].tolist()
    assert told[0].startswith("yes, by ") and told[-1] == ""


def test_the_fifth_row_is_compared_with_the_next_though_the_last_is_shown(results: Results) -> None:
    rows = Facts(spec(results, "class_token")).decisive
    assert rows is not None
    first, shown = rows.rows.iloc[:1], verdict.table(rows.rows, 1.0)
    many = pd.concat([first.assign(variant=f"as good {number}") for number in range(8)] + [rows.rows.iloc[-1:]])
    few = verdict.table(many.reset_index(drop=True), 1.0)
    assert shown["told apart from the next"].iloc[0].startswith("yes, by "), "the last is clearly worse than the first"
    fifth, last = few["told apart from the next"].tolist()[-2:]
    assert fifth.startswith("no, at most ") and last == "", "the fifth has an equal next"
    assert few["series"].iloc[-1].endswith("(last of 9)")


def test_a_point_says_what_it_stands_for_where_it_is_drawn(drawn: list[Drawn], tmp_path: Path) -> None:
    one = copy.deepcopy(next(each for each in drawn if each.name == "k_values"))
    _, text = page.save_figure(one, tmp_path, "k_values")
    said = page.settings_of(one.figure)
    trial = next(each for each in said if each["text"].startswith("top-K, block 3, K = 24: "))
    assert re.search(r"GMACs \(\d+ % of dense\), top-1 \d\d\.\d % \[", trial["text"])
    assert f"<title>{trial['text']}</title>" in text and 8 < len(said) == text.count("<circle") <= 12
    axes = one.figure.axes[0]
    left, bottom = axes.transData.inverted().transform(
        (trial["x"] / 96 * one.figure.dpi, (one.figure.get_figheight() - trial["y"] / 96) * one.figure.dpi)
    )
    share, top1 = re.findall(r": (0\.\d+) GMACs.*top-1 (\d+\.\d)", trial["text"])[0]
    assert (left, bottom) == (pytest.approx(float(share), abs=1e-3), pytest.approx(float(top1), abs=0.2))


@pytest.mark.usefixtures("plain_figures")
def test_the_set_of_the_last_run_is_shown_and_the_other_named(tmp_path: Path) -> None:
    maker = Maker(images=30)
    for model, digest in (("small", "1" * 64), ("tiny", "2" * 64)):
        maker.add("s", f"of {model}", reducer=[{"name": model}], blocks=[3], keep=0.5, accuracy=0.8, model=model,
                  weights_digest=digest)  # fmt: skip
    run = {"models": [{"model": "tiny", "weights_digest": "2" * 64, "data_digest": "d" * 64}]}
    text = write_analysis(read_results(maker.save(tmp_path, run=run))).report.read_text(encoding="utf-8")
    assert "Not shown" in text and "digit pairs, small, 30 images, off the shelf (1 trial)" in text
    assert text.count("<h2>Measured on") == 1 and "Measured on: digit pairs, tiny" in text


def test_hashes_stand_behind_a_touch_alone(written: Written) -> None:
    text = written.report.read_text(encoding="utf-8")
    shown = re.sub(
        r"<details.*?</details>", "", re.sub(r'<details class="keys">.*?</details>', "", text, flags=re.S), flags=re.S
    )
    assert re.findall(r"\b[0-9a-f]{8}\b", re.sub(r'src="[^"]*"|<td><a href="#k-.*?</td>', "", shown)) == []


def test_every_line_of_the_table_of_everything_can_be_sorted(results: Results, written: Written) -> None:
    text = written.report.read_text(encoding="utf-8")
    body = re.search(r'<table class="sortable">.*?<tbody>(.*?)</tbody>', text, re.S)
    assert body is not None
    lines = [re.findall(r"<td[^>]*>([^<]*)</td>", line) for line in body[1].strip().split("\n")]
    assert {len(line) for line in lines} == {10} and len(lines) > 150
    values = re.findall(r'data-v="([^"]*)"', body[1])
    assert len(values) == 5 * len(lines) and all(value == "" or float(value) == float(value) for value in values)


def test_every_figure_is_written_under_its_name(written: Written) -> None:
    assert len(written.figures) == 68 and {path.suffix for path in written.figures} == {".png", ".svg"}
    names = {path.stem for path in written.figures}
    assert {"methods", "k_values_effect", "stage_placement_by_block", "evit_stacking_gain", "methods_pareto"} <= names
    assert {"agreement", "clutter", "coverage", "tokens_per_block", "adaptivity_stages", "adaptivity_extremes"} <= names
    assert {"sampling_method", "single_multi_stage", "model_scaling", "runtime_speed", "finetuning", "budget_transfer",
            "methods_published", "score_functions_difference"} <= names  # fmt: skip


FOUR = ("agreement", "clutter", "class_token_dropped", "samples")  # a heat map, a forest plot, curves, pictures


@pytest.mark.parametrize("name", sampled(FOUR, quick=FOUR[:3]))
def test_figures_are_written_as_png_and_svg(drawn: list[Drawn], tmp_path: Path, name: str) -> None:
    paths, text = page.save_figure(copy.deepcopy(next(one for one in drawn if one.name == name)), tmp_path, name)
    assert [path.name for path in paths] == [f"{name}.png", f"{name}.svg"]
    assert paths[0].read_bytes().startswith(b"\x89PNG") and paths[1].read_text(encoding="utf-8") == text
    assert ElementTree.parse(paths[1]).getroot().tag.endswith("svg") and min(p.stat().st_size for p in paths) > 1000


@pytest.mark.usefixtures("plain_figures")
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
    assert text.count("<script") == 1 and "&lt;script&gt;" in text
    assert Page(text).tags.count("script") == 1
    assert all(path.parent.parent == tmp_path for path in written.figures)


@pytest.mark.usefixtures("plain_figures")
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
    assert written.skipped_specs == (*SPECS, "broken")
    text = written.report.read_text(encoding="utf-8")
    assert "Spec broken has no finished trial" in text and "no memory" in text and "ONLY 30 IMAGES" in text


@pytest.mark.usefixtures("plain_figures")
def test_only_the_dense_model_is_said_to_be_only_that(tmp_path: Path) -> None:
    maker = Maker(images=30)
    maker.add("methods", "dense", reducer=[], blocks=[], keep=1.0, accuracy=DENSE_TOP1)
    text = write_analysis(read_results(maker.save(tmp_path))).report.read_text(encoding="utf-8")
    assert "there is nothing to compare" in text


@pytest.mark.usefixtures("plain_figures")
def test_two_models_in_one_folder_get_files_of_their_own(tmp_path: Path) -> None:
    maker = Maker(images=30)
    for model in ("small", "tiny"):
        for name in ("A", "B"):
            reducer = [{"name": name, "of": model}]
            maker.add("methods", name, reducer=reducer, blocks=[3], keep=0.5, accuracy=0.8, model=model)
    written = write_analysis(read_results(maker.save(tmp_path, samples=False)))
    names = [path.name for path in written.figures]
    assert len(set(names)) == len(names) and any("small" in n for n in names) and any("tiny" in n for n in names)
    found = Page(written.report.read_text(encoding="utf-8"))
    assert len(found.ids) == len(set(found.ids))


def test_command_line_writes_and_says_what(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    maker = Maker(images=30)
    maker.add("my_idea", "only", reducer=[{"name": "new"}], blocks=[2], keep=0.5, accuracy=0.8)
    maker.fail("my_idea", "other", "no memory")
    out = maker.save(tmp_path, samples=False)
    assert main([str(out)]) == 0
    said = capsys.readouterr().out
    assert "1 finished trials, 1 failed: 3 figures" in said and str(out / "report.html") in said
    monkeypatch.setattr(page, "save_figure", plainly)
    assert main([str(out), "--quiet"]) == 0 and capsys.readouterr().out == ""


def test_command_line_refuses_a_missing_or_empty_folder(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for folder in (tmp_path / "nowhere", tmp_path):
        assert main([str(folder)]) == 2
        assert f"make ablations OUT={folder}" in capsys.readouterr().err


@pytest.mark.usefixtures("plain_figures")
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
        "others = ('torch', 'timm', 'ray', 'reducers', 'ablations'); "
        "print(json.dumps([m for m in sys.modules if m.split('.')[0] in others]))"
    )
    found = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True)
    loaded = set(json.loads(found.stdout)) - {"ablations"}
    assert loaded and all(name.startswith("ablations.records") for name in loaded), "the format of results, alone"


def test_each_question_opens_the_report_with_its_own_answer(results: Results) -> None:
    def heads(name: str) -> str:
        return " ".join(f.text for f in answers(spec(results, name)) if f.headline)

    assert "comparisons with a leader" in heads("score_functions") and "are told apart (Holm)" in heads(
        "score_functions"
    )
    assert "inverse transform (paper)" in heads("sampling_method") and "costs 77 % of dense" in heads("sampling_method")
    assert "% of GMACs saved: top-1 changes by" in heads("single_multi_stage")
    assert re.search(r"ToMe: 1\.10 to 1\.39 times as fast .* 65\.9 to 83\.3 % of the ratio", heads("runtime"))
    assert re.search(r"Finetuning ATS .* told apart at \d of 2", heads("finetuning"))
    assert re.search(r"topk: evaluated at a budget it was not trained for", heads("budget_transfer"))
    sizes = r"digits_vit_small with ATS \(block 3\) at 0\.05\d GMACs against digits_vit_tiny left whole at 0\.053: [−+]"
    assert re.search(sizes, heads("model_scaling"))
    said = " ".join(f.text for f in answers(spec(results, "single_multi_stage")))
    assert "9 of 12" not in said and "Targets not reached: " in said and "too dear, block 11, aimed at 0.080" in said
    assert "on 128 calibration images, none of which is evaluated" in said


def test_plain_images_are_said_to_keep_fewer_tokens_by_a_test(results: Results) -> None:
    rows = with_answers(results.of(results.settings()[0]), results.images)
    found = findings.adaptivity(Overview(rows, results.images))
    assert found[0].headline and "1 keep more tokens where there is more clutter" in found[0].text
    assert re.match(r"ATS: Spearman's rho \+0\.\d\d \[", found[1].text) and found[1].keys


def test_published_values_stand_beside_the_nearest_of_ours(results: Results) -> None:
    placed = beside_print(spec(results, "stage_placement"))
    assert placed["what"].tolist()[1] == "ATS at block 3 (Table A.4)" and "78.5" in placed["published"][1]
    key = placed["trials"][1].split(" ")[0]
    row = results.finished.set_index("key").loc[key]
    assert row["placement"] == "block 3" and f"({tables.percent(row['top1'])};" in placed["measured here"][1]
    assert abs(row["gmacs_mean"] / 0.160 - 2.9 / 4.6) <= beside.NEAREST
    stacked = beside_print(spec(results, "evit_stacking"))
    assert len(stacked) == 3 and "79.5; 3 of 4.6" in stacked["published"][0]
    speed = beside_print(spec(results, "runtime"))
    assert speed["measured here"][1].startswith("1.10 ×") or "× at 1.67 × fewer GMACs" in speed["measured here"][1]
    assert beside_print(spec(results, "methods").assign(kind="ranking")).empty
    assert beside_print(spec(results, "k_values"), patches=64)["what"][0].startswith("ATS, one stage, K = 16")


def test_caveats_come_from_the_data(results: Results) -> None:
    rows = spec(results, "single_multi_stage")
    said = " ".join(caveats.caveats(question_of("stages"), results.settings()[0], rows))
    assert "calibrated to their target on 128 images, by cost alone, and evaluated on others" in said
    assert "3 of 9 targets could not be reached" in said and "off the shelf, without training" in said
    easy = " ".join(caveats.caveats(question_of("front"), DEIT_TINY, rows.assign(dense_top1=0.805)))
    assert "easier than the whole validation set: the dense model has 80.5 % here and 72.2 % in print" in easy
    blind = rows.assign(interval="as recorded")
    assert "9 trials left no per-image table" in " ".join(caveats.caveats(question_of("ranking"), DEIT_TINY, blind))


def test_one_section_holds_all_models_of_a_comparison_of_models(results: Results, written: Written) -> None:
    text = written.report.read_text(encoding="utf-8")
    assert text.count("<h2>Measured on") == 1 and len(results.settings()) == 2
    table = pd.read_csv(results.folder / "tables" / "model_scaling.csv")
    assert set(table["model"]) == {"digits_vit_small", "digits_vit_tiny"}
    assert (
        table.loc[(table["model"] == "digits_vit_tiny") & (table["variant"] != "dense"), "share_of_dense"].max() < 0.75
    )


def test_tables_hold_every_test_and_full_keys(results: Results) -> None:
    row = spec(results, "methods").query("variant == 'EViT'").iloc[:1]
    line = tables.measured(Facts(row)).iloc[1]
    paired = stats.mcnemar(row.iloc[0]["answers"], row.iloc[0]["dense_answers"])
    assert line["p_value"] == paired.p_value and line["mid_p"] == paired.mid_p and line["test"] == "McNemar"
    assert (line["difference_boot_low"], line["difference_boot_high"]) == (paired.boot_low, paired.boot_high)
    assert line["keys"] == row.iloc[0]["key"] and line["interval"] == "bootstrap"
    shown = tables.display(tables.measured(Facts(spec(results, "single_multi_stage"))))
    assert "0.080*" in set(shown["target"]) and "0.080" in set(shown["target"])


@pytest.mark.usefixtures("plain_figures")
def test_the_profile_of_the_run_is_shown_where_there_is_one(tmp_path: Path) -> None:
    maker = Maker(images=30)
    maker.add("my_idea", "only", reducer=[{"name": "new"}], blocks=[2], keep=0.5, accuracy=0.8)
    out = maker.save(tmp_path, samples=False)
    parts = [{"part": "evaluation", "what": "evaluation: forward passes", "seconds": 90.0, "share": 0.75}]
    (out / "profile.json").write_text(json.dumps({"wall_seconds": 120.0, "workers": 2, "trials": 7, "parts": parts}))
    text = write_analysis(read_results(out)).report.read_text(encoding="utf-8")
    assert "2.0 minutes for 7 trials on 2 workers" in text and "evaluation: forward passes" in text and "75.0" in text
    (out / "profile.json").write_text("{half")
    assert "Where the time went" not in write_analysis(read_results(out)).report.read_text(encoding="utf-8")


@pytest.fixture(scope="module")
def small() -> Maker:
    return whole_run(Maker(images=30))


@pytest.mark.usefixtures("plain_figures")
@pytest.mark.parametrize(
    "name",
    sampled(["model_scaling", "sampling_method", "runtime", "finetuning", "budget_transfer"], quick=[]),
)
def test_a_part_of_one_spec_is_a_report(small: Maker, tmp_path: Path, name: str) -> None:
    """A run of one spec that was stopped half way."""
    maker = copy.copy(small)
    maker.rows = [row for row in small.rows if row["spec"] == name][::2]
    written = write_analysis(read_results(maker.save(tmp_path, samples=False)))
    assert written.figures and "Measured on" in written.report.read_text(encoding="utf-8")
