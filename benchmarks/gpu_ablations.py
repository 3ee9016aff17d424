"""The ablations on a machine that has a GPU and little else: which predictions differ from a CPU's, and in what time.

    python -m benchmarks.gpu_ablations prepare --out FOLDER    where everything is installed: the same on its CPU
    python -m benchmarks.gpu_ablations run FOLDER              on the GPU, with torch and timm alone

``prepare`` runs the specs as ``sievit run --serial`` does (what is finished in its results is not computed again) and
writes a folder that travels: the scenes, the weights, the trials, and what the CPU predicted for every image.
``run`` carries the same trials out by the same code, job after job, and tells the minutes, and how many predictions are
the CPU's. It needs no YAML, pydantic, pyarrow, Ray or fvcore, and can be ended and begun again.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import logging
import sys
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import torch

from ablations.measure.context import TrialContext, device_name
from ablations.measure.opening import choose_device, keep_dense
from ablations.records.files import user_path, write_json
from ablations.run.contexts import Contexts, facts_from, find_dense, load_context, save_context
from ablations.run.jobs import computations, schedule
from ablations.run.progress import RunProgress
from ablations.run.serial import run_serial
from ablations.trial.code import code_of
from ablations.trial.trial import ModelFacts, Trial, TrialResult, trial_from
from ablations.words import duration
from benchmarks import report

log = logging.getLogger(__name__)

SPECS = ("score_functions", "stage_placement", "class_token", "k_values")
PLAN, PREDICTIONS, FOUND = "plan.json", "predictions.npz", "found"

# --- where everything is installed ------------------------------------------------------------------------------------


def prepare(
    out: Path, *, results: Path, specs: Sequence[str] = SPECS, limit: int | None = None, model: str | None = None
) -> None:
    """Run the specs on this machine's CPU, in ``results``, and write what a GPU needs to do the same to ``out``.

    Raises:
        SystemExit: a trial failed here, or this machine has a GPU, whose predictions would be compared with another's.
    """
    from ablations.cli.main import main as sievit
    from ablations.run.session import Settings, open_session

    if choose_device().type != "cpu":
        raise SystemExit("prepare where there is no GPU, or hide it (CUDA_VISIBLE_DEVICES=''): it runs on the CPU")
    more = [*(["--limit", str(limit)] if limit else []), *(["--model", model] if model else [])]
    if status := sievit(["run", "--serial", "--specs", *specs, "--out", str(results), *more]):
        raise SystemExit(status)
    session = open_session(Settings(results, specs=tuple(specs), limit=limit, model=model))
    out.mkdir(parents=True, exist_ok=True)
    own = dataclasses.replace(session, store=type(session.store)(out / "files"))
    own.store.create()
    contexts = {name: save_context(own, name).name for name in session.subjects}
    predicted, rows = {}, {}
    for trial in session.all_trials:
        row = session.store.load(trial.key)
        if row is None or row["status"] != "ok":
            raise SystemExit(f"the trial {trial.key} has no result in {results}")
        rows[trial.key] = {name: row[name] for name in ("top1", "gmacs_mean", "seconds", "device", "versions")}
        predicted[trial.key] = np.asarray(session.store.load_images(trial.key)["prediction"].to_pylist(), np.int16)
    np.savez_compressed(out / PREDICTIONS, **predicted)
    write_json(out / PLAN, {
        "trials": [trial.description for trial in session.all_trials], "contexts": contexts, "rows": rows,
        "batches": {name: subject.target.batch for name, subject in session.subjects.items()},
    })  # fmt: skip
    size = sum(file.stat().st_size for file in out.rglob("*") if file.is_file())
    log.info("%s: %d trials, %.1f MiB; there, `python -m benchmarks.gpu_ablations run %s`",
             out, len(predicted), size / 2**20, out)  # fmt: skip


# --- where there is a GPU ---------------------------------------------------------------------------------------------


class Found:
    """What trials gave, as files that numpy reads: in the place of a store, which needs pyarrow."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        folder.mkdir(parents=True, exist_ok=True)

    @contextmanager
    def log(self, keys: Sequence[str]) -> Iterator[None]:
        yield

    def keep(self, result: TrialResult, trial: Trial) -> None:
        """The row last: it says that the trial is finished."""
        if result.ok:
            np.save(self._file(trial.key, "npy"), np.asarray(result.images["prediction"], np.int16))
        write_json(self._file(trial.key, "json"), result.row)

    def row(self, key: str) -> Any:
        """What was kept, or None; a failure is tried again."""
        file = self._file(key, "json")
        row = json.loads(file.read_text(encoding="utf-8")) if file.is_file() else None
        return row if row is not None and row["status"] == "ok" else None

    def predictions(self, key: str) -> np.ndarray:
        found: np.ndarray = np.load(self._file(key, "npy"), allow_pickle=False)
        return found

    def _file(self, key: str, suffix: str) -> Path:
        return self.folder / f"{key}.{suffix}"


