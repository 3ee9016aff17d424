"""What a call leaves beside its candidates' results, so that they can be looked up, listed and run again."""

from __future__ import annotations

import shlex
from collections.abc import Sequence
from datetime import UTC, datetime

from ablations.measure.context import versions
from ablations.records.kinds import ANSWERS
from ablations.records.names import RUN
from ablations.run.recommend.call import Call
from ablations.run.recommend.pieces import SPEC
from ablations.run.record import save_samples, settings_in_full
from ablations.run.session import Settings
from ablations.store.store import Store
from ablations.trial.trial import RESULT_VERSION
from ablations.version import own_version

_PICTURES = 6  # of confirmation images, for the page


def write_record(store: Store, call: Call, settings: Settings, *, command: Sequence[str]) -> None:
    """``run.json`` and ``results.parquet`` of the candidates' store."""
    keys = sorted(
        row["key"] for row in store.rows().values() if row["spec"] == SPEC and row["weights_digest"] == _weights(call)
    )
    facts, target = call.subject.facts, call.subject.target
    store.write_json(
        RUN,
        {
            "project": "Sievit",
            "version": own_version(),
            "created": datetime.now(UTC).isoformat(timespec="seconds"),
            "command": shlex.join(command),
            "result_version": RESULT_VERSION,
            "workload": target.workload,
            "model": facts.name,
            "weights": facts.weights,
            "weights_digest": facts.weights_digest,
            "data_digest": target.data_digest,
            "images": target.images,
            "batch": target.batch,
            "calibration_images": len(call.subject.calibration or ()),
            "settings": settings_in_full(settings),
            "versions": versions(),
            "specs": {
                SPEC: {
                    "title": "What a search tried",
                    ANSWERS: "ranking",
                    "question": "Which placement loses least at this cost?",
                    "caption": "Every candidate of the search, on the parts of the images that it was looked at.",
                    "published": "",
                    "trials": keys,
                }
            },
        },
    )
    store.compact(keys)
    save_samples(store, call.pieces.workload(len(call.parts.rungs)), facts, _PICTURES)


def _weights(call: Call) -> str:
    return call.subject.facts.weights_digest
