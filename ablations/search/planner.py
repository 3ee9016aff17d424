"""Planners: who says what is tried next. They are asked for candidates and told what came of them.

``Listed`` hands out what it was given, such as the grid of a spec; ``Sampled`` asks Optuna's tree-structured Parzen
estimator (Bergstra et al., 2011) over a ``Space``.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Protocol

from ablations.search.space import Space
from ablations.trial.stages import OFF_THE_SHELF, Stages, Training, canonical_json

if TYPE_CHECKING:
    import optuna

_TRIES = 20  # proposals in a row that were tried before or cannot be: then some are drawn by chance …
_DRAWS = 300  # … and after so many more the space is taken for exhausted
_BY_CHANCE = 0.3  # share of the candidates that are drawn at random, before the estimator is asked


@dataclass(frozen=True)
class Candidate:
    """One placement to try, its budget still open; ``number`` counts those of a planner."""

    number: int
    stages: Stages
    label: str
    training: Training = OFF_THE_SHELF  # whose weights it has


class Planner(Protocol):
    """Asked for a candidate; None where there is no further one. Told its value, or None where it has none."""

    def ask(self) -> Candidate | None: ...

    def tell(self, number: int, value: float | None) -> None: ...


class Listed:
    """Candidates that are known beforehand, in their order: the grid of specs is one."""

    def __init__(self, candidates: Sequence[tuple[str, Stages]]) -> None:
        self._left: Iterator[Candidate] = (
            Candidate(number, stages, label) for number, (label, stages) in enumerate(candidates)
        )
        self.values: dict[int, float | None] = {}

    def ask(self) -> Candidate | None:
        return next(self._left, None)

    def tell(self, number: int, value: float | None) -> None:
        self.values[number] = value


class Sampled:
    """``size`` different candidates of a space, chosen by what was told of those before.

    Args:
        space: what may be proposed.
        size: how many candidates to hand out.
        seed: of the sampler: asked and told alike, two planners of one seed propose the same.
        label: the words for a candidate's stages and the training whose weights it has.
        fits: raises ValueError for what the model cannot carry out, of the same two; it is never handed out.
        starts: what is tried first, as the choices' names and options.
    """

    def __init__(
        self,
        space: Space,
        *,
        size: int,
        seed: int,
        label: Callable[[Any, Training], str],
        fits: Callable[[Stages, Training], object],
        starts: Sequence[Mapping[str, Any]] = (),
    ) -> None:
        self._space, self._size, self._label, self._fits = space, size, label, fits
        self._estimator, self._chance = _samplers(seed, by_chance=max(10, round(_BY_CHANCE * size)))
        self._study = _study(self._estimator)
        self._open: dict[int, optuna.trial.Trial] = {}
        self._impossible: set[tuple[Stages, Training]] = set()
        self._numbers: dict[tuple[Stages, Training], int] = {}
        for start in starts:
            self._study.enqueue_trial({name: _spelled(option) for name, option in start.items()})

    def ask(self) -> Candidate | None:
        if len(self._numbers) >= self._size:
            return None
        for sampler, tries in ((self._estimator, _TRIES), (self._chance, _DRAWS)):
            self._study.sampler = sampler
            for _ in range(tries):
                trial = self._study.ask()
                drawn = self._space.draw(_Optuna(trial))
                asked = Stages.of(drawn.stages), drawn.training
                if asked in self._numbers or asked in self._impossible or not self._possible(*asked):
                    self._say(trial, None)  # nothing is learnt from it
                    continue
                number = self._numbers[asked] = len(self._numbers)
                self._open[number] = trial
                stages, training = asked
                return Candidate(number, stages, self._label(stages.data, training), training)
        return None

    def _possible(self, stages: Stages, training: Training) -> bool:
        try:
            self._fits(stages, training)
        except ValueError:
            self._impossible.add((stages, training))
            return False
        return True

    def tell(self, number: int, value: float | None) -> None:
        self._say(self._open.pop(number), value)

    def _say(self, trial: optuna.trial.Trial, value: float | None) -> None:
        from optuna.trial import TrialState

        if value is None:
            self._study.tell(trial, state=TrialState.FAIL)
        else:
            self._study.tell(trial, value)


class _Optuna:
    """A trial of Optuna's as a chooser. Options are told by their text: Optuna knows no mappings."""

    def __init__(self, trial: optuna.trial.Trial) -> None:
        self._trial = trial

    def one_of(self, name: str, options: Sequence[Any]) -> Any:
        spelled = {_spelled(option): option for option in options}
        return spelled[self._trial.suggest_categorical(name, list(spelled))]

    def whole(self, name: str, low: int, high: int) -> int:
        return self._trial.suggest_int(name, low, high)


def _spelled(option: Any) -> Any:
    return option if isinstance(option, int | str) and not isinstance(option, bool) else canonical_json(option)


def _samplers(seed: int, *, by_chance: int) -> tuple[optuna.samplers.BaseSampler, optuna.samplers.BaseSampler]:
    """The estimator, which draws the first ``by_chance`` at random, and one that draws all at random."""
    import optuna

    with warnings.catch_warnings():
        warnings.simplefilter("ignore", optuna.exceptions.ExperimentalWarning)  # of `multivariate`, `group`
        estimator = optuna.samplers.TPESampler(
            seed=seed, multivariate=True, group=True, constant_liar=True, n_startup_trials=by_chance
        )
    return estimator, optuna.samplers.RandomSampler(seed=seed)


def _study(sampler: optuna.samplers.BaseSampler) -> optuna.Study:
    """A study in memory that says nothing."""
    import optuna

    optuna.logging.set_verbosity(optuna.logging.WARNING)
    return optuna.create_study(direction="maximize", sampler=sampler)
