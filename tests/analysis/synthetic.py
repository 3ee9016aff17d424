"""A small output folder as a run leaves it, made from a formula: known accuracies, known costs, known tokens.

Whether an image is answered rightly depends on how hard it is (the same in every trial) and on luck, so that
trials on the same images agree about most of them, as real ones do.
"""

from __future__ import annotations

import hashlib
import json
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pyarrow as pa
import pyarrow.parquet as pq
from PIL import Image

DEPTH, PATCHES, GRID = 12, 64, (8, 8)
DENSE_GMACS, DENSE_TOP1 = 0.160, 0.90
SPECS = {
    "score_functions": {"title": "Score functions", "question": "By which score should tokens be chosen?"},
    "k_values": {"title": "Effect of K", "question": "What does K cost, and what does it buy?"},
    "stage_placement": {"title": "Stage placement", "question": "In which blocks should tokens be reduced?"},
    "class_token": {"title": "Dropping the class token", "question": "Must the class token be kept?"},
    "evit_stacking": {"title": "Stacking on EViT", "question": "Does adaptive sampling on top of EViT pay?"},
    "methods": {"title": "All methods", "question": "Which method leads at which cost?"},
    "sampling_method": {"title": "Sampling method", "question": "Inverse transform or top-K?"},
    "single_multi_stage": {"title": "Single stage or several", "question": "Once or in several stages?"},
    "model_scaling": {"title": "Model scaling", "question": "Large and reduced, or small and whole?", "models": "all"},
    "runtime": {"title": "Runtime", "question": "Is what is saved also saved in time?"},
    "adaptivity": {"title": "Adaptivity", "question": "Do plain images keep fewer tokens than busy ones?"},
    "finetuning": {"title": "Finetuning", "question": "What does training with the reduction give back?"},
    "budget_transfer": {"title": "Budget transfer", "question": "Does one training serve every budget?"},
}


def stages(*parts: tuple[list[int], list[dict[str, Any]]]) -> str:
    return json.dumps(
        [{"at": blocks, "stack": stack} for blocks, stack in parts], sort_keys=True, separators=(",", ":")
    )


def place(blocks: list[int]) -> str:
    if len(blocks) > 2 and blocks == list(range(blocks[0], blocks[-1] + 1)):
        return f"blocks {blocks[0]}-{blocks[-1]}"
    return f"block{'s' if len(blocks) > 1 else ''} {', '.join(map(str, blocks))}"


