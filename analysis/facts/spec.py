"""One spec of one setting, and everything that is computed from its trials, once."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from functools import cached_property

import numpy as np
import pandas as pd

from analysis.facts import differences, recovery, stacking, transfer
from analysis.facts.choice import Choice, choice, decisive
from analysis.facts.comparison import Comparison, Versus, comparisons
from analysis.facts.matching import cost_levels, dense_cost, dense_gmacs, merge_seeds
from analysis.frame import choosable

PICTURED = 0.55  # share of the dense cost at which a question is answered in few rows
PLACED = 4  # costs at which placements are compared: few, so that intervals stay apart


@dataclass(frozen=True, eq=False)
class Facts:
    """Trials of one spec (with answers) and what follows from them; of several models in a comparison of models."""

    trials: pd.DataFrame
    images: Mapping[str, pd.DataFrame] = field(default_factory=dict)  # per-image tables by trial key

    @cached_property
    def name(self) -> str:
        return str(self.trials["spec"].iloc[0])

    @cached_property
    def kind(self) -> str:
        return str(self.trials["kind"].iloc[0])

    @cached_property
    def rows(self) -> pd.DataFrame:
        """All that reduce, a row for all seeds of one computation."""
        return merge_seeds(self.trials[~self.trials["dense"]])

    @cached_property
    def series(self) -> list[str]:
        return list(dict.fromkeys(self.rows["variant"]))

    @cached_property
    def dense(self) -> float:
        """Cost of the plain model; nan where no row says it."""
        return dense_cost(self.trials)

    @cached_property
    def dense_top1(self) -> float:
        """Accuracy of the plain model; nan where no row says it."""
        known = self.trials["dense_top1"].dropna()
        return float(known.iloc[0]) if len(known) else float("nan")

    @cached_property
    def by(self) -> str:
        """The column whose values are compared."""
        return (
            "placement"
            if self.kind in ("placement", "clip_placement") and self.rows["placement"].nunique() > 1
            else "variant"
        )

    @cached_property
    def placement_levels(self) -> list[float]:
        return cost_levels(self.rows, by="placement", count=PLACED)

    @cached_property
    def candidates(self) -> pd.DataFrame:
        """The rows that somebody could choose: all but those of oracles, where there are others."""
        own = choosable(self.rows)
        return own if len(own) else self.rows

    @cached_property
    def comparisons(self) -> list[Comparison]:
        """The ranking of the series (or placements) at each cost."""
        return comparisons(
            self.candidates, by=self.by, levels=self.placement_levels if self.by == "placement" else None
        )

    @cached_property
    def choice(self) -> Choice | None:
        """What the ranking comes to."""
        return choice(self.comparisons)

    @cached_property
    def decisive(self) -> Comparison | None:
        """The ranking at the one cost that says most."""
        return decisive(self.comparisons, PICTURED * dense_gmacs(self.trials))

    @cached_property
    def base(self) -> str | None:
        """The series that stacks build on."""
        return stacking.base_variant(self.rows)

    @cached_property
    def gains(self) -> list[stacking.Gain]:
        """Every stack against its base with the same budget."""
        return stacking.gains(self.rows, self.base)

    @cached_property
    def versus(self) -> list[Versus]:
        """Every series against one of them at equal cost: the base of stacks, else the first that meets most."""
        return differences.find(self.rows, self.base if self.kind == "stacking" else None)

    @cached_property
    def recovered(self) -> list[recovery.Pair]:
        """Finetuned rows and the same off the shelf."""
        return recovery.pairs(self.rows)

    @cached_property
    def trainings(self) -> pd.DataFrame:
        """The rows with the budgets they were trained and evaluated at."""
        return transfer.labelled(self.rows)

    @cached_property
    def timed(self) -> pd.DataFrame:
        """The trials timed side by side with the dense model, with ``ratio`` (dense GMACs / own) and ``faster``
        (measured) at ``at_batch`` images. Rates that were taken apart, or a batch that was not timed, do not stand in.
        """
        rows = self.trials.assign(
            faster=self.trials["speedup"],
            ratio=self.trials["dense_gmacs"] / self.trials["gmacs_mean"],
            at_batch=self.trials["measured_batch"],
        )
        return rows[rows["faster"].notna() & rows["ratio"].notna() & ~rows["dense"]]

    @cached_property
    def models(self) -> dict[str, Facts]:
        """The facts of each model, by the cost of its dense forward pass, cheapest first."""
        parts = {str(name): part for name, part in self.trials.groupby("model", sort=False)}
        return {
            name: Facts(parts[name], self.images) for name in sorted(parts, key=lambda name: dense_gmacs(parts[name]))
        }

    @cached_property
    def front(self) -> pd.DataFrame:
        """The candidates that none of at most their cost equals or exceeds in accuracy, cheapest first."""
        ranked = self.candidates.sort_values(["gmacs_mean", "top1"], ascending=[True, False], kind="stable")
        best = ranked["top1"].cummax().shift(fill_value=-np.inf)
        return ranked[ranked["top1"] > best]

    @cached_property
    def lacks(self) -> dict[str, float]:
        """How far each series lies below the front (0 .. 1), the mean over its rows; the nearest first."""
        edge = self.front

        def lack(part: pd.DataFrame) -> float:
            place = np.searchsorted(edge["gmacs_mean"].to_numpy(), part["gmacs_mean"].to_numpy(), side="right") - 1
            return float(np.mean(edge["top1"].to_numpy()[np.clip(place, 0, None)] - part["top1"].to_numpy()))

        away = {str(name): lack(part) for name, part in self.rows.groupby("variant", sort=False)}
        return dict(sorted(away.items(), key=lambda item: item[1]))
