"""Stages and trainings as values: read only, hashable, and their text is what records hold."""

from __future__ import annotations

import json
import pickle

import pytest

from ablations.trial.stages import DENSE, OFF_THE_SHELF, Stages, Training, canonical_json, plain
from ablations.trial.trial import TrialError, trial_from
from reducers import placement_from
from tests.ablations.code_edits import FIXED

ATS = [{"at": [3, 6], "stack": [{"name": "ats", "budget": {"ratio": 0.5}}]}]


def test_one_content_is_one_value_whatever_its_order() -> None:
    turned = [{"stack": [{"budget": {"ratio": 0.5}, "name": "ats"}], "at": [3, 6]}]
    assert Stages.of(ATS) == Stages.of(turned) and len({Stages.of(ATS), Stages.of(turned)}) == 1
    assert Stages.of(ATS) != Stages.of(ATS[:0]) == DENSE
    assert Stages.of(ATS).text == canonical_json(ATS) == str(Stages.of(ATS))


def test_what_stages_say_cannot_be_changed() -> None:
    stages = Stages.of(ATS)
    with pytest.raises(TypeError):
        stages.data[0]["at"] = (4,)
    with pytest.raises(TypeError):
        stages.data[0]["stack"][0]["budget"]["ratio"] = 0.7
    with pytest.raises(AttributeError):
        stages.data[0]["at"].append(9)
    with pytest.raises(AttributeError):
        stages.text = "[]"  # type: ignore[misc]
    stages.plain()[0]["at"].append(9)
    assert stages.plain() == ATS and stages.placement(12).spec() == placement_from(ATS, depth=12).spec()


def test_stages_are_read_once() -> None:
    stages = Stages.of(ATS)
    assert stages.data is stages.data


def test_a_text_is_kept_as_it_was_recorded() -> None:
    """An earlier version may have spelled it otherwise; its key is of that text."""
    spaced = json.dumps(ATS)
    assert Stages(spaced).text == spaced != Stages.of(ATS).text
    assert Stages(spaced).data == Stages.of(ATS).data


def test_values_travel_to_other_processes() -> None:
    stages, training = Stages.of(ATS), Training.of({"epochs": 1, "stages": ATS})
    assert stages.data and training.stages == stages, "both are read, and yet"
    assert pickle.loads(pickle.dumps((stages, training))) == (stages, training)


def test_nothing_is_false() -> None:
    assert not DENSE and Stages.of(ATS) and not OFF_THE_SHELF and Training("{}")
    assert plain(DENSE.data) == [] and Training("{}").stages == DENSE


@pytest.mark.parametrize("stages", [None, ATS, 3])
def test_a_record_whose_stages_are_no_text_is_no_trial(stages: object) -> None:
    fields = {**json.loads(FIXED.description), "stages": stages}
    assert trial_from(FIXED.description) == FIXED
    with pytest.raises(TrialError, match="no trial of this version"):
        trial_from(json.dumps(fields))
    del fields["stages"]
    with pytest.raises(TrialError, match="no trial of this version"):
        trial_from(json.dumps(fields))
    with pytest.raises(TrialError, match="no trial of this version"):
        trial_from("[]")
