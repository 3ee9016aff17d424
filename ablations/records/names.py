"""The names of the files in OUT, and what the record of a run says of its plan. Standard library alone."""

from __future__ import annotations

import re
from typing import Any

RUN = "run.json"
"""What was run on what, and the plan."""
LIVE = "progress.json"
"""By which a run tells other terminals how far it is."""
PROFILE = "profile.json"
RESULTS = "results.parquet"
SUFFIX = ".parquet"
KEY = re.compile(r"[0-9a-f]{16}")
TRIALS, IMAGES = "trials", "images"
"""Folders with a file a trial: its row, and the table of its images."""
SAMPLES, INDEX = "samples", "index.json"
"""The folder of a few images to draw on, and the file in it that says which they are."""
CACHE = "cache"
CANDIDATES, RECOMMENDED, RECOMMENDATION = "recommend", "recommended", "recommend.json"
"""What a search leaves: a folder of results of its candidates, the placement files, and what it came to."""
FIGURES, TABLES, REPORT = "figures", "tables", "report.html"
"""What the analysis adds."""
RECOMMENDATION_PAGE = "recommend.html"
"""… and what it adds to a search."""


def row_file(key: str) -> str:
    """The file of a trial's row, whose presence says that it is finished."""
    return f"{TRIALS}/{key}{SUFFIX}"


def images_file(key: str) -> str:
    """The file of a trial's images."""
    return f"{IMAGES}/{key}{SUFFIX}"


def planned_keys(run: Any) -> dict[str, list[str]]:
    """Spec -> keys of its trials, as ``run.json`` records them; {} where it does not."""
    specs = run.get("specs") if isinstance(run, dict) else None
    if not isinstance(specs, dict):
        return {}
    return {
        str(name): [str(key) for key in about.get("trials", [])]
        for name, about in specs.items()
        if isinstance(about, dict) and isinstance(about.get("trials", []), list)
    }