class Maker:
    """Makes trials on one set of images; ``rows`` and ``images`` collect what ``save`` writes."""

    def __init__(
        self, *, images: int = 400, weights: str = "embedded", seed: int = 0, workload: str = "embedded"
    ) -> None:
        self.random = np.random.default_rng(seed)
        self.n, self.weights, self.workload = images, weights, workload
        self.hard = self.random.uniform(size=images)  # an image is answered where this is below the trial's accuracy
        self.clutter = self.random.integers(0, 10, size=images)
        self.dense_correct = self._correct(DENSE_TOP1)
        self.rows: list[dict[str, Any]] = []
        self.images: dict[str, pd.DataFrame] = {}

    def _correct(self, accuracy: float) -> np.ndarray:
        return self.hard + self.random.normal(0, 0.03, self.n) < accuracy

    def add(
        self,
        spec: str,
        variant: str,
        *,
        reducer: list[dict[str, Any]],
        blocks: list[int],
        keep: float,
        accuracy: float,
        x: float | None = None,
        budget: str | None = None,
        adaptive: bool = False,
        seed: int = 0,
        drop_class: float = 0.0,
        target: float | None = None,
        reached: bool = True,
        **columns: Any,
    ) -> dict[str, Any]:
        """One finished trial: ``keep`` of the patches are left after all of its ``blocks``. With a ``target`` (a share
        of the dense cost) it costs just that, within half a percent; where it is not ``reached``, what it costs anyhow.
        """
        named = {name: columns.get(name) for name in ("model", "training", "measured_batch", "finetuned")}
        named = {name: value for name, value in named.items() if value is not None} | ({"t": target} if target else {})
        identity = (spec, variant, reducer, blocks, keep, seed, x, *([named] if named else []))
        key = hashlib.sha256(repr(identity).encode()).hexdigest()[:16]
        swing = (self.clutter - 4.5) / 9 * 0.25 * (1 - keep) + self.random.normal(0, 0.02, self.n) if adaptive else 0.0
        last = np.clip(keep + swing * np.ones(self.n), 0.03, 1.0)
        done = np.array([sum(b < block for b in blocks) for block in range(DEPTH + 1)]) / max(1, len(blocks))
        tokens = 1 + np.round(PATCHES * last[:, None] ** done[None, :]).astype(int)
        gmacs = DENSE_GMACS * tokens[:, :-1].mean(1) / (PATCHES + 1)
        if target is not None and reached:
            gmacs = gmacs * (target * DENSE_GMACS / gmacs.mean() * (1 + self.random.uniform(-0.005, 0.005)))
        order = self.random.random((self.n, PATCHES)).argsort(1)
        kept = order[:, None, :] < (tokens[:, 1:] - 1)[:, :, None]
        correct = self._correct(accuracy) if blocks else self.dense_correct.copy()
        coverage = np.clip(keep**0.4 + self.random.normal(0, 0.05, self.n), 0, 1)
        class_kept = self.random.random(self.n) >= drop_class
        from scipy.stats import binomtest

        interval = binomtest(int(correct.sum()), self.n).proportion_ci(method="wilson")
        row = {
            "spec": spec,
            "key": key,
            "status": "ok",
            "error": None,
            "model": "digits_vit_small",
            "params_m": 2.4,
            "weights": self.weights,
            "workload": self.workload,
            "images": self.n,
            "batch": 32,
            "seed": seed,
            "finetuned": False,
            "placement": place(blocks) if blocks else "no block",
            "blocks": blocks,
            "reducer": stages((blocks, reducer)) if blocks else "[]",
            "variant": variant,
            "x": x,
            "score": None,
            "budget": budget,
            "target": target,
            "target_gmacs": None if target is None else target * DENSE_GMACS,
            "calibrated": target is not None,
            "calibration_gmacs": None if target is None else target * DENSE_GMACS * (1.0 if reached else 1.1),
            "calibration_images": None if target is None else 128,
            "target_reached": None if target is None else reached,
            "probes": None if target is None else 7,
            "training": None,
            "epochs": None,
            "train_images": None,
            "train_seconds": None,
            "teacher": None,
            "speedup": None,
            "speedup_low": None,
            "speedup_high": None,
            "measured_batch": None,
            "shared_prefix": False,
            "top1": correct.mean(),
            "top1_low": interval.low,
            "top1_high": interval.high,
            "top5": min(1.0, correct.mean() + 0.08),
            "agreement": (correct == self.dense_correct).mean(),
            "gmacs_mean": gmacs.mean(),
            "gmacs_std": gmacs.std(),
            "reference_gmacs_mean": gmacs.mean() * 1.02,
            "reducer_gmacs_mean": 0.0001,
            "dense_gmacs": DENSE_GMACS,
            "tokens": tokens.mean(0).tolist(),
            "tokens_std": tokens.std(0).tolist(),
            "coverage": coverage.mean(),
            "class_kept": class_kept.mean(),
            "images_per_second": None,
            "dense_images_per_second": None,
            "peak_memory_mb": None,
            "seconds": 3.5,
            "device": "cpu",
            "versions": json.dumps({"torch": "2.15", "timm": "1.0"}),
            "data_digest": "d" * 64,
            "weights_digest": "e" * 64,
            "dense_top1": self.dense_correct.mean(),
            "created": "2026-01-01T00:00:00+00:00",
            **columns,
        }
        self.rows.append(row)
        bits = np.packbits(kept, axis=2)
        self.images[key] = pd.DataFrame(
            {
                "image": [f"test/{i}" for i in range(self.n)],
                "label": 1,
                "prediction": np.where(correct, 1, 2),
                "correct": correct,
                "dense_correct": self.dense_correct,
                "loss": 0.2 + self.hard,
                "gmacs": gmacs,
                "tokens": list(tokens),
                "kept": [[block.tobytes() for block in image] for image in bits],
                "class_kept": class_kept,
                "coverage": coverage,
                "clutter": self.clutter,
            }
        )
        return row

    def fail(self, spec: str, variant: str, error: str) -> dict[str, Any]:
        key = hashlib.sha256(repr((spec, variant, error)).encode()).hexdigest()[:16]
        row = {
            "spec": spec,
            "key": key,
            "status": "failed",
            "error": error,
            "variant": variant,
            "model": "digits_vit_small",
            "weights": self.weights,
            "workload": self.workload,
            "images": self.n,
            "placement": "block 3",
            "reducer": "[]",
            "blocks": [3],
            "seed": 0,
        }
        self.rows.append(row)
        return row

    def frame(self) -> pd.DataFrame:
        return pd.DataFrame(self.rows)

    def save(self, out: Path, *, run: dict[str, Any] | None = None, samples: bool = True) -> Path:
        """Write the folder as the contract between the experiments and the analysis says."""
        (out / "images").mkdir(parents=True, exist_ok=True)
        pq.write_table(pa.Table.from_pylist(_same_columns(self.rows)), out / "results.parquet")
        for key, table in self.images.items():
            columns = {name: table[name].to_list() for name in table}
            pq.write_table(
                pa.table({**columns, "kept": pa.array(columns["kept"], pa.list_(pa.binary()))}),
                out / "images" / f"{key}.parquet",
            )
        record = {
            "workload": self.workload,
            "model": "digits_vit_small",
            "weights": self.weights,
            "images": self.n,
            "skipped": [],
            "versions": {"python": "3.11"},
            "command": "python -m ablations run",
            "specs": SPECS,
        }
        (out / "run.json").write_text(json.dumps({**record, **(run or {})}))
        if samples:
            self._save_samples(out / "samples")
        return out

    def _save_samples(self, folder: Path) -> None:
        folder.mkdir(exist_ok=True)
        order = np.argsort(self.clutter, kind="stable")[np.linspace(0, self.n - 1, 4).astype(int)]
        entries = []
        for number, row in enumerate(order):
            y, x = np.mgrid[:64, :64]
            disc = 220 * ((y - 30) ** 2 + (x - 34) ** 2 < 300)
            noise = self.random.integers(0, 60, (64, 64)) * (self.clutter[row] > 3)
            Image.fromarray(np.repeat((disc + noise).clip(0, 255).astype(np.uint8)[..., None], 3, axis=2)).save(
                folder / f"{number:04}.png"
            )
            entries.append({"image": f"test/{row}", "file": f"{number:04}.png", "label": 1, "row": int(row)})
        (folder / "index.json").write_text(json.dumps({"grid": list(GRID), "images": entries}))


def _same_columns(rows: list[dict[str, Any]]) -> list[dict[str, Any]]:
    names = list(dict.fromkeys(name for row in rows for name in row))
    return [{name: row.get(name) for name in names} for row in rows]
