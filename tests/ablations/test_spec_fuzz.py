"""The spec loader under fire: shipped specs with any bytes changed load, or are refused in words."""

from __future__ import annotations

import json
import os
import random
import signal
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
import yaml
from hypothesis import given, settings
from hypothesis import strategies as st

from ablations.run.session import Settings as RunSettings
from ablations.run.session import preview
from ablations.spec.arms import SPECS
from ablations.spec.expand import expand
from ablations.spec.model import MAX_BYTES, find_specs, load_spec, parse_spec
from ablations.spec.plain_yaml import SpecError
from ablations.trial.target import Target
from ablations.trial.trial import Trial

SHIPPED = sorted(SPECS.glob("*.yaml"))
PATIENCE = 300  # seconds after which a spec counts as one that never ends; the largest shipped one takes under one
TOKENS = [
    b"[", b"]", b"{", b"}", b":", b"- ", b",", b"#", b"&a ", b"*a", b"!!python/object:os.system ", b"!!binary ",
    b"<<: ", b"|\n", b">\n", b"%YAML 9.9\n", b"---\n", b"...\n", b"\t", b"\x00", b"\xff", b"\xe2\x80\xa8", b"'", b'"',
    b"$", b"${", b"$budget", b"auto", b"null", b"~", b"true", b"-1", b"0", b"1e999999999", b".nan", b".inf",
    b"0x7fffffffffffffff", b"0o17", b"1:2:3", b"2020-01-01", b"9" * 5000, b"1/0", b"11-3", b"0-99999999", b"all",
    b"name: ", b"stack: ", b"budget: {count: 9007199254740992}", b"seed: $seed", b"[" * 200, b"x" * 300, b"\r\n",
    b"\xef\xbb\xbf", b"\n\n",
]  # fmt: skip


def mutated(content: bytes, random_: random.Random) -> bytes:
    """The text with a few changes of the kinds that hands, editors and disks make."""
    data = bytearray(content)
    for _ in range(random_.randint(1, 4)):
        lines = bytes(data).split(b"\n")
        place = random_.randrange(len(data) + 1)
        match random_.randrange(8):
            case 0:
                data[place : place + 1] = bytes([random_.randrange(256)])
            case 1:
                data[place:place] = random_.choice(TOKENS)
            case 2:
                data[place : place + random_.randint(1, 20)] = random_.choice(TOKENS)
            case 3:
                del data[place : place + random_.randint(1, 60)]
            case 4:
                del data[place:]
            case 5:
                lines.insert(random_.randrange(len(lines)), random_.choice(lines))
                data = bytearray(b"\n".join(lines))
            case 6:
                random_.shuffle(lines)
                data = bytearray(b"\n".join(lines))
            case _:
                number = random_.randrange(len(lines))
                lines[number] = b" " * random_.randint(0, 6) + lines[number].lstrip()
                data = bytearray(b"\n".join(lines))
    return bytes(data)


def check(content: bytes, path: Path, target: Target) -> list[Trial]:
    """The trials of a spec with this content, [] where it is refused; whatever else is raised comes through."""
    path.write_bytes(content)
    try:
        with ends():
            trials = expand(load_spec(path), target)
    except SpecError as error:
        trials, refusal = [], str(error)
    else:
        refusal = str(path)
    assert refusal.startswith(str(path)) and len(refusal) < 50_000, "a refusal begins with the file"
    return trials


@contextmanager
def ends() -> Iterator[None]:
    """Break off what never ends, so that the content that did it is shown."""

    def never(signal_number: int, frame: object) -> None:
        pytest.fail("this content keeps a person waiting for ever")  # no error that a loader could take for a refusal

    before = signal.signal(signal.SIGALRM, never)
    signal.alarm(PATIENCE)
    try:
        yield
    finally:
        signal.alarm(0)
        signal.signal(signal.SIGALRM, before)


def bombard(count: int, seed: int, tmp_path: Path, target: Target) -> int:
    """How many of so many mutated specs still load."""
    random_ = random.Random(seed)
    loaded = 0
    for number in range(count):
        content = mutated(SHIPPED[number % len(SHIPPED)].read_bytes(), random_)
        trials = check(content, tmp_path / "fuzzed.yaml", target)
        loaded += bool(trials)
        assert len({trial.key for trial in trials}) == len(trials)
    return loaded


