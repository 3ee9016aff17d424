"""The names of the files in OUT, and what the record of a run says of its plan."""

from __future__ import annotations

from typing import Any

RUN = "run.json"
"""What was run on what, and the plan."""
LIVE = "progress.json"
"""By which a run tells other terminals how far it is."""
PROFILE = "profile.json"
RESULTS = "results.parquet"


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
