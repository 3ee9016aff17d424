"""The benchmarks measure what they say; no test asserts a time."""

from __future__ import annotations

import json
import os
import statistics
import subprocess
import sys
import time
from dataclasses import asdict, replace
from pathlib import Path

import pytest
import timm
import torch
from PIL import Image
from timm.models.vision_transformer import VisionTransformer
from torch import Tensor, nn

from ablations.precision import has_bfloat16
from benchmarks import gpu, models, still
from benchmarks.__main__ import main, parser
from benchmarks.commands import scenarios
from benchmarks.counts import SETTINGS, Counts, Replay, record, write
from benchmarks.figures import scaling_figure, speed_figure
from benchmarks.halting import ReplayedAViT, replayed
from benchmarks.memory import peak_bytes
from benchmarks.padded import PaddedViT
from benchmarks.pooled import pool
from benchmarks.profiling import Marked, profile_ops, profile_table, wrapped
from benchmarks.reference_tome import ReferenceToMe
from benchmarks.scaling import Decided, decided, measure
from benchmarks.session import Scenario, Source, run_scaling, run_speed
from benchmarks.speed import Effort, Timing, compare
from benchmarks.subjects import compiled_ones, folded_gmacs, most_telling, packed, padded, subjects
from benchmarks.timing import Quartiles, Turns, take_turns
from reducers import ATS, Count, Drop, EViT, Placement, Ratio, ToMe, TopK, at, every, reduce_tokens
from reducers.errors import ReducerError
from tests.hostile import RC
from tests.without import run_without

ROOT = Path(__file__).parent.parent
CPU = torch.device("cpu")
QUICK = Effort(rounds=2, warmup=1, training_batch=2)
UNWEIGHED = replace(QUICK, memory=False)  # it is measured by a profiler, which takes longest
TINY = "test_vit"  # timm's own: six blocks, 64 wide


def tiny(depth: int = 12, **settings: object) -> VisionTransformer:
    """A twelve-block network on 8 x 8 patches, its attention far from uniform."""
    torch.manual_seed(0)
    model = VisionTransformer(
        img_size=64, patch_size=8, embed_dim=32, depth=depth, num_heads=2, num_classes=5, **settings
    ).eval()
    for block in model.blocks:
        nn.init.normal_(block.attn.qkv.weight, std=0.4)
    return model


def pictures(count: int) -> Tensor:
    return torch.randn(count, 3, 64, 64, generator=torch.Generator().manual_seed(1))


def counts_of(kept: list[list[int]], *, k: int, initial: int = 64) -> Counts:
    table = torch.tensor(kept)
    return Counts("counts of a test", initial, {(table.shape[1] == 1, k): table})


# ---- times and ratios


def test_ratios_are_taken_within_a_pair() -> None:
    beside = [4.0, 8.0, 2.0]
    turns = Turns({"dense": [1.0], "half": [2.0, 4.0, 1.0]}, {"dense": [1.0], "half": beside}, {})
    assert turns.ratio("half") == Quartiles(2.0, 2.0, 2.0)
    assert turns.ratio("dense") == Quartiles(1.0, 1.0, 1.0)
    assert turns.median("half") == 2.0


