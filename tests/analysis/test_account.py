"""What became of the images, as the report tells it."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import pytest

from analysis.account import read_account
from analysis.frame import read_results
from analysis.report import write_analysis
from tests.analysis.synthetic import Maker
from tests.samples import shared_out

pytestmark = pytest.mark.usefixtures("plain_figures")

ACCOUNT: dict[str, Any] = {
    "found": 20,
    "used": 12,
    "left_out_by_limit": 3,
    "skipped": {"truncated": 4, "a copy": 1},
    "noted": {"CMYK colours": 2},
    "noted_files": [["a/b.jpg", "CMYK colours: converted to RGB"]],
    "empty_classes": ["n01440764", "n02102040"],
    "ignored_files": 7,
}


def report(tmp_path: Path, run: dict[str, Any]) -> str:
    maker = Maker(images=20)
    maker.add("my_idea", "only", reducer=[{"name": "new"}], blocks=[2], keep=0.5, accuracy=0.8)
    return write_analysis(read_results(maker.save(tmp_path, run=run))).report.read_text(encoding="utf-8")


def test_the_report_counts_what_was_found_used_and_skipped_by_kind(tmp_path: Path) -> None:
    skipped = [["a/x.jpg", "truncated: image file is truncated"]]
    text = report(tmp_path, {"images_account": ACCOUNT, "skipped": skipped, "calibration_images": 2})
    assert (
        "Of 20 images found, 12 are used (2 only to calibrate), 3 left out by the limit and 5 skipped; 7 further files "
        "do not" in text
    )
    rows = re.findall(r"<tr><td>([^<]+)</td><td>(\d+)</td><td>(skipped|read and used)</td></tr>", text)
    assert rows == [("truncated", "4", "skipped"), ("a copy", "1", "skipped"), ("CMYK colours", "2", "read and used")]
    assert "No image that can be used in n01440764, n02102040" in text
    assert '<a href="#skipped">2 classes without an image</a>' in text
    assert "1 image cannot be used and counts in no number of this report" in text


@pytest.mark.parametrize(
    "account",
    shared_out(
        [None, [], {"found": 1, "used": 1, "skipped": {"a": "b"}}, {"found": "many", "used": 1}, {"used": 3}], of=2
    ),
)
def test_an_account_that_is_missing_or_odd_is_done_without(tmp_path: Path, account: object) -> None:
    assert read_account({"images_account": account}) is None
    text = report(tmp_path, {"images_account": account})
    assert "No image was skipped." in text and "images found" not in text


def test_an_account_of_images_without_fault_is_one_sentence(tmp_path: Path) -> None:
    text = report(tmp_path, {"images_account": {"found": 9, "used": 9, "skipped": {}, "noted": {}}})
    assert "Of 9 images found, 9 are used and 0 skipped." in text
    assert "what was done" not in text and "without an image" not in text


def test_what_an_account_says_is_escaped_and_kept_short(tmp_path: Path) -> None:
    evil = "<script>alert(1)</script>"
    account = {**ACCOUNT, "skipped": {evil: 1}, "noted": {evil: 1}, "empty_classes": [evil, *map(str, range(500))]}
    text = report(tmp_path, {"images_account": account})
    assert text.count("<script") == 1 and "&lt;script&gt;" in text
    assert "and 481 more" in text