def run(folder: Path, device: torch.device) -> dict[str, Any]:
    """Carry out the trials of a prepared folder on a device, and compare; what is found is written there, too."""
    began = time.monotonic()
    plan = json.loads((folder / PLAN).read_text(encoding="utf-8"))
    planned = [trial_from(text) for text in plan["trials"]]
    # the same source may have another digest in another Python: what is compared is what this one computes
    trials = [dataclasses.replace(trial, code=code_of(trial)) for trial in planned]
    changed = sum(one.code != other.code for one, other in zip(planned, trials, strict=True))
    if changed:
        log.warning("the code of %d trials is not the one that the CPU ran, or reads otherwise in this Python", changed)
    place = folder / FOUND / device.type
    found: Any = Found(place)
    contexts = Contexts(lambda model: _open(folder, plan["contexts"][model], device))
    facts = {model: _facts(folder, plan["contexts"][model]) for model in plan["contexts"]}
    left = [trial for trial in trials if found.row(trial.key) is None]
    work = computations(left, facts, batches=plan["batches"])
    with RunProgress(work, terminal=False) as progress:
        run_serial(schedule(work, workers=1), contexts=contexts, store=found, progress=progress)
    for name, reason in progress.failures:
        log.error("failed: %s: %s", name, reason)
    summary = {
        "device": device_name(device), "torch": torch.__version__, "code_changed": changed,
        "minutes": round((time.monotonic() - began) / 60, 2), "failed": len(progress.failures),
        "specs": _compared(planned, trials, found, plan["rows"], folder / PREDICTIONS),
    }  # fmt: skip
    write_json(place.with_suffix(".json"), summary)
    return summary


def _facts(folder: Path, context: str) -> ModelFacts:
    saved = json.loads(_within(folder)(Path(context)).read_text(encoding="utf-8"))
    return facts_from(saved["facts"])


def _open(folder: Path, context: str, device: torch.device) -> TrialContext:
    """The context, with what the plain model says here, on this device."""
    locate, path = _within(folder), Path(context)
    saved = json.loads(locate(path).read_text(encoding="utf-8"))
    own = folder / FOUND / f"{device.type}-cache"
    own.mkdir(parents=True, exist_ok=True)
    dense = Path(saved["dense"]).name
    if not (own / dense).is_file():
        keep_dense(own / dense, find_dense(path, device, locate=locate))
    return load_context(
        path, device, locate=lambda file: own / dense if file.name == dense else locate(file), cache=own
    )


def _within(folder: Path) -> Any:
    """Files lie here by their names, wherever they were written."""
    return lambda file: folder / "files" / "cache" / file.name