def test_every_variant_takes_its_turn_beside_the_first_and_sees_the_round() -> None:
    calls: list[tuple[str, int]] = []
    runs = {name: (lambda number, name=name: calls.append((name, number))) for name in ("a", "b", "c")}
    turns = take_turns(runs, CPU, rounds=3, warmup=2)
    warmup, timed = calls[:6], calls[6:]
    assert sorted(warmup) == [(name, number) for name in "abc" for number in (0, 1)]
    pairs = [timed[start : start + 4] for start in range(0, len(timed), 4)]
    for place, pair in enumerate(pairs):
        assert pair[0] == pair[1] and pair[2] == pair[3], "each twice, of which the second counts"
        assert {number for _, number in pair} == {place // 2}
        assert [name for name, _ in (pair[0], pair[2])].count("a") == 1, "and always with the first one"
    assert len(pairs) == 6 and {pair[0][0] for pair in pairs} > {"a"}, "which of the two is first changes"
    assert {name: len(times) for name, times in turns.seconds.items()} == {"a": 6, "b": 3, "c": 3}
    assert [len(turns.beside[name]) for name in "bc"] == [3, 3]


def test_a_variant_that_fails_is_left_out_with_its_reason() -> None:
    def fail(number: int) -> None:
        raise torch.OutOfMemoryError("no room\nand a long story")

    turns = take_turns({"dense": lambda number: None, "large": fail}, CPU, rounds=2, warmup=1)
    assert turns.errors == {"large": "OutOfMemoryError: no room"}
    assert list(turns.seconds) == ["dense"]
    with pytest.raises(torch.OutOfMemoryError):
        take_turns({"dense": fail}, CPU, rounds=1, warmup=1)


def test_every_variant_is_timed_beside_the_dense_model() -> None:
    listed = [packed("top-K", lambda start: at(0, TopK(Count(4))))]
    dense, topk = compare(tiny(2), listed, pictures(3), batch=3, effort=QUICK)
    assert (dense.variant, dense.kind, dense.gmacs_ratio, dense.speedup, dense.memory_ratio) == (
        "dense",
        "dense",
        1,
        1,
        1,
    )
    assert topk.gmacs is not None and dense.gmacs is not None and topk.gmacs < dense.gmacs
    assert topk.speedup is not None and topk.gmacs_ratio is not None
    assert topk.efficiency == pytest.approx(topk.speedup / topk.gmacs_ratio)
    assert topk.speedup_low is not None and topk.speedup_high is not None
    assert topk.speedup_low <= topk.speedup <= topk.speedup_high
    assert topk.training_batch == 2 and topk.training_speedup is not None


def test_at_batch_one_several_images_take_turns_and_cost_is_their_mean() -> None:
    model, images = tiny(4), pictures(8)
    place = at(1, ATS(Count(20)))
    _, ats = compare(model, [packed("ATS", lambda start: place)], images, batch=1, effort=replace(QUICK, memory=False))
    assert ats.gmacs == pytest.approx(float(reduce_tokens(model, place).cost(images).mean()) / 1e9)
    assert ats.memory_ratio is None and ats.training_speedup is None


def test_the_step_of_a_training_run_leaves_no_gradients_behind() -> None:
    model = tiny(2)
    compare(model, [packed("top-K", lambda start: at(0, TopK(Count(4))))], pictures(2), batch=2, effort=UNWEIGHED)
    assert all(parameter.grad is None for parameter in model.parameters())


def test_a_variant_that_cannot_be_run_has_a_row_that_says_why() -> None:
    listed = [padded("ToMe", lambda start: at(0, ToMe(Drop(4))), compact=True)]
    _, tome = compare(tiny(2), listed, pictures(2), batch=2, effort=UNWEIGHED)
    assert tome.speedup is None and tome.error is not None and "selections only" in tome.error


# ---- memory


def test_peak_memory_is_what_lived_at_one_time() -> None:
    def run() -> None:
        first = torch.empty(1000, dtype=torch.uint8)
        second = torch.empty(500, dtype=torch.uint8)
        del first, second
        torch.empty(1200, dtype=torch.uint8)

    assert 1500 <= peak_bytes(run, CPU) < 1700  # the allocator may round up


# ---- the padded contrast


@pytest.mark.parametrize("compact", [True, False])
@pytest.mark.parametrize("blocks", [[3], [3, 4, 7, 11]])
def test_the_padded_run_gives_the_packed_logits(compact: bool, blocks: list[int]) -> None:
    model, images = tiny(), pictures(5)
    place = at(blocks, ATS(Count(24)))
    with torch.inference_mode():
        expected, trace = reduce_tokens(model, place).trace(images)
        logits = PaddedViT(model, place, compact=compact)(images)
    assert len(trace.tokens[:, -1].unique()) > 1, "the images must differ in their counts"
    torch.testing.assert_close(logits, expected, atol=2e-4, rtol=1e-4)


def test_the_padded_run_of_a_fixed_count_gives_the_packed_logits() -> None:
    model, images = tiny(), pictures(3)
    place = at([3, 6], TopK(Ratio(0.5, of="initial")))
    with torch.inference_mode():
        for compact in (True, False):
            logits = PaddedViT(model, place, compact=compact)(images)
            torch.testing.assert_close(logits, reduce_tokens(model, place)(images), atol=2e-4, rtol=1e-4)


def test_the_padded_run_refuses_what_it_cannot_carry_out() -> None:
    model = tiny(2)
    with pytest.raises(ReducerError, match="selections only"):
        PaddedViT(model, at(0, EViT(Ratio(0.5))), compact=True)(pictures(1))
    with pytest.raises(ReducerError, match="class token"):
        PaddedViT(tiny(2, global_pool="avg"), Placement(), compact=True)


# ---- the reference ToMe


@pytest.mark.parametrize("fused", [True, False])
def test_the_reference_tome_agrees_with_the_project_s(fused: bool) -> None:
    model, images = tiny(), pictures(3)
    with torch.inference_mode():
        expected = reduce_tokens(model, every(1, ToMe(Drop(4))))(images)
        torch.testing.assert_close(ReferenceToMe(model, 4, fused=fused)(images), expected, atol=2e-4, rtol=1e-4)


def test_the_reference_tome_merges_no_more_than_half() -> None:
    model = tiny(4)
    with torch.inference_mode():
        expected = reduce_tokens(model, every(1, ToMe(Drop(40)), depth=4))(pictures(2))
        torch.testing.assert_close(ReferenceToMe(model, 40)(pictures(2)), expected, atol=2e-4, rtol=1e-4)


# ---- replayed counts


def test_replay_keeps_the_counts_it_is_given() -> None:
    kept = [[40, 33, 12], [20, 20, 1], [64, 50, 50], [50, 49, 48]]
    counts = counts_of(kept, k=64)
    model = tiny()
    replay = counts.replay(blocks=[3, 4, 5], k=64, initial=64, start=1)
    _, trace = reduce_tokens(model, at([3, 4, 5], replay)).trace(pictures(5))
    expected = [kept[1], kept[2], kept[3], kept[0], kept[1]]
    assert (trace.tokens[:, 4:7] - 1).tolist() == expected


def test_replay_keeps_as_many_tokens_as_it_has_points() -> None:
    counts = counts_of([[48], [47]], k=48)
    _, trace = reduce_tokens(tiny(), at(3, counts.replay(blocks=[3], k=48, initial=64))).trace(pictures(2))
    assert (trace.tokens[:, 4] - 1).tolist() == [48, 47]


def test_replay_grows_with_the_tokens_and_with_the_stages() -> None:
    counts = counts_of([[30, 20, 10]], k=40, initial=16)
    replay = counts.replay(blocks=[1, 2], k=40, initial=64)
    assert replay.budget == Count(160)
    assert {block: kept.tolist() for block, kept in replay.kept.items()} == {1: [120], 2: [40]}


@pytest.mark.parametrize("compact", [True, False])
def test_replay_keeps_the_same_counts_in_the_padded_run(compact: bool) -> None:
    counts = counts_of([[40, 33], [20, 12]], k=64)
    model, images = tiny(), pictures(2)

    def place() -> Placement:
        return at([3, 7], counts.replay(blocks=[3, 7], k=64, initial=64))

    with torch.inference_mode():
        logits = PaddedViT(model, place(), compact=compact)(images)
        torch.testing.assert_close(logits, reduce_tokens(model, place())(images), atol=2e-4, rtol=1e-4)


def test_replay_does_the_work_of_ats() -> None:
    """The same multiply-adds are booked for deciding: the scores are computed though others are used."""
    counts = counts_of([[30]] * 3, k=30)
    model, images = tiny(4), pictures(3)
    _, live = reduce_tokens(model, at(1, ATS(Count(30)))).trace(images)
    _, replayed = reduce_tokens(model, at(1, counts.replay(blocks=[1], k=30, initial=64))).trace(images)
    assert torch.equal(live.reducer_macs, replayed.reducer_macs)


def test_recorded_counts_are_read_back_and_replayed(tmp_path: Path) -> None:
    model, images = tiny(), pictures(3)
    write(record(model, images, origin="a test", batch=2), tmp_path / "counts.json")
    counts = Counts.load(tmp_path / "counts.json")
    assert (counts.origin, counts.initial, len(counts.kept)) == ("a test", 64, len(SETTINGS))
    blocks = list(range(3, 12))
    _, live = reduce_tokens(model, at(blocks, ATS(Count(108)))).trace(images)
    replay = counts.replay(blocks=blocks, k=108, initial=64)
    _, replayed = reduce_tokens(model, at(blocks, replay)).trace(images)
    assert isinstance(replay, Replay) and torch.equal(live.tokens, replayed.tokens)


def test_the_counts_shipped_are_those_of_real_images() -> None:
    counts = Counts.load()
    assert counts.initial == 196
    for (single, k), kept in counts.kept.items():
        assert kept.shape == (256, 1 if single else 9)
        assert kept.min() >= 1 and kept.max() <= min(k, 196)
        assert (kept.diff(dim=1) <= 0).all()
    assert {k for _, k in counts.kept} == {k for _, _, k in SETTINGS}


# ---- the list of variants


@pytest.mark.parametrize("depth", [6, 12, 24])
def test_the_variants_fit_a_network_of_any_depth(depth: int) -> None:
    model = tiny(depth)
    listed = subjects(model, Counts.load(), reference=True)
    assert {subject.kind for subject in listed} == {"packed", "padded", "masked", "reference"}
    assert len({subject.name for subject in listed}) == len(listed)
    for subject in listed:
        subject.place(3).resolve(depth)
    assert {subject.kind for subject in subjects(model, None, contrast=False)} == {"packed"}


def test_the_variants_of_deit_are_those_of_the_papers() -> None:
    with torch.device("meta"):
        model = VisionTransformer(embed_dim=192, num_heads=3)
    names = [subject.name for subject in subjects(model, None, contrast=False)]
    assert names == [
        "top-K, half at block 3", "random, half at block 3", "EViT 0.7 at blocks 3, 6, 9", "EViT 0.5 at blocks 3, 6, 9",
        "ToMe r = 8, every block", "ToMe r = 13, every block", "ATS K = 160 at block 3", "ATS K = 96 at block 3",
        "ATS K = 48 at block 3", "ATS K = 196 at blocks 3-11", "ATS K = 160 at blocks 3-11",
        "ATS K = 108 at blocks 3-11", "STViT, 16 tokens from blocks 4, 5", "A-ViT, 0.8 G replayed",
    ]  # fmt: skip


# ---- what is in print of A-ViT and of STViT on Swin


def test_replayed_halting_keeps_the_counts_it_is_given_and_ends_images() -> None:
    model, images = tiny(4), pictures(3)
    kept = {1: torch.tensor([64, 30, 1]), 2: torch.tensor([40, 7, 0]), 3: torch.tensor([40, 0, 0])}
    fast = reduce_tokens(model, at([1, 2, 3], ReplayedAViT(kept)))
    logits, trace = fast.trace(images)
    assert trace.tokens.tolist() == [[65, 65, 65, 41, 41], [65, 65, 31, 8, 0], [65, 65, 2, 0, 0]]
    assert logits.isfinite().all()
    places = trace.kept(2)[0].nonzero()[:, 0]
    assert len(places) == 40 and places.diff().max() <= 3, "they are spread over the image"


def test_depths_of_halting_are_sought_for_a_cost() -> None:
    model, images = tiny(), pictures(64)
    dense = float(reduce_tokens(model, Placement()).cost(images[:1]))
    for share in (0.4, 0.7):
        with torch.no_grad():
            trace = reduce_tokens(model, replayed(model, share * dense)).trace(images)[1]
        executed = float((trace.macs - trace.reducer_macs).mean())
        assert executed / dense == pytest.approx(share, abs=0.003)
        halted = trace.tokens[:, 1:].double().mean(0)
        assert (halted.diff() <= 0).all() and trace.tokens.unique(dim=0).shape[0] > 10, "images differ"
    with pytest.raises(ValueError, match="no depths of halting cost"):
        replayed(model, 1.1 * dense)
    first, later = (replayed(model, 0.5 * dense, start).blocks[3].kept[3] for start in (0, 5))
    assert torch.equal(later, first.roll(-5))


def test_a_swin_is_timed_beside_stvit_by_its_base_blocks() -> None:
    model = timm.create_model(
        "swin_tiny_patch4_window7_224", img_size=56, patch_size=1, embed_dim=8, num_heads=(1, 2, 4, 8), num_classes=5
    ).eval()  # fmt: skip
    listed = subjects(model, None)
    assert [subject.name for subject in listed] == [
        f"STViT, 16 tokens a window, {base} base block{'s' * (base > 1)}" for base in (1, 2, 4)
    ]
    rows = compare(model, listed[:2], torch.randn(2, 3, 56, 56), batch=2, effort=UNWEIGHED)
    assert [row.error for row in rows] == [None] * 3 and rows[0].gmacs_ratio == 1
    assert rows[1].gmacs_ratio > rows[2].gmacs_ratio > 1, "more base blocks cost more"


# ---- growth


def test_known_decisions_are_carried_out_as_live_ones() -> None:
    model, images = tiny(), pictures(3)
    for placement in (at([3, 5], ATS(Count(24))), at([3, 6], EViT(Ratio(0.7))), every(1, ToMe(Drop(4)))):
        live, known = reduce_tokens(model, placement), reduce_tokens(model, decided(placement))
        with torch.inference_mode():
            expected = live(images)
            assert torch.equal(known(images), expected)
            for reducer in known.placement.blocks.values():
                assert isinstance(reducer, Decided)
                reducer.inner.decide = None  # type: ignore[method-assign,assignment]  # nobody asks again
            assert torch.equal(known(images), expected)


@pytest.mark.slow
def test_growth_is_measured_with_the_deciding_apart() -> None:
    points = measure(tiny(), Counts.load(), pictures(2), rounds=2, warmup=1)
    assert [point.variant for point in points] == ["dense", "ToMe", "EViT", "ATS"]
    assert all(point.error is None and point.peak_mib for point in points)
    assert [point.deciding is None for point in points] == [True, False, False, False]
    assert all(point.gmacs and point.gmacs < (points[0].gmacs or 0) for point in points[1:])


# ---- files


def source(folder: Path, said: list[str] | None = None) -> Source:
    return Source(CPU, folder, say=(said if said is not None else []).append)


@pytest.mark.slow
def test_a_scenario_writes_table_data_and_figure(tmp_path: Path) -> None:
    only = ("top-K", "ATS K = 9 at blocks 1-5", "written out")  # one packed, padded, masked and reference at least
    scenario = Scenario(TINY, (1, 2), size=64, effort=QUICK, reference=True, profiled=True, only=only)
    rows = run_speed(scenario, source(tmp_path))
    stem = tmp_path / f"speed-{TINY}-64-float32-cpu"
    data = json.loads(stem.with_suffix(".json").read_text())
    assert data["rows"] == rows and set(rows[0]) == set(Timing.__dataclass_fields__)
    assert data["machine"]["torch"] == torch.__version__
    assert "dense" in data["profiles"] and data["profiles"]["dense"]["ops"]
    assert [row["error"] for row in rows] == [None] * len(rows)
    assert {row["kind"] for row in rows} == {"dense", "packed", "padded", "masked", "reference"}
    text = stem.with_suffix(".md").read_text()
    assert "## Batch 1" in text and "## Batch 2" in text and "ATS's counts replayed" in text
    assert stem.with_suffix(".png").read_bytes().startswith(b"\x89PNG")


def test_a_scenario_can_be_cut_to_some_variants(tmp_path: Path) -> None:
    effort = Effort(rounds=1, warmup=1, memory=False)
    rows = run_speed(Scenario(TINY, (2,), size=32, dtype="bfloat16", effort=effort, only=("top-K",)), source(tmp_path))
    assert [row["kind"] for row in rows] == ["dense", "packed", "masked"]
    notes = json.loads((tmp_path / f"speed-{TINY}-32-bfloat16-cpu.json").read_text())["notes"]
    assert any("no units for bfloat16" in note for note in notes) != has_bfloat16(CPU), "it looks before it casts"


@pytest.mark.slow
def test_several_processes_are_pooled(tmp_path: Path) -> None:
    asked = ["--model", TINY, "--size", "32", "--batch", "2", "--rounds", "2", "--only", "top-K", "--device", "cpu"]
    assert main(["speed", *asked, "--processes", "2", "--out", str(tmp_path)]) == 0
    stem = tmp_path / f"speed-{TINY}-32-float32-cpu"
    dense, top_k, masked = json.loads(stem.with_suffix(".json").read_text())["rows"]
    assert [len(row["seconds"]) for row in (dense, top_k, masked)] == [8, 4, 4]
    ratios = [beside / own for beside, own in zip(top_k["dense_seconds"], top_k["seconds"], strict=True)]
    assert top_k["speedup"] == pytest.approx(statistics.median(ratios))
    of_each = [statistics.median(part) / top_k["gmacs_ratio"] for part in (ratios[:2], ratios[2:])]
    assert [top_k["efficiency_lowest"], top_k["efficiency_highest"]] == pytest.approx(sorted(of_each), rel=0.01)
    assert top_k["memory_ratio"] is not None
    text = stem.with_suffix(".md").read_text()
    assert "in each of 2 processes" in text and f"{top_k['efficiency']:.2f} ({min(of_each):.2f}" in text


def test_pooled_tables_must_agree_and_a_failure_in_one_is_told() -> None:
    row = {
        **asdict(Timing("ATS", "packed", 2)),
        "seconds": [0.5],
        "dense_seconds": [1.0],
        "efficiency": 1.0,
        "gmacs_ratio": 2.0,
    }
    with pytest.raises(ValueError, match="same rows"):
        pool([[row], [{**row, "variant": "ToMe"}]])
    (failed,) = pool([[row], [{**row, "error": "out of memory"}]])
    assert failed["error"] == "out of memory" and failed["speedup"] is None and failed["variant"] == "ATS"


@pytest.mark.slow  # as tests/test_house.py sees of the command
def test_without_matplotlib_the_figure_is_left_out_with_a_message(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    run_speed(Scenario(TINY, (1,), size=32, effort=Effort(rounds=1, memory=False), only=("top-K",)), source(tmp_path))
    assert sorted(file.suffix for file in tmp_path.iterdir()) == [".json", ".md"]
    assert "matplotlib is not installed" in caplog.text


SPEEDS = [
    {"variant": variant, "kind": kind, "batch": batch, "gmacs_ratio": 1.5, "speedup": 1.4, "speedup_low": 1.3,
     "speedup_high": 1.5}
    for batch in (1, 8) for variant, kind in (("dense", "dense"), ("ATS K = 9", "packed"), ("ATS K = 9", "padded"))
]  # fmt: skip
GROWTH = [
    {"series": series, "tokens": tokens, "batch": batch, "variant": "ToMe", "milliseconds": 0.5 * tokens,
     "peak_mib": None, "deciding": 0.1, "error": None}
    for series, tokens, batch in (("tokens", 16, 1), ("tokens", 64, 1), ("batch", 64, 1), ("batch", 64, 8))
]  # fmt: skip


def drawn(folder: Path) -> dict[str, bytes]:
    folder.mkdir()
    speed_figure(SPEEDS, "Speed", folder / "speed.png")
    scaling_figure(GROWTH, "Growth", folder / "growth.png")
    return {file.name: file.read_bytes() for file in folder.iterdir()}


def test_figures_are_the_same_under_whatever_settings_and_leave_them(tmp_path: Path) -> None:
    mpl = pytest.importorskip("matplotlib")
    before = drawn(tmp_path / "plain")
    assert set(before) == {"speed.png", "growth.png"}
    with mpl.rc_context(), pytest.MonkeyPatch.context() as patch:
        for line in RC.splitlines():
            name, _, value = line.partition(": ")
            if name not in ("backend", "lines.linewidth", "path.sketch"):
                mpl.rcParams[name] = value
        theirs = dict(mpl.rcParams)
        patch.setenv("MPLBACKEND", "module://matplotlib_inline.no_such_backend")
        assert drawn(tmp_path / "theirs") == before
        assert dict(mpl.rcParams) == theirs


@pytest.mark.slow
@pytest.mark.parametrize("settings", [RC.encode(), b"\xff\xfe\x00"], ids=["hostile", "no text"])
def test_neither_a_notebooks_backend_nor_a_file_of_settings_reaches_a_figure(settings: bytes, tmp_path: Path) -> None:
    pytest.importorskip("matplotlib")
    (tmp_path / "rc").write_bytes(settings)
    program = (
        "import json, os, sys; from pathlib import Path; from benchmarks.figures import scaling_figure, speed_figure; "
        "there, (speeds, growth) = Path(sys.argv[1]), json.loads(sys.argv[2]); "
        "speed_figure(speeds, 'Speed', there / 'speed.png'); scaling_figure(growth, 'Growth', there / 'growth.png'); "
        "print(os.environ['MPLBACKEND'], os.environ['MATPLOTLIBRC'])"
    )
    (tmp_path / "there").mkdir()
    backend = "module://matplotlib_inline.no_such_backend"  # as of a notebook whose Python is another
    done = subprocess.run(
        [sys.executable, "-c", program, str(tmp_path / "there"), json.dumps([SPEEDS, GROWTH])],
        cwd=ROOT, capture_output=True, text=True, check=False,
        env=os.environ | {"MPLBACKEND": backend, "MATPLOTLIBRC": str(tmp_path / "rc"), "LC_ALL": "C"},
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    assert done.stdout.split() == [backend, str(tmp_path / "rc")], "the user's own stays"
    found = {file.name: file.read_bytes() for file in (tmp_path / "there").iterdir()}
    assert found == drawn(tmp_path / "plain")


@pytest.mark.slow
def test_growth_writes_table_data_and_figure(tmp_path: Path) -> None:
    points = run_scaling(TINY, [64, 32], [1, 2], "float32", source(tmp_path), rounds=1)
    assert [(p["series"], p["tokens"], p["batch"]) for p in points[::4]] == [
        ("tokens", 4, 1), ("tokens", 16, 1), ("batch", 4, 1), ("batch", 4, 2),
    ]  # fmt: skip
    assert sorted(file.suffix for file in tmp_path.iterdir()) == [".json", ".md", ".png"]
    assert "deciding" in (tmp_path / f"scaling-{TINY}-float32-cpu.md").read_text()


@pytest.mark.slow
def test_the_gpu_s_measurements_run_at_toy_size_with_torch_and_timm_alone(tmp_path: Path) -> None:
    lacking = ("ray", "fvcore", "pydantic", "pyarrow", "yaml", "optuna", "pandas", "rich", "matplotlib", "sklearn")
    words = ["gpu", "--toy", "--device", "cpu", "--minutes", "60", "--out", str(tmp_path)]
    done = run_without(lacking, f"from benchmarks.__main__ import main\nsys.exit(main({words!r}))\n", timeout=1500)
    assert done.returncode == 0, done.stderr
    tables = {name: json.loads((tmp_path / f"speed-{TINY}-{name}-cpu.json").read_text())
              for name in ("32-bfloat16", "64-bfloat16", "32-bfloat16-compiled")}  # fmt: skip
    first = tables["32-bfloat16"]
    assert sorted({row["batch"] for row in first["rows"]}) == [1, 2, 3], "three scenarios' batches in one table"
    names = [row["variant"] for row in first["rows"] if row["batch"] == 2]
    assert [name.partition(" at ")[0] for name in names] == [
        "dense", "top-K, half", "EViT 0.7", "ToMe r = 1, sizes by mask", "ToMe r = 1, sizes by fold",
        "ToMe r = 1, sizes ignored", "ATS K = 2", "ATS K = 2", "random, half",
    ]  # fmt: skip
    mask, fold, ignored = (row for row in first["rows"] if row["batch"] == 2 and "ToMe" in row["variant"])
    assert mask["gmacs"] == fold["gmacs"] == ignored["gmacs"], "costs never depend on the kernel"
    assert fold["folded_gmacs"] > 0 and mask["folded_gmacs"] is None
    assert all(row["error"] is None and row["peak_mib"] is not None for row in first["rows"])
    assert mask["training_batch"] == 2 and mask["training_speedup"] is not None
    for name, known in first["profiles"].items():
        assert sum(known["split"].values()) == pytest.approx(known["busy_ms"], rel=0.05), name
        assert (known["split"]["deciding"] > 0) == (known["launches"]["deciding"] > 0) == (name != "dense")
        assert known["split"]["attention"] > 0 and known["split"]["linear"] > 0
    compiled = tables["32-bfloat16-compiled"]["rows"]
    assert [row["variant"].partition(" ")[0] for row in compiled] == ["dense", "top-K,", "EViT", "ToMe", "ToMe"]
    assert all(row["error"] is None for row in compiled)
    text = (tmp_path / f"speed-{TINY}-32-bfloat16-cpu.md").read_text()
    assert "(fold: + 0.000)" in text and "| *deciding* |" in text and "Where the time goes, batch 2" in text
    assert (
        "went through torch.compile (aot_eager)" in (tmp_path / f"speed-{TINY}-32-bfloat16-compiled-cpu.md").read_text()
    )


def test_the_gpu_s_measurements_begin_nothing_when_the_time_is_up(tmp_path: Path) -> None:
    said: list[str] = []
    small = gpu.toy()
    assert gpu.run(source(tmp_path, said), minutes=-1, scenarios=small) == small
    assert "not measured: test_vit at 32 px" in said[-1] and "compiled" in said[-1]
    assert not list(tmp_path.iterdir())


def test_what_a_gpu_is_asked_is_as_promised_and_in_that_order() -> None:
    asked = [(s.model, s.batches, s.lineup, s.compiler) for s in gpu.SCENARIOS]
    assert asked == [
        ("deit_small_patch16_224", (256,), "telling", None),
        ("deit_small_patch16_224", (1, 1024), "telling", None),
        ("vit_base_patch16_384", (256,), "telling", None),
        ("deit_small_patch16_224", (256,), "compiled", "inductor"),
    ]
    model = models.create("deit_small_patch16_224", size=None, weights=None)[0]
    names = [subject.name for subject in most_telling(model, Counts.load())]
    assert names == [
        "top-K, half at block 3", "EViT 0.7 at blocks 3, 6, 9", "ToMe r = 13, sizes by mask",
        "ToMe r = 13, sizes by fold", "ToMe r = 13, sizes ignored", "ATS K = 108 at blocks 3-11",
        "ATS K = 96 at block 3", "random, half at block 3",
    ]  # fmt: skip
    assert [s.name for s in compiled_ones(model, None)] == names[:4]


def test_time_that_is_up_ends_rounds_and_leaves_out_what_is_not_warm() -> None:
    calls: list[str] = []
    runs = {name: (lambda number, name=name: calls.append(name)) for name in ("dense", "other")}
    turns = take_turns(runs, CPU, rounds=5, warmup=1, until=-1.0)
    assert turns.errors == {"other": "the time was up"} and len(turns.seconds["dense"]) == 2
    ahead = time.monotonic() + 0.2
    turns = take_turns({**runs, "slow": lambda number: time.sleep(0.06)}, CPU, rounds=50, warmup=1, until=ahead)
    assert 2 <= len(turns.seconds["slow"]) < 10 and not turns.errors


def test_the_fold_s_products_are_those_of_its_two_columns() -> None:
    """Of DeiT-S, dense: 44.7 million multiply-adds, an eighth of the attention's own."""
    model = models.create("deit_small_patch16_224", size=None, weights=None)[0]
    folded = packed("", lambda start: every(1, ToMe(Drop(13))), "fold")
    tokens = torch.full((2, 13), 197)
    assert folded_gmacs(folded, model, tokens) * 12 / 11 == pytest.approx(44.7e-3, abs=5e-5), "no sizes in block 0"
    attention = 11 * 2 * 197**2 * 384 / 1e9
    assert folded_gmacs(folded, model, tokens) == pytest.approx(attention / 8)


def test_what_a_pass_launches_is_counted_and_decisions_apart() -> None:
    model, images = tiny(4), pictures(2)
    live = reduce_tokens(model, wrapped(at([1, 2], TopK(Ratio(0.5))), Marked)).eval()
    with torch.inference_mode():
        expected = reduce_tokens(model, at([1, 2], TopK(Ratio(0.5)))).eval()(images)
        assert torch.equal(live(images), expected)
        profiled = profile_ops(lambda: live(images), CPU, passes=1)
        plain = profile_ops(lambda: model(images), CPU, passes=1)
    assert 0 < profiled["launches"]["deciding"] < profiled["launches"]["all"]
    assert plain["launches"]["deciding"] == 0 == plain["split"]["deciding"] and plain["split"]["attention"] > 0
    assert set(profiled["split"]) == {"deciding", "attention", "linear", "other"}
    assert "*launches* (of decisions)" in profile_table({"dense": plain, "top-K": profiled})


def test_ops_are_listed_by_the_time_they_take() -> None:
    model, images = tiny(2), pictures(2)
    profiled = profile_ops(lambda: model(images), CPU, passes=1)
    own = [op["ms"] for op in profiled["ops"]]
    assert own == sorted(own, reverse=True) and profiled["busy_ms"] >= sum(own) - 1e-6
    assert "aten::addmm" in profile_table({"dense": profiled})


# ---- models, images, command line


def test_weights_serve_the_models_of_their_width(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    from safetensors.torch import save_file

    trained, _ = models.create(TINY, size=None, weights=None)
    nn.init.constant_(trained.head.bias, 3.0)
    save_file(trained.state_dict(), tmp_path / "weights.safetensors")
    same, fits = models.create(TINY, size=64, weights=tmp_path / "weights.safetensors")
    assert fits and float(same.head.bias[0].detach()) == 3.0  # at another size the positions are interpolated
    _, fits = models.create("vit_tiny_patch16_224", size=32, weights=tmp_path / "weights.safetensors")
    assert not fits and "weights are random" in caplog.text


def test_images_are_decoded_cropped_and_spread(tmp_path: Path) -> None:
    for number, size in enumerate([(33, 32), (300, 150), (40, 90)]):
        (tmp_path / str(number)).mkdir()
        Image.new("RGB", size, (255, 0, 0)).save(tmp_path / str(number) / "image.png")
    decoded = models.images(4, size=32, data=tmp_path)
    assert decoded.shape == (4, 3, 32, 32)
    assert torch.equal(decoded[3], decoded[0])  # three images, so the first comes again
    assert decoded[:, 0].min() > 2 and decoded[:, 1].max() < -2
    assert models.spread([Path(str(n)) for n in range(10)], 3) == [Path("0"), Path("3"), Path("6")]
    (tmp_path / "none").mkdir()
    with pytest.raises(SystemExit, match="holds no images"):
        models.images(1, size=32, data=tmp_path / "none")


def test_lists_may_be_written_apart_or_together() -> None:
    options = ["speed", "--model", "a b", "c", "--size", "224,384", "--batch", "1", "32", "--train-batch", "0"]
    listed = scenarios(parser().parse_args(options), cuda=False)
    assert [(s.model, s.size) for s in listed] == [(m, s) for m in "abc" for s in (224, 384)]
    assert listed[0].batches == (1, 32) and listed[0].effort.training_batch is None


def test_without_a_gpu_its_command_says_so(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    assert main(["gpu", "--device", "cpu", "--out", str(tmp_path)]) == 1
    assert "no GPU" in capsys.readouterr().out
    assert main(["record", "--device", "cpu"]) == 2


def test_what_stands_still_is_measured_of_folders_of_frames(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    draw = torch.Generator().manual_seed(0)
    frames = tmp_path / "film" / "frames"
    for name in ("half", "moving", "still"):
        (frames / name).mkdir(parents=True)
        first = torch.randint(0, 256, (40, 36, 3), generator=draw, dtype=torch.uint8)  # 2 x 2 patches and a rest
        for number in range(40):
            picture = torch.randint(0, 256, first.shape, generator=draw, dtype=torch.uint8)
            if name != "moving":
                picture[:, : 36 if name == "still" else 18] = first[:, : 36 if name == "still" else 18]
            Image.fromarray(picture.numpy()).save(frames / name / f"{number:05}.png")
    assert main(["still", "--data", str(frames), "--out", str(tmp_path / "out")]) == 0
    json_file, table, drawn = (tmp_path / "out" / f"still-film{suffix}" for suffix in (".json", ".md", ".png"))
    assert capsys.readouterr().out.split() == [str(json_file), str(table), str(drawn)]
    told = json.loads(json_file.read_text())
    read = [(one["reading"]["frames"], one["reading"]["stride"], one["reading"]["deep"]) for one in told["readings"]]
    assert read == [(16, 1, 2), (16, 2, 2), (8, 4, 1)]
    for one in told["readings"]:
        steps = one["reading"]["frames"] // one["reading"]["deep"]
        shares = {name: row["shares"] for name, row in one["folders"].items()}
        most = (steps - 1) / steps
        assert shares["still"] == [most] * len(told["thresholds"])
        assert shares["moving"][0] == 0 and shares["half"][0] == pytest.approx(most / 2)
        assert all(row["kept"] == pytest.approx(row["tabled"][told["tabled"].index(0.1)])
                   for row in one["folders"].values())  # fmt: skip
    assert "| half | 2 | 43.8 | 43.8 | 43.8 | 43.8 | 43.8 |" in table.read_text()
    with Image.open(drawn) as picture_drawn:
        assert picture_drawn.width > 1500
    (frames / "half" / "00039.png").unlink()
    monkeypatch.setattr(still, "READINGS", (still.Reading(frames=64),))
    with pytest.raises(SystemExit, match="half holds 39 frames at this stride, fewer than a clip's 64"):
        main(["still", "--data", str(frames), "--out", str(tmp_path / "out")])
