"""Where the time goes, op by op and part by part, and how many kernels are launched for it."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any, ClassVar

import torch
from torch.profiler import ProfilerActivity, profile, record_function
from torch.utils._python_dispatch import TorchDispatchMode

from benchmarks.report import table
from benchmarks.timing import seconds
from reducers import Placement
from reducers.decision import Decision
from reducers.reducer import State, TokenReducer, Traits
from reducers.signals import Signals

DECIDING = "deciding"
PARTS = (DECIDING, "attention", "linear", "other")
"""What a pass is split into: what the reducers' decisions compute beside the block's own layers (scores, sorting,
matching, index work); the fused attention; linear layers and the patch embedding; the rest, norms and residuals."""

_ATTENTION = ("scaled_dot_product", "flash_attention", "efficient_attention", "cudnn_attention", "varlen_attn")
_LINEAR = ("aten::addmm", "aten::mm", "aten::linear", "aten::_addmm_activation", "aten::conv2d", "aten::convolution")
_LAUNCH_NOTHING = frozenset(
    {
        "empty", "empty_like", "empty_strided", "new_empty", "detach", "lift_fresh", "alias", "promote_types",
        "_record_function_enter_new", "_record_function_exit",
    }
)  # fmt: skip


class Wrapped(TokenReducer):
    """A reducer that decides as another does; made for looking at its decisions from outside."""

    name = "wrapped"

    def __init__(self, inner: TokenReducer) -> None:
        super().__init__()
        self.inner = inner
        told = inner.traits
        self.traits = Traits(
            needs_class_token=told.needs_class_token, cuts_before_values=told.cuts_before_values,
            uses_random=told.uses_random, uses_previous_attention=told.uses_previous_attention,
        )  # fmt: skip


class Marked(Wrapped):
    """Its decisions stand as such in a profile."""

    name = "marked"

    def decide(self, signals: Signals, state: State) -> Decision | None:
        with _marked():
            return self.inner.decide(signals, state)


def wrapped(placement: Placement, wrapper: Callable[[TokenReducer], TokenReducer]) -> Placement:
    """The placement with each of its reducers wrapped, once."""
    by_reducer = {id(reducer): wrapper(reducer) for _, reducer in placement.parts}
    return Placement(parts=[(where, by_reducer[id(reducer)]) for where, reducer in placement.parts])


@contextmanager
def _marked() -> Iterator[None]:
    Launches.part.append(DECIDING)
    try:
        with record_function(DECIDING):
            yield
    finally:
        Launches.part.pop()


class Launches(TorchDispatchMode):
    """Counts what would be launched on a GPU: every op that writes memory, those of marked decisions apart.

    An op may be several kernels there (a sort, a cumulative sum), so this is the least that it can be.
    """

    part: ClassVar[list[str]] = []  # of the pass that runs: marks are set where no mode is at hand

    def __init__(self) -> None:
        super().__init__()
        self.count: Counter[str] = Counter()
        self.ops: Counter[str] = Counter()  # of the decisions

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        name = func.overloadpacket.__name__
        if not func.is_view and name not in _LAUNCH_NOTHING:
            self.count["all"] += 1
            if self.part and _part([f"aten::{name}", *self.part]) == DECIDING:
                self.count[DECIDING] += 1
                self.ops[name] += 1
        return func(*args, **(kwargs or {}))


def profile_ops(run: Callable[[], Any], device: torch.device, *, passes: int = 3, top: int = 14) -> dict[str, Any]:
    """The ops that take longest: own time in the least disturbed of some passes, on the device for CUDA. Kernels count
    for the op that launched them.

    ``pass_ms`` is the quickest pass without the profiler, ``busy_ms`` the sum over all ops: on CUDA what lies between
    the two is the device waiting for its host. ``split`` divides ``busy_ms`` by ``PARTS``; ``launches`` are the kernels
    of a pass and of its decisions, as profiled on CUDA, as counted by ``Launches`` elsewhere.
    """
    cuda = device.type == "cuda"
    run()
    quickest = min(seconds(run, device) for _ in range(passes))
    activities = [ProfilerActivity.CPU, *([ProfilerActivity.CUDA] if cuda else [])]
    profiled = []
    for _ in range(passes):
        with profile(activities=activities) as recorded:
            seconds(run, device)
        profiled.append((_own_times(recorded, cuda=cuda), recorded))
    ops, recorded = min(profiled, key=lambda one: _total(one[0]))
    split, launches = _split(recorded, cuda=cuda)
    if not cuda:
        with Launches() as counted:
            run()
        launches = {"all": counted.count["all"], DECIDING: counted.count[DECIDING]}
    return {
        "pass_ms": 1e3 * quickest, "busy_ms": _total(ops), "split": split, "launches": launches, "ops": ops[:top],
    }  # fmt: skip


def _own_times(recorded: profile, *, cuda: bool) -> list[dict[str, Any]]:
    ops = []
    for event in recorded.key_averages():
        own = event.self_device_time_total if cuda else event.self_cpu_time_total
        if event.device_type.name == "CPU" and own > 0:  # the kernels of a device have lines of their own
            ops.append({"op": event.key, "ms": own / 1e3, "calls": event.count})
    return sorted(ops, key=lambda op: -op["ms"])


def _split(recorded: profile, *, cuda: bool) -> tuple[dict[str, float], dict[str, int]]:
    """Milliseconds by part, and kernels launched: in all, and by decisions."""
    split, launches = dict.fromkeys(PARTS, 0.0), {"all": 0, DECIDING: 0}
    for event in recorded.events():
        if event.device_type.name != "CPU":
            continue
        part = _part_of(event)
        split[part] += (event.self_device_time_total if cuda else event.self_cpu_time_total) / 1e3
        launches["all"] += len(event.kernels)
        if part == DECIDING:
            launches[DECIDING] += len(event.kernels)
    return split, launches


def _part_of(event: Any) -> str:
    """The part of an op by its own name and those of all that called it."""
    names = []
    while event is not None:
        names.append(event.name)
        event = event.cpu_parent
    return _part(names)


def _part(names: list[str]) -> str:
    if any(word in name for name in names for word in _ATTENTION):
        return "attention"
    if any(name in _LINEAR for name in names):
        return "linear"
    return DECIDING if DECIDING in names else "other"


def _total(ops: list[dict[str, Any]]) -> float:
    return sum(op["ms"] for op in ops)


def profile_table(profiles: dict[str, dict[str, Any]]) -> str:
    """The variants side by side: parts of a pass, kernels launched, and milliseconds and calls of each op."""
    names = list(profiles)
    ops: dict[str, float] = {}
    for known in profiles.values():
        for op in known["ops"]:
            ops[op["op"]] = max(ops.get(op["op"], 0.0), op["ms"])
    lines = [
        ["**one pass**", *(f"{profiles[name]['pass_ms']:.1f}" for name in names)],
        ["**all ops**", *(f"{profiles[name]['busy_ms']:.1f}" for name in names)],
        *([f"*{part}*", *(f"{profiles[name]['split'][part]:.2f}" for name in names)] for part in PARTS),
        ["*launches* (of decisions)", *(_launched(profiles[name]["launches"]) for name in names)],
    ]
    for op in sorted(ops, key=lambda op: -ops[op]):
        cells = []
        for name in names:
            own = [entry for entry in profiles[name]["ops"] if entry["op"] == op]
            cells.append(f"{own[0]['ms']:.2f} ({own[0]['calls']})" if own else "")
        lines.append([f"`{op}`", *cells])
    return table(["own ms a pass (calls)", *names], lines)


def _launched(launches: dict[str, int]) -> str:
    return f"{launches['all']} ({launches[DECIDING]})"