def _compared(
    planned: Sequence[Trial], trials: Sequence[Trial], found: Found, rows: Mapping[str, Any], predictions: Path
) -> list[dict[str, Any]]:
    """For each spec: seconds, and how its predictions agree with the CPU's."""
    table: dict[str, list[tuple[float, float, float, float, float]]] = {}
    with np.load(predictions, allow_pickle=False) as before:
        for own, trial in zip(planned, trials, strict=True):
            row = found.row(trial.key)
            if row is None:
                continue
            same = float((found.predictions(trial.key) == before[own.key]).mean())
            recorded = rows[own.key]
            costs = abs(row["gmacs_mean"] / recorded["gmacs_mean"] - 1)
            table.setdefault(trial.spec, []).append(
                (same, row["top1"] - recorded["top1"], costs, row["seconds"], recorded["seconds"])
            )
    return [
        {
            "spec": spec, "trials": len(all_), "agreement_mean": float(np.mean([one[0] for one in all_])),
            "agreement_lowest": min(one[0] for one in all_), "alike": sum(one[0] == 1 for one in all_),
            "top1_furthest": max((one[1] for one in all_), key=abs), "gmacs_furthest": max(one[2] for one in all_),
            "minutes": sum(one[3] for one in all_) / 60, "cpu_minutes": sum(one[4] for one in all_) / 60,
        }
        for spec, all_ in table.items()
    ]  # fmt: skip


def told(summary: Mapping[str, Any]) -> str:
    """The comparison as a table."""
    head = ["spec", "trials", "agreement, %", "lowest, %", "no image differs", "top-1, points", "GMACs, %",
            "minutes", "on the CPU"]  # fmt: skip
    lines = [
        [
            spec["spec"], str(spec["trials"]), f"{100 * spec['agreement_mean']:.3f}",
            f"{100 * spec['agreement_lowest']:.3f}", str(spec["alike"]), f"{100 * spec['top1_furthest']:+.2f}",
            f"{100 * spec['gmacs_furthest']:.3f}", f"{spec['minutes']:.2f}", f"{spec['cpu_minutes']:.2f}",
        ]
        for spec in summary["specs"]
    ]  # fmt: skip
    return (
        f"{report.table(head, lines)}\nOn {summary['device']}, torch {summary['torch']}, in "
        f"{duration(60 * summary['minutes'])}; {summary['failed']} trials failed. Agreement: the share of images with "
        "the CPU's prediction, the mean over a spec's trials and the lowest of one; top-1 and GMACs: where they are "
        "furthest from the CPU's."
    )


# --- the command line -------------------------------------------------------------------------------------------------


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.gpu_ablations", description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )  # fmt: skip
    commands = parser.add_subparsers(dest="command", required=True)
    first = commands.add_parser("prepare", help="run on the CPU and write the folder")
    first.add_argument("--out", type=user_path, required=True, help="the folder that travels")
    first.add_argument("--results", type=user_path, default=Path("results/gpu-ablations"), help="of the run on the CPU "
                       "(default: %(default)s)")  # fmt: skip
    first.add_argument("--specs", nargs="+", default=list(SPECS), help=f"(default: {' '.join(SPECS)})")
    first.add_argument("--limit", type=int, help="evaluate at most that many images (default: all)")
    first.add_argument("--model", help="(default: the embedded model)")
    second = commands.add_parser("run", help="the same on this machine's GPU, with torch and timm alone")
    second.add_argument("folder", type=user_path, help="what prepare wrote")
    second.add_argument("--device", help="cpu or cuda (default: cuda where there is one)")
    args = parser.parse_args(arguments)
    logging.basicConfig(level=logging.INFO, format="%(message)s")
    if args.command == "prepare":
        specs = " ".join(args.specs).split()  # one argument or several
        prepare(args.out, results=args.results, specs=specs, limit=args.limit, model=args.model)
        return 0
    summary = run(args.folder, torch.device(args.device) if args.device else choose_device())
    text = told(summary)
    (args.folder / FOUND / "comparison.md").write_text(f"{text}\n", encoding="utf-8")
    print(text)
    return 1 if summary["failed"] else 0


if __name__ == "__main__":
    sys.exit(main())