def test_a_mutated_spec_loads_or_is_refused_in_words(tmp_path: Path, target: Target) -> None:
    count = 40
    loaded = bombard(count, 0, tmp_path, target)
    assert 0 < loaded < count, "both must happen, or the changes are too weak or too strong"


@pytest.mark.slow
def test_a_thousand_mutated_specs_load_or_are_refused_in_words(tmp_path: Path, target: Target) -> None:
    """``SIEVIT_FUZZ=SEED`` begins elsewhere; a failure shows the file it failed on."""
    assert bombard(1000, int(os.environ.get("SIEVIT_FUZZ", "1")), tmp_path, target) > 0


@settings(deadline=None, max_examples=100)
@given(content=st.binary(max_size=200))
def test_no_bytes_at_all_can_cause_anything_but_a_refusal(
    tmp_path_factory: pytest.TempPathFactory, target: Target, content: bytes
) -> None:
    assert check(content, tmp_path_factory.getbasetemp() / "bytes.yaml", target) == []


@pytest.mark.parametrize(
    "content",
    [
        b"x: " + b"[" * (MAX_BYTES // 2),
        b"x: " + b"{a: " * (MAX_BYTES // 8),
        b"- " * (MAX_BYTES // 2),
        b"a: " + b"!" * (MAX_BYTES - 10),
        b"? " * (MAX_BYTES // 2),
        b"a: '" + b"\\" * (MAX_BYTES - 10),
        b"".join(b"k%d: v\n" % number for number in range(6000)),
        b"name: " + b"9" * (MAX_BYTES - 10),
        b'"' + b"\\x41" * (MAX_BYTES // 4 - 2) + b'"',
        b"a: " + b"1_" * (MAX_BYTES // 2 - 4) + b"1",
        b"a: " + b":".join([b"59"] * (MAX_BYTES // 3 - 4)),
        b"a: 0x" + b"f" * (MAX_BYTES - 10),
    ],
    ids=[
        "lists", "mappings", "dashes", "tags", "keys", "quotes", "many_keys", "digits", "escapes", "underscores",
        "base_60", "hexadecimal",
    ],
)  # fmt: skip
def test_a_spec_made_to_be_slow_is_refused_soon(content: bytes, tmp_path: Path, target: Target) -> None:
    assert len(content) <= MAX_BYTES
    assert check(content, tmp_path / "slow.yaml", target) == []


HUGE = ["9007199254740992", "'1e999999999'", "'" + "9" * 5000 + "'", "'1e-999999999'", "1.0e+300", "'0x10'", "-0.0"]


@pytest.mark.parametrize("value", HUGE)
@pytest.mark.parametrize("kind", ["count", "ratio", "drop"])
def test_no_number_in_a_budget_fills_the_memory(value: str, kind: str, tmp_path: Path, target: Target) -> None:
    for also in ("", "target: [0.5], "):
        auto = f", {{name: tome, budget: {{{kind}: auto}}}}" if also else ""
        stack = f"[{{name: topk, budget: {{{kind}: {value}}}}}{auto}]"
        text = f"{{name: a, title: A, arms: [{{variant: v, x: budget, {also}stages: [{{at: 3, stack: {stack}}}]}}]}}"
        check(text.encode(), tmp_path / "huge.yaml", target)


LONG = "9" * 5000


@pytest.mark.parametrize("where", [f"['{LONG}']", f"'{LONG}'", f"'0-{LONG}'", "['3-5']"])
def test_no_block_number_is_too_long_to_be_refused(where: str, tmp_path: Path, target: Target) -> None:
    text = f"{{name: a, title: A, arms: [{{variant: v, stages: [{{at: {where}, stack: [{{name: identity}}]}}]}}]}}"
    assert check(text.encode(), tmp_path / "block.yaml", target) == []


# --- what is right stays right, however it is written -----------------------------------------------------------------

shares = st.integers(1, 100).map(lambda n: n / 100)
budgets = (
    st.fixed_dictionaries({"count": st.integers(1, 64)})
    | st.fixed_dictionaries({"ratio": shares}, optional={"of": st.just("initial"), "rounding": st.just("ceil")})
    | st.fixed_dictionaries({"drop": st.integers(0, 8)})
)
stacks = st.lists(
    st.one_of(
        st.builds(lambda b: {"name": "topk", "budget": b}, budgets),
        st.builds(lambda b, s: {"name": "random", "budget": b, "seed": s}, budgets, st.integers(0, 9)),
        st.builds(lambda b: {"name": "evit", "budget": b}, budgets),
        st.just({"name": "identity"}),
    ),
    min_size=1,
    max_size=2,
)
places = st.integers(0, 11) | st.lists(st.integers(0, 11), min_size=1, max_size=4, unique=True)


@st.composite
def written(draw: st.DrawFn) -> dict:
    """A valid spec as plain data: fixed stages, or one that varies with its seed."""
    arms = [
        {"variant": f"arm {number}", "stages": draw(st.lists(st.fixed_dictionaries({"at": places, "stack": stacks}),
                                                          min_size=1, max_size=2))}
        for number in range(draw(st.integers(1, 3)))
    ]  # fmt: skip
    counts = draw(st.lists(st.integers(1, 64), min_size=1, max_size=3, unique=True))
    seeds = draw(st.lists(st.integers(0, 99), min_size=1, max_size=3, unique=True))
    arms.append(
        {
            "variant": "varied",
            "x": "K",
            "vary": {"K": counts},
            "seeds": seeds,
            "stages": [{"at": 3, "stack": [{"name": "random", "seed": "$seed", "budget": {"count": "$K"}}]}],
        }
    )
    spec = {"name": "written", "title": "Written by a machine", "arms": arms}
    return json.loads(json.dumps(spec))  # no part twice: YAML would write the second as an alias


def turned(value: object) -> object:
    """The same data with the keys of every mapping in the opposite order."""
    if isinstance(value, dict):
        return {key: turned(value[key]) for key in reversed(value)}
    return [turned(item) for item in value] if isinstance(value, list) else value


@settings(deadline=None, max_examples=30)
@given(spec=written())
def test_no_way_of_writing_a_spec_changes_a_key(spec: dict, target: Target) -> None:
    texts = [
        yaml.safe_dump(spec, sort_keys=False),
        yaml.safe_dump(spec, default_flow_style=True),
        yaml.safe_dump(turned(spec), sort_keys=False),
        yaml.safe_dump(spec, indent=7, width=30),
        "# a comment\n" + yaml.safe_dump(spec, explicit_start=True),
    ]
    keys = [[trial.key for trial in expand(parse_spec(text), target)] for text in texts]
    assert all(other == keys[0] for other in keys)
    varied = spec["arms"][-1]
    expected = len(varied["vary"]["K"]) * len(varied["seeds"])
    assert sum(trial.variant == "varied" for trial in expand(parse_spec(texts[0]), target)) == expected


@settings(deadline=None, max_examples=20)
@given(spec=written())
def test_a_trial_read_back_from_its_own_stages_is_the_same_trial(spec: dict, target: Target) -> None:
    """The stages a result records are plain data that anyone can run again."""
    for trial in expand(parse_spec(yaml.safe_dump(spec)), target):
        again = {
            "name": trial.spec, "title": "Again",
            "arms": [{"variant": trial.variant, "x": trial.x, "stages": trial.stages.plain(), "seeds": [trial.seed]}],
        }  # fmt: skip
        if trial.x is None:
            del again["arms"][0]["x"]
        (same,) = expand(parse_spec(yaml.safe_dump(again)), target)
        assert same.stages == trial.stages and same.computation == trial.computation


def test_what_needs_memory_beyond_reason_is_refused_and_not_tried(tmp_path: Path) -> None:
    """Methods that learn so many tokens make parameters when they are attached."""
    for name in ("patch_merger", "sinkhorn", "stvit", "token_learner", "sit"):
        path = tmp_path / f"{name}.yaml"
        path.write_text(
            f"name: {name}\ntitle: A\narms:\n  - variant: v\n    training: {{epochs: 1, stages: [{{at: 3, stack: "
            f"[{{name: {name}, budget: {{count: 9007199254740992}}}}]}}]}}\n"
            f"    stages: [{{at: 3, stack: [{{name: {name}, budget: {{count: 9007199254740992}}}}]}}]\n"
        )
        refusal = str(path)
        try:
            preview(RunSettings(out=tmp_path, model="digits_vit_tiny", weights="random", specs=(str(path),)))
        except SpecError as error:
            refusal = str(error)
        assert str(path) in refusal


def test_shipped_specs_are_what_was_mutated() -> None:
    assert {file.path for file in find_specs(only_default=False)} == set(SHIPPED)
