"""``python -m analysis OUT``: figures, tables and a report from the results of a run."""

from __future__ import annotations

import argparse
import logging
import sys
from collections.abc import Sequence
from pathlib import Path

from ablations.records.names import RECOMMENDATION_PAGE, RECOMMENDED
from ablations.records.storage import as_folder, is_uri
from ablations.records.streams import say
from analysis import remote
from analysis.frame import AnalysisError, Results, read_results
from analysis.recommendation import write_recommendation
from analysis.report import Written, write_analysis, write_opening

EPILOG = """\
reads   OUT/results.parquet (or OUT/trials/*.parquet of a run that was stopped), OUT/run.json,
        OUT/images/*.parquet for paired tests, OUT/samples/ for the sheets of sample images,
        OUT/profile.json for where the time went
writes  OUT/figures/*.png and *.svg    a few figures a spec, and those that belong to all
        OUT/tables/*.md, *.csv, *.tex  our numbers, and published ones beside them, apart
        OUT/report.html                all of it in one file that needs no network
        all of these in FOLDER instead of OUT with --to FOLDER, where OUT may only be read

No trial is computed, and nothing that a run wrote is changed: call it as often as you like.

exit status: 0 written; 1 written, but no trial had finished; 2 OUT cannot be read, or the report not written

examples:  python -m analysis results
           python -m analysis /mnt/archive/results --to report
"""


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command line; returns the exit status."""
    parser = argparse.ArgumentParser(
        prog="python -m analysis",
        description="Draw the figures, tables and report of an ablation run.",
        epilog=EPILOG,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument(
        "out", metavar="OUT", help="output folder of a run (make ablations OUT=...), or s3://BUCKET/FOLDER"
    )
    parser.add_argument("--to", metavar="FOLDER", help="write the report, figures and tables there, nothing to OUT")
    parser.add_argument(
        "--opening", metavar="FILE.png", help="draw that one figure instead: what survives beside what it costs"
    )
    parser.add_argument(
        "--recommendation", action="store_true", help="draw recommend.html of a search (sievit recommend) instead"
    )
    parser.add_argument("-q", "--quiet", action="store_true", help="say nothing but warnings and errors")
    options = parser.parse_args(arguments)
    logging.basicConfig(level=logging.WARNING, format="%(levelname)s: %(message)s")
    try:
        if options.opening:
            write_opening(read_results(as_folder(options.out)), Path(options.opening))
            return 0
        if options.recommendation:
            say(_recommendation(options.out), sys.stdout)
            return 0
        results, written, report = _analyse(options.out, options.to)
    except (AnalysisError, PermissionError) as error:
        say(f"error: {error}", sys.stderr)
        return 2
    if not options.quiet:
        say(
            f"{len(results.finished) + len(results.features)} finished trials, {len(results.failed)} failed: "
            f"{len(written.figures) // 2} figures, {len(written.tables)} tables, {report}",
            sys.stdout,
        )
    if results.finished.empty and results.features.empty:
        say("error: no trial finished; the report lists the reasons", sys.stderr)
        return 1
    return 0


def _recommendation(out: str) -> str:
    """Where the page of a search was written."""
    if not is_uri(out):
        return str(write_recommendation(as_folder(out)))
    place = remote.open_place(out)
    with remote.local_folder(out) as copy:
        folder = copy / RECOMMENDED
        folder.mkdir(exist_ok=True)
        return place.send(write_recommendation(place.fetch_recommendation(folder)).parent, RECOMMENDATION_PAGE)


def _analyse(out: str, to: str | None) -> tuple[Results, Written, str]:
    """What was read, what was written, and where the report is."""
    if to is not None and is_uri(to):
        raise AnalysisError(f"--to {to}: name a folder of this machine, from which the report can be copied on")
    folder = as_folder(to) if to is not None else None
    if not is_uri(out):
        results = read_results(as_folder(out))
        written = write_analysis(results, folder)
        return results, written, str(written.report)
    place = remote.open_place(out)
    with remote.local_folder(out) as copy:
        results = read_results(place.fetch(copy))
        written = write_analysis(results, folder)
        return results, written, place.send(copy) if folder is None else str(written.report)


if __name__ == "__main__":
    sys.exit(main())
