"""Run jobs one after the other in this process: no Ray, and every error where a debugger can see it."""

from __future__ import annotations

from collections.abc import Sequence

from ablations.evaluate import TrialContext, try_trial
from ablations.plan import Job
from ablations.progress import RunProgress
from ablations.store import Store
from ablations.trial import answers


def run_serial(jobs: Sequence[Job], *, context: TrialContext, store: Store, progress: RunProgress) -> None:
    """Each result is on disk before the next job starts."""
    for job in jobs:
        result = try_trial(job.trials[0], context)
        for answer in answers(result, job.trials, context.facts):
            store.save(answer)
        progress.done(job, seconds=result.row["seconds"], error=result.row["error"])
