"""Run two checkouts of this repository on one machine, and say which numbers a rewrite has changed.

    python tests/compare_checkouts.py OLD NEW [--only GROUP …] [--full] [--keep FOLDER]

OLD and NEW are folders that hold a checkout (a copy without git will do) or names of commits, which are checked out
beside and removed again. Each side runs in a process of this interpreter that finds `reducers` and `ablations` in its
own checkout, whatever is installed, and both run this one file, through public names: so nothing compared is written
down anywhere, and no float is committed. The exit status is 0 where everything agrees, 1 where a quantity differs or is
on one side alone, 2 where a side could not be run.

**What agreement proves.** On this machine, its CPU, in one thread, with the versions installed: the two checkouts
compute the same bits (shapes, types and NaNs too) for every quantity in the table. Those are, of small models at random
weights far from neutral (`KINDS`):

* `models` what timm itself computes: both sides were given the same models and images
* `contract` every case of the contract suite: logits, tokens, costs, owners, kept patches and class tokens of each
  block; float32 and float64, batches of 0, 1, 5 and 28 (more than 1024 rows, which takes another path)
* `budgets` other forms of budget, other blocks; `stacks` the placements of the suite of references;
  `pairs` two methods in one block and in two; `ragged` cases on what ATS, ToMe or A-ViT leave
* `grad`, `dropout`, `checkpoint` gradients of images and all parameters; stochastic depth and dropout with the state of
  the random numbers after; gradient checkpointing
* `training` the named losses, what is frozen, and all gradients in each phase of a training, under masks
* `random` draws, alone and in a batch; `half` bfloat16 and autocast; `shared` groups that share their first blocks
* `names` of `state_dict`, initial values of parameters, plain data and back
* `sizes` images of other sizes; `earlier` reducers written against an earlier version; `changed` a model changed after
  it was wrapped; `deit` twelve blocks of DeiT-Ti's shape
* `loading` short trainings; a `reducers.safetensors` and an unfinished checkpoint, both written by OLD, read by both
  sides, which evaluate the one and go on from the other

What cannot be computed is recorded as the type and the message of its exception, which must agree too; the table counts
those, so that a group that refuses everything is seen.

**What it does not prove.** Nothing about speed, memory, GPUs, compiled or exported graphs, several threads, other
versions of the libraries, models or settings that are not named here; nothing about results of the command line, whose
keys and files have tests of their own. A zero of another sign counts as equal and is only mentioned. A method that both
sides have but no contract suite names is not seen, nor a guard (a clamp, an epsilon) whose bound no quantity reaches.
Of a refusal in `changed` the type alone is compared: its message lists what is supported.

**Samples.** Without `--full`, a case runs on the model "class" and on the two next of `KINDS` that take it, beginning
at another place for each case, so that every model meets a part of all methods; `pairs` takes for each first method
two of the second; groups that name fewer models say so where they are defined. `--full` takes all.
The cases are those of both checkouts' contract suites; a suite that cannot be imported, as in the middle of a rewrite,
is passed over with a note.

`--keep FOLDER` leaves the quantities of both sides there (safetensors and JSON), to be looked into, and does not
compute those of OLD again while neither it nor the cases nor this file change: half the time after every step.
"""

from __future__ import annotations

import argparse
import contextlib
import copy
import functools
import hashlib
import importlib.util
import itertools
import json
import logging
import os
import shutil
import subprocess
import sys
import tempfile
import time
import zlib
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

HERE = Path(__file__).resolve()
SHOWN = 4  # differing quantities of a group that are told one by one


def say(text: str = "") -> None:
    sys.stdout.write(f"{text}\n")
    sys.stdout.flush()


# --- the parent ------------------------------------------------------------------------------------------------------


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("old", metavar="OLD", help="folder of a checkout, or a commit of this repository")
    parser.add_argument("new", metavar="NEW", help="likewise")
    parser.add_argument("--only", metavar="GROUP", nargs="+", choices=list(GROUPS), help=", ".join(GROUPS))
    parser.add_argument("--full", action="store_true", help="every case on every model, every pair")
    parser.add_argument("--keep", metavar="FOLDER", type=Path,
                        help="leave all quantities there; those of the same OLD are not computed again")  # fmt: skip
    asked = parser.parse_args(arguments)
    begun = time.monotonic()
    with contextlib.ExitStack() as stack:
        out = asked.keep or Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="compare-checkouts-")))
        out.mkdir(parents=True, exist_ok=True)
        try:
            old, new = (stack.enter_context(checkout(given)) for given in (asked.old, asked.new))
            asks_suites = not set(asked.only or GROUPS) <= WITHOUT_SUITES
            cases = gathered({"old": old, "new": new}, out) if asks_suites else dict.fromkeys(("contract", "stacks"))
            (out / "cases.json").write_text(json.dumps(cases), encoding="utf-8")
            about = json.dumps([asked.full, source_digest(old), cases, HERE.read_text(encoding="utf-8")])
            known = kept_groups(out / "old", hashlib.sha256(about.encode()).hexdigest())
            shutil.rmtree(out / "new", ignore_errors=True)
            for side, root in (("old", old), ("new", new)):
                groups = [name for name in asked.only or GROUPS if side == "new" or name not in known]
                options = [str(out), *(["--full"] if asked.full else []), "--only", *groups]
                if groups:
                    run_child(side, root, options, begun)
        except (RuntimeError, OSError) as error:
            say(f"could not compare: {error}")
            return 2
        say()
        return report([compared(name, out) for name in asked.only or GROUPS], time.monotonic() - begun)


def source_digest(root: Path) -> str:
    """Of all Python below the packages that are run."""
    found = sorted(path for package in ("reducers", "ablations") for path in (root / package).rglob("*.py"))
    text = [f"{path.relative_to(root)} {hashlib.sha256(path.read_bytes()).hexdigest()}" for path in found]
    return hashlib.sha256("\n".join(text).encode()).hexdigest()


def kept_groups(folder: Path, digest: str) -> set[str]:
    """The groups that the folder holds of the same OLD, under the same questions; it is emptied of any other's."""
    mark = folder / "digest"
    if not mark.is_file() or mark.read_text(encoding="utf-8") != digest:
        shutil.rmtree(folder, ignore_errors=True)
        folder.mkdir(parents=True)
        mark.write_text(digest, encoding="utf-8")
    return {path.stem for path in folder.glob("*.json")}


@contextlib.contextmanager
def checkout(given: str) -> Iterator[Path]:
    """The folder that was given, or one into which the commit is checked out for the time being."""
    folder = Path(given).expanduser()
    if folder.is_dir():
        if not (folder / "reducers" / "__init__.py").is_file():
            raise RuntimeError(f"{given} is a folder without reducers/__init__.py")
        yield folder.resolve()
        return
    git = ["git", "-C", str(HERE.parent)]
    found = subprocess.run([*git, "rev-parse", "--verify", "--quiet", f"{given}^{{commit}}"],
                           capture_output=True, text=True, check=False)  # fmt: skip
    if found.returncode:
        raise RuntimeError(f"{given} is neither a folder nor a commit of this repository")
    with tempfile.TemporaryDirectory(prefix="checkout-") as parent:
        place = Path(parent) / "tree"
        subprocess.run([*git, "worktree", "add", "--quiet", "--detach", str(place), found.stdout.strip()], check=True)
        try:
            yield place
        finally:
            subprocess.run([*git, "worktree", "remove", "--force", str(place)], check=True)


def environment(root: Path) -> dict[str, str]:
    """One thread, no network, the checkout before everything that is installed, and nothing written into it."""
    threads = dict.fromkeys(("OMP_NUM_THREADS", "MKL_NUM_THREADS", "OPENBLAS_NUM_THREADS"), "1")
    return {
        **os.environ, **threads, "PYTHONPATH": str(root), "PYTHONHASHSEED": "0", "PYTHONDONTWRITEBYTECODE": "1",
        "HF_HUB_OFFLINE": "1", "MPLBACKEND": "Agg",
    }  # fmt: skip


def python(root: Path, *words: str) -> list[str]:
    """This file in the checkout; -P keeps its own folder, which has a `reducers` too, off the path."""
    return [sys.executable, "-P", "-W", "ignore", str(HERE), "--child", str(root), *words]


def gathered(sides: Mapping[str, Path], out: Path) -> dict[str, Any]:
    """What the contract suites of both sides try, as plain data; OLD's first, NEW's where it has more."""
    together: dict[str, Any] = {}
    for side, root in sides.items():
        path = out / f"cases-{side}.json"
        run = subprocess.run(python(root, "--cases", str(path)), cwd=root, env=environment(root),
                             capture_output=True, text=True, check=False)  # fmt: skip
        if run.returncode:
            last = (run.stderr.strip().splitlines() or ["no message"])[-1]
            say(f"note: the contract suite of {side.upper()} is passed over, it cannot be imported ({last})")
            continue
        found = json.loads(path.read_text(encoding="utf-8"))
        for kind, cases in found.items():
            known = together.setdefault(kind, {})
            for name, data in cases.items():
                if known.setdefault(name, data) != data:
                    known[f"{name} ({side})"] = data
    if not together:
        raise RuntimeError("neither checkout has a contract suite that can be imported")
    return together


def run_child(side: str, root: Path, words: list[str], begun: float) -> None:
    """Run one side and pass on what it says, with the time."""
    command = python(root, "--side", side, *words)
    with subprocess.Popen(command, cwd=root, env=environment(root), stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout is not None
        for line in process.stdout:
            say(f"{time.monotonic() - begun:6.1f} s  {side}  {line.rstrip()}")
    if process.returncode:
        raise RuntimeError(f"{side.upper()} ({root}) ended with status {process.returncode}; see above")


@dataclass
class Compared:
    """How the quantities of one group stand."""

    group: str
    quantities: int = 0
    raised: int = 0  # of them exceptions, in OLD
    seconds: tuple[float, float] = (0.0, 0.0)  # of CPU time
    zeros: list[str] = field(default_factory=list)  # other signs of zero and nothing else
    differing: dict[str, str] = field(default_factory=dict)  # name: how


def compared(group: str, out: Path) -> Compared:
    from safetensors.torch import load_file

    plain, tensors = [], []
    for side in ("old", "new"):
        plain.append(json.loads((out / side / f"{group}.json").read_text(encoding="utf-8")))
        tensors.append(load_file(out / side / f"{group}.safetensors"))
    old, new = ({**side["plain"], **found} for side, found in zip(plain, tensors, strict=True))
    result = Compared(group, len(old.keys() | new.keys()), seconds=(plain[0]["seconds"], plain[1]["seconds"]))
    result.raised = sum(name.endswith(RAISED) for name in old)
    for name in dict.fromkeys([*plain[0]["order"], *plain[1]["order"]]):  # as computed: a cause is near the first
        if name not in old or name not in new:
            found = old.get(name, new.get(name))
            result.differing[name] = f"in {'OLD' if name in old else 'NEW'} alone{_told(found)}"
            continue
        how = difference(old[name], new[name])
        if how == ZEROS:
            result.zeros.append(name)
        elif how:
            result.differing[name] = how
    return result


ZEROS = "zeros of another sign"
RAISED = " / raised"


def _told(found: Any) -> str:
    return f": {found}" if isinstance(found, str) else ""


def difference(old: Any, new: Any) -> str:
    """How two quantities differ; empty where they are the same."""
    import torch

    if not (isinstance(old, torch.Tensor) and isinstance(new, torch.Tensor)):
        return "" if type(old) is type(new) and old == new else f"{_short(old)} became {_short(new)}"
    if old.dtype != new.dtype or old.shape != new.shape:
        return f"{_form(old)} became {_form(new)}"
    if not old.is_floating_point():
        changed = old != new
        return f"{int(changed.sum())} of {old.numel()} entries" if changed.any() else ""
    both = old.isnan() & new.isnan()
    changed = (old != new) & ~both
    if not changed.any():
        return ZEROS if bool((old.signbit() != new.signbit())[~both].any()) else ""
    gap = (old.double() - new.double()).abs()[changed]
    largest = "a number became NaN or infinite" if gap.isnan().any() else f"by up to {float(gap.max()):.3g}"
    scale = old.double().abs().nan_to_num(0, 0, 0).max()
    return f"{int(changed.sum())} of {old.numel()} entries, {largest} (largest value {float(scale):.3g})"


def _form(tensor: Any) -> str:
    return f"{str(tensor.dtype).removeprefix('torch.')} {list(tensor.shape)}"


def _short(value: Any) -> str:
    import torch

    if isinstance(value, torch.Tensor):
        return _form(value)
    text = value if isinstance(value, str) else json.dumps(value)
    return repr(text if len(text) <= 160 else f"{text[:157]}…")


def report(groups: list[Compared], seconds: float) -> int:
    """The table, then what differs; the exit status."""
    say(f"{'group':<12}{'quantities':>11}{'raised':>8}{'differ':>8}{'old CPU s':>11}{'new CPU s':>11}")
    for group in groups:
        old, new = group.seconds
        counts = f"{group.quantities:>11}{group.raised:>8}{len(group.differing):>8}"
        say(f"{group.group:<12}{counts}{old:>11.1f}{new:>11.1f}")
    for group in groups:
        first = sorted(group.differing.items(), key=lambda item: not item[0].endswith(RAISED))  # why others are lacking
        for name, how in first[:SHOWN]:
            say(f"  {group.group}: {name}: {how}")
        if len(group.differing) > SHOWN:
            say(f"  {group.group}: … and {len(group.differing) - SHOWN} more")
        if group.zeros:
            say(f"  {group.group}: {len(group.zeros)} differ in the sign of zeros alone, as {group.zeros[0]}")
    differing = sum(len(group.differing) for group in groups)
    total = sum(group.quantities for group in groups)
    verdict = f"{differing} of {total} quantities differ" if differing else f"all {total} quantities are the same"
    say(f"{verdict} ({seconds:.0f} s)")
    return 1 if differing else 0


# --- the child: what follows runs in a checkout, and imports torch and the packages late ------------------------------


def child(arguments: list[str]) -> int:
    parser = argparse.ArgumentParser()
    parser.add_argument("root", type=Path)
    parser.add_argument("out", type=Path)
    parser.add_argument("--cases", action="store_true")
    parser.add_argument("--side")
    parser.add_argument("--full", action="store_true")
    parser.add_argument("--only", nargs="+", default=[])
    asked = parser.parse_args(arguments)
    import torch

    torch.set_num_threads(1)
    logging.getLogger().addHandler(logging.NullHandler())  # a method that is asked for too much says so each time
    for package in ("reducers", "ablations"):
        own(package, asked.root)
    if asked.cases:
        asked.out.write_text(json.dumps(cases_of_the_suites(asked.root)), encoding="utf-8")
        return 0
    cases = json.loads((asked.out / "cases.json").read_text(encoding="utf-8"))
    folder = asked.out / asked.side
    folder.mkdir(exist_ok=True)
    for group in asked.only:
        book = Book(asked.root, group)
        GROUPS[group](World(book, cases["contract"], cases["stacks"], asked.full, folder, asked.out / "old"))
        book.write(folder)
    return 0


def own(module: str, root: Path) -> Any:
    """A module of the checkout, and not of the one that is installed."""
    imported = importlib.import_module(module)
    if not Path(str(imported.__file__)).resolve().is_relative_to(root):
        raise ImportError(f"{module} came from {imported.__file__}, not from {root}")
    return imported


def cases_of_the_suites(root: Path) -> dict[str, dict[str, Any]]:
    """What the contract suite of this checkout places, and the stacks that have a slow reference."""
    contract = own("tests.reducers.test_contract", root).CASES
    stacks = own("tests.reducers.test_stack_references", root).CASES
    return {
        "contract": {name: reducer.spec() for name, reducer in contract.items()},
        "stacks": {name: placement.spec() for name, (placement, _) in stacks.items()},
    }


def public(name: str, *modules: str) -> Any:
    """A public name from the first of the modules that has it: it may have moved between the checkouts."""
    for module in modules:
        with contextlib.suppress(ImportError, AttributeError):
            return getattr(importlib.import_module(module), name)
    raise ImportError(f"{name} is in none of {', '.join(modules)}")


class Book:
    """The quantities of one group, by name."""

    def __init__(self, root: Path, group: str) -> None:
        self.root, self.group = str(root), group
        self.tensors: dict[str, Any] = {}
        self.plain: dict[str, Any] = {}
        self.order: list[str] = []
        self.begun, self.told = time.process_time(), time.monotonic()

    def put(self, name: str, value: Any) -> None:
        import torch

        assert name not in self.tensors and name not in self.plain, f"{name} is written twice"
        self.order.append(name)
        if isinstance(value, torch.Tensor):
            self.tensors[name] = value.detach().contiguous().clone()
        else:
            self.plain[name] = json.loads(json.dumps(value))

    def attempt(self, name: str, compute: Callable[[], Mapping[str, Any]]) -> bool:
        """Whether it could be computed; with random numbers of its own, whatever ran before."""
        import numpy as np
        import torch

        torch.manual_seed(zlib.crc32(name.encode()))
        np.random.seed(zlib.crc32(name.encode()))
        try:
            found = compute()
        except Exception as error:  # noqa: BLE001  # whatever it is, the other checkout must raise it too
            message = f"{type(error).__name__}: {error}".replace(self.root, "CHECKOUT")
            self.put(f"{name}{RAISED}", message)
            return False
        for key, value in found.items():
            self.put(f"{name} / {key}", value)
        return True

    def progress(self, done: int, total: int) -> None:
        if time.monotonic() - self.told > 5:
            self.told = time.monotonic()
            say(f"{self.group:<12}{done} of {total}")

    def write(self, folder: Path) -> None:
        from safetensors.torch import save_file

        seconds = time.process_time() - self.begun
        save_file(self.tensors, folder / f"{self.group}.safetensors")
        content = {"plain": self.plain, "order": self.order, "seconds": seconds}
        (folder / f"{self.group}.json").write_text(json.dumps(content), encoding="utf-8")
        say(f"{self.group:<12}{len(self.tensors) + len(self.plain)} quantities in {seconds:.1f} s of CPU time")


@dataclass(frozen=True)
class World:
    """What a group works with."""

    book: Book
    contract: Mapping[str, dict[str, Any]]  # reducers as plain data
    stacks: Mapping[str, list[dict[str, Any]]]  # placements as plain data
    full: bool
    folder: Path  # of this side
    old: Path  # of OLD, which runs first

    def each(self) -> Iterator[tuple[int, str, dict[str, Any]]]:
        """The cases of the contract suite, telling how far it is."""
        for index, (name, data) in enumerate(self.contract.items()):
            yield index, name, data
            self.book.progress(index + 1, len(self.contract))


Group = Callable[[World], None]
GROUPS: dict[str, Group] = {}


WITHOUT_SUITES = {"models", "random", "earlier", "loading"}  # groups that ask no contract suite for its cases


def group(function: Group) -> Group:
    GROUPS[function.__name__] = function
    return function


# --- models, images, reducers ----------------------------------------------------------------------------------------

DEPTH = 4
SIZES = {"img_size": 48, "patch_size": 8, "embed_dim": 32, "depth": DEPTH, "num_heads": 2, "num_classes": 7}
PLACES = [1, 3]
KINDS: dict[str, dict[str, Any]] = {
    "class": {},
    "map": {"class_token": False, "global_pool": "map"},
    "registers": {"reg_tokens": 4, "init_values": 0.5},
    "swiglu": {"mlp_layer": "SwiGLU", "init_values": 0.4, "no_embed_class": True},
    "average": {"class_token": False, "global_pool": "avg"},
    "distilled": {},
    "qk_norm": {"qk_norm": True, "init_values": 0.3, "scale_attn_norm": True},
    "avgmax": {"class_token": False, "global_pool": "avgmax"},
    "gated": {"gated": True, "reg_tokens": 1, "global_pool": "avg", "fc_norm": False},
    "no_qkv_bias": {"qkv_bias": False, "pre_norm": True},
    "average_with_class": {"global_pool": "avg"},
    "glu": {"mlp_layer": "GluMlp", "scale_mlp_norm": True, "proj_bias": False},
    "max": {"class_token": False, "global_pool": "max", "reg_tokens": 2},
    "dynamic": {"dynamic_img_size": True},
}


def noise(name: str, shape: Any, dtype: Any = None) -> Any:
    """Normal numbers that follow from the name alone."""
    import torch

    generator = torch.Generator().manual_seed(zlib.crc32(name.encode()))
    return torch.randn(shape, generator=generator).to(dtype or torch.float32)


def shake(module: Any, amount: float) -> None:
    """Every parameter away from neutral, each by numbers of its own name."""
    import torch

    with torch.no_grad():
        for name, parameter in module.named_parameters():
            parameter.add_(amount * noise(name, parameter.shape, parameter.dtype))


def vit(kind: str = "class", *, dtype: Any = None, **changes: Any) -> Any:
    """A small model of a kind, by timm."""
    import timm.layers
    import torch
    from timm.layers.attention import Attention
    from timm.models.deit import VisionTransformerDistilled
    from timm.models.vision_transformer import VisionTransformer

    options = {**SIZES, **KINDS[kind], **changes}
    if "mlp_layer" in options:
        options["mlp_layer"] = getattr(timm.layers, options["mlp_layer"])
    gated = options.pop("gated", False)
    torch.manual_seed(0)
    model = (VisionTransformerDistilled if kind == "distilled" else VisionTransformer)(**options)
    if gated:
        for block in model.blocks:
            block.attn = Attention(model.embed_dim, model.blocks[0].attn.num_heads, qkv_bias=True, gated=True)
    shake(model, 0.2)
    return model.to(dtype or torch.float32).eval()


@functools.cache
def still(kind: str = "class", dtype: Any = None) -> Any:
    """The same, made once: for passes without gradients, which leave a model as it is."""
    return vit(kind, dtype=dtype)


def pictures(count: int = 5, *size: int, dtype: Any = None, channels: int = 3) -> Any:
    """Random images, of five the last one constant."""
    height, width = size or (48, 48)
    images = noise(f"images {height} {width}", (max(count, 5), channels, height, width), dtype)
    images[4] = 0.25
    return images[:count]


def reducer_of(data: dict[str, Any]) -> Any:
    from reducers import build

    return build(data)


def reduced(model: Any, *stages: tuple[Any, dict[str, Any]], as_made: bool = False) -> Any:
    """The model with reducers from plain data; parameters of theirs are moved, so that none is neutral."""
    from reducers import Placement, at, reduce_tokens

    placement = Placement()
    for blocks, data in stages:
        placement = placement | at(blocks, reducer_of(data))
    found = reduce_tokens(model, placement)
    if not as_made:
        shake(found.reducers, 0.1)
    return found


def told(model: Any, images: Any, **options: Any) -> dict[str, Any]:
    """Everything that a traced pass tells."""
    import torch

    logits, trace = model.trace(images, **options)
    blocks = range(len(model.base.blocks))
    return {
        "logits": logits, "tokens": trace.tokens, "macs": trace.macs, "reducer_macs": trace.reducer_macs,
        "reference_macs": trace.reference_macs,
        **{name: torch.stack([getattr(trace, name)(block) for block in blocks])
           for name in ("owner", "kept", "class_kept")},
    }  # fmt: skip


def whole(model: Any, images: Any) -> dict[str, Any]:
    """A traced pass, a plain one, and the cost alone."""
    return {**told(model, images), "plain logits": model(images), "cost()": model.cost(images)}


def gradients(module: Any, loss: Any, **more: Any) -> dict[str, Any]:
    """Of all parameters by name, and of what else is named."""
    module.zero_grad(set_to_none=True)
    loss.backward()
    named = {**{f"gradient of {name}": p for name, p in module.named_parameters()}, **more}
    return {name: "none" if p.grad is None else p.grad for name, p in named.items()}


def kinds_for(world: World, index: int) -> list[str]:
    """All kinds of models, beginning at another place for each case, but "class" first."""
    others = list(KINDS)[1:]
    start = 2 * index % len(others)
    return ["class", *others[start:], *others[:start]]


# --- groups ----------------------------------------------------------------------------------------------------------


@group
def models(world: World) -> None:
    import torch

    for kind in KINDS:
        for dtype in (torch.float32, torch.float64):
            model = vit(kind, dtype=dtype)
            for name, value in model.state_dict().items():
                world.book.put(f"{kind} {dtype} / {name}", value)
            with torch.no_grad():
                world.book.put(f"{kind} {dtype} / logits", model(pictures(dtype=dtype)))


@group
def contract(world: World) -> None:
    import torch

    for index, name, data in world.each():
        ran = 0
        for kind in kinds_for(world, index):
            model = _on_kind(world, name, data, kind, torch.float64, 5)
            if model is None:
                continue
            _on_kind(world, name, data, kind, torch.float32, 1)
            if ran == 0 or world.full:
                for count in (0, 5, 28):
                    _on_kind(world, name, data, kind, torch.float32, count)
            ran += 1
            if ran == 3 and not world.full:
                break


def _on_kind(world: World, name: str, data: dict[str, Any], kind: str, dtype: Any, count: int) -> Any:
    import torch

    made: list[Any] = []

    def run() -> dict[str, Any]:
        made.append(reduced(still(kind, dtype), (PLACES, data)))
        tells = whole if kind == "class" else told
        with torch.no_grad():
            return tells(made[0], pictures(count, dtype=dtype))

    label = f"{name} | {kind} | {str(dtype).removeprefix('torch.')}, batch {count}"
    return made[0] if world.book.attempt(label, run) else None


@group
def stacks(world: World) -> None:
    import torch

    from reducers import placement_from, reduce_tokens

    for name, stages in world.stacks.items():
        for kind, (dtype, count) in itertools.product(
            KINDS if world.full else ("class", "registers", "qk_norm"),
            ((torch.float64, 3), (torch.float32, 1), (torch.float32, 48)),
        ):

            def run(kind=kind, dtype=dtype, count=count, stages=stages) -> dict[str, Any]:
                model = reduce_tokens(vit(kind, dtype=dtype, img_size=(32, 40)), placement_from(stages))
                with torch.no_grad():
                    return whole(model, pictures(count, 32, 40, dtype=dtype))

            world.book.attempt(f"{name} | {kind} | {dtype}, batch {count}", run)


@group
def names(world: World) -> None:
    """On two models: names, shapes and order of a state, initial parameters, plain data."""
    for _, name, data in world.each():
        for kind in ("class", "average"):

            def run(kind=kind, data=data) -> dict[str, Any]:
                model = reduced(vit(kind), (PLACES, data), as_made=True)
                state = model.reducers.state_dict()
                return {
                    "state_dict": [[key, list(value.shape), str(value.dtype)] for key, value in state.items()],
                    "whole state_dict": list(model.state_dict()),
                    "parameters": [[key, p.requires_grad] for key, p in model.named_parameters()],
                    "buffers": [key for key, _ in model.named_buffers()],
                    "placement": model.placement.spec(),
                    "first block": model.first_block,
                    "members": [member.name for member in model.members()],
                    "print": str(reducer_of(data)),
                    **{f"initial {key}": value for key, value in state.items()},
                }

            world.book.attempt(f"{name} | {kind}", run)


def methods(world: World) -> dict[str, dict[str, Any]]:
    """Of the cases those named as a method: one each."""
    return {name: data for name, data in world.contract.items() if data["name"] == name}


@group
def budgets(world: World) -> None:
    """Float32, on "class": in every block, in every one but the first, and in one."""
    forms = ({"count": 9}, {"drop": 3}, {"ratio": 0.35, "of": "initial", "rounding": "ceil"}, {"ratio": 1.0})
    for name, data in methods(world).items():
        for index, blocks in enumerate(([0, 1, 2, 3], [1, 2, 3], [2])):
            budget = {"budget": forms[index]} if "budget" in data else {}
            tell(world, f"{name} | {blocks} {budget}", lambda: still(), (blocks, {**data, **budget}))
        if "budget" in data:
            tell(world, f"{name} | {forms[3]}", lambda: still(), (PLACES, {**data, "budget": forms[3]}))


@group
def pairs(world: World) -> None:
    """On "registers": for each method two others, each method alike."""
    every = list(methods(world).items())
    for index, (first, one) in enumerate(every):
        others = every if world.full else [every[(index + step) % len(every)] for step in (1, 11)]
        for second, other in others:
            together = {"name": "stack", "stack": [one, other]}
            tell(world, f"{first} and {second}", lambda: still("registers"), (PLACES, together))
            tell(world, f"{first}, then {second}", lambda: still("registers"), (1, one), ([2, 3], other))
        world.book.progress(index + 1, len(every))


@group
def ragged(world: World) -> None:
    """Float64: "registers" after ATS, "class" after ToMe and A-ViT, where some images are finished."""
    import torch

    before = {
        "ats": ("registers", {"name": "ats", "budget": {"ratio": 0.8}}),
        "tome": ("class", {"name": "tome", "budget": {"drop": 5}}),
        "avit": ("class", {"name": "avit", "gamma": 2.0, "beta": -1.0}),
    }
    for _, name, data in world.each():
        for first, (kind, settings) in before.items():
            model = functools.partial(still, kind, torch.float64)
            tell(world, f"{name} after {first}", model, (0, settings), (PLACES, data))


def tell(world: World, label: str, model: Callable[[], Any], *stages: tuple[Any, Any], images: Any = None) -> None:
    """A traced pass without gradients, in the model's own precision."""
    import torch

    def run() -> dict[str, Any]:
        found = reduced(model(), *stages)
        given = pictures(dtype=found.base.pos_embed.dtype) if images is None else images
        with torch.no_grad():
            return told(found, given)

    world.book.attempt(label, run)


def learned(model: Any, images: Any) -> dict[str, Any]:
    """A traced pass with gradients, and the state of the random numbers after it."""
    import torch

    images = images.requires_grad_()
    found = told(model, images)
    found.update(gradients(model, found["logits"].square().sum(), **{"gradient of images": images}))
    return {**found, "random numbers after": torch.rand(2)}


@group
def grad(world: World) -> None:
    """In eval mode: float32 on "class", float64 on another."""
    import torch

    for index, name, data in world.each():
        for kind, dtype in (("class", torch.float32), (kinds_for(world, index)[1], torch.float64)):

            def run(kind=kind, dtype=dtype, data=data) -> dict[str, Any]:
                return learned(reduced(vit(kind, dtype=dtype), (PLACES, data)), pictures(3, dtype=dtype))

            world.book.attempt(f"{name} | {kind}", run)


def _dropping(world: World, *, checkpointing: bool) -> None:
    rates = {"drop_path_rate": 0.3, "proj_drop_rate": 0.2, "attn_drop_rate": 0.1, "pos_drop_rate": 0.1}
    for _, name, data in world.each():

        def run(data=data) -> dict[str, Any]:
            model = reduced(vit(**rates), (PLACES, data)).train()
            model.base.set_grad_checkpointing(checkpointing)
            return learned(model, pictures(2))

        world.book.attempt(name, run)


@group
def dropout(world: World) -> None:
    """In training mode, on "class"."""
    _dropping(world, checkpointing=False)


@group
def checkpoint(world: World) -> None:
    """As `dropout`."""
    _dropping(world, checkpointing=True)


_OBJECTIVE = ("ablations.measure.finetune.objective",)
_RECIPE = ("ablations.trial.recipe",)
SHARES = (0.0, 0.3, 0.6, 0.95)  # of a training: curricula train one part after the other


class Lesson:
    """A reduced model in training, and what its training minimises."""

    def __init__(self, data: dict[str, Any], kind: str, amount: float) -> None:
        from reducers import at

        recipe = _recipe({"epochs": 1, "images": 16, "batch": 8, "smoothing": 0.0})
        depth = DEPTH + 1  # so that another block reads what the last reducer leaves
        self.model = public("TrainingViT", *_OBJECTIVE)(vit(kind, depth=depth), at(PLACES, reducer_of(data))).train()
        shake(self.model.reducers, amount)
        asked = public("needs_teacher", *_OBJECTIVE)(self.model, recipe)
        teacher = vit(kind, depth=depth, mlp_ratio=2) if asked else None
        self.objective = public("Objective", *_OBJECTIVE)(recipe, teacher, classes=7)

    @property
    def is_taught(self) -> bool:
        return next(self.model.reducers.parameters(), None) is not None or bool(self.model.losing())

    def at_share(self, share: float) -> dict[str, Any]:
        import torch

        for member in self.model.reducing():
            step = getattr(member, "train_phase", None)
            if step is not None:
                step(share, self.model.base)
        frozen = [name for name, parameter in self.model.named_parameters() if not parameter.requires_grad]
        parts = self.objective.parts(self.model, pictures(6), torch.arange(6) % 7)
        found = {"frozen": frozen, "parts": list(parts), **{f"loss {name}": part for name, part in parts.items()}}
        return {**found, **gradients(self.model, torch.stack(list(parts.values())).sum())}


@group
def training(world: World) -> None:
    """On "class", on "registers" in the first phase, and with weights so large that probabilities reach their bounds;
    what teaches nothing of its own in the first phase alone.
    """
    taught = [
        ("registers", 0.0, 0.1),
        *(("class", share, 0.1) for share in SHARES),
        ("class", 0.0, 10.0),
        ("class", 0.6, 10.0),
    ]
    for _, name, data in world.each():
        lessons: list[Lesson] = []
        for kind, share, amount in taught:

            def run(kind=kind, share=share, amount=amount, data=data, lessons=lessons) -> dict[str, Any]:
                lessons[:] = [Lesson(data, kind, amount)]
                return lessons[0].at_share(share)

            if not world.book.attempt(f"{name} | {kind} | {share}, weights {amount}", run) or not lessons[0].is_taught:
                break


@group
def random(world: World) -> None:
    """Each image alone, and all five; two that draw in one block draw other numbers."""
    drop, ats = {"name": "random", "budget": {"ratio": 0.6}}, {"name": "ats", "budget": {"ratio": 0.7}}
    drawing = {
        "random": drop,
        "random, seed 3": {**drop, "seed": 3},
        "ats random": {**ats, "score": "random"},
        "ats random, seed 3": {**ats, "score": "random", "seed": 3},
        "ats gumbel": {**ats, "variant": "gumbel"},
        "topk random": {"name": "topk", "budget": {"ratio": 0.6}, "score": "random"},
        "evit random": {"name": "evit", "budget": {"ratio": 0.6}, "score": "random"},
        "two": {"name": "stack", "stack": [drop, drop]},
        "three": {"name": "stack", "stack": [drop, {**ats, "variant": "gumbel"}, drop]},
    }
    images = pictures()
    for name, data in drawing.items():
        for kind in ("class", "registers", "qk_norm"):
            model = functools.partial(still, kind)
            tell(world, f"{name} | {kind}", model, (PLACES, data))
            for index in range(5 if kind == "class" else 0):
                tell(world, f"{name} | image {index}", model, (PLACES, data), images=images[index : index + 1])


@group
def half(world: World) -> None:
    """On "class" and, under autocast, on "registers" too."""
    import torch

    for _, name, data in world.each():
        tell(world, f"{name} | bfloat16", lambda: still("class", torch.bfloat16), (PLACES, data))
        for kind in ("class", "registers"):
            with torch.autocast("cpu", torch.bfloat16):
                tell(world, f"{name} | autocast | {kind}", functools.partial(still, kind), (PLACES, data))


@group
def shared(world: World) -> None:
    """On "class" and "map", all cases one after another on the same `Shared`."""
    import torch

    from reducers import Placement, Shared, reduce_tokens

    for kind in ("class", "map"):
        images, common = pictures(4), Shared()
        found = {"nothing": reduce_tokens(still(kind), Placement())}
        for name, data in world.contract.items():
            with contextlib.suppress(Exception):  # those refused are told by `contract`
                for blocks in (PLACES, 2) if kind == "class" else (PLACES,):
                    found[f"{name} at {blocks}"] = reduced(still(kind), (blocks, data))
        for name, model in sorted(found.items(), key=lambda item: (item[1].first_block, item[0])):

            def run(model=model, images=images, common=common) -> dict[str, Any]:
                with torch.no_grad():
                    return {**told(model, images, shared=common), "cost()": model.cost(images, shared=common)}

            world.book.attempt(f"{name} | {kind}", run)


@group
def sizes(world: World) -> None:
    """Float32: models of any size at one of three, at one that is padded, and behind a smaller input."""
    for index, name, data in world.each():
        size = ((96, 96), (48, 72), (56, 56))[index % 3]
        tell(world, f"{name} | {size}", lambda: still("dynamic"), (PLACES, data), images=pictures(2, *size))
        smaller = {"name": "small_input", "budget": {"count": 20}}
        tell(world, f"{name} | behind small_input", lambda: still("registers"), (0, smaller), (PLACES, data))
        if data["name"] == name:
            padding = functools.partial(vit, "dynamic", dynamic_img_pad=True)
            tell(world, f"{name} | padded", padding, (PLACES, data), images=pictures(2, 41, 60))
    for budget in ({"count": 16}, {"ratio": 0.5}, {"ratio": 0.3, "of": "initial"}, {"count": 36}):
        for kind in KINDS:
            for size in ((48, 48), (64, 80)):
                stage = (0, {"name": "small_input", "budget": budget})
                model = functools.partial(still, kind)
                tell(world, f"small_input {budget} | {kind} | {size}", model, stage, images=pictures(2, *size))


@group
def earlier(world: World) -> None:
    """The reducers of tests/data, beside this file: on "class" and "registers", and after ATS."""
    path = HERE.parent / "data" / "reducer_3d191f9.py"

    def imported() -> dict[str, Any]:
        spec = importlib.util.spec_from_file_location("reducer_3d191f9", path)
        assert spec is not None and spec.loader is not None
        spec.loader.exec_module(importlib.util.module_from_spec(spec))
        return {"imported": True}

    if not world.book.attempt("import", imported):
        return
    written: dict[str, dict[str, Any]] = json.loads(path.with_suffix(".json").read_text(encoding="utf-8"))
    ats = {"name": "ats", "budget": {"ratio": 0.8}}
    for name, settings in written.items():
        data = {"name": name, **settings}
        for kind in ("class", "registers"):
            model = functools.partial(still, kind)
            tell(world, f"{name} | {kind}", model, (PLACES, data))
            tell(world, f"{name} after ats | {kind}", model, (0, ats), (PLACES, data))


@group
def changed(world: World) -> None:
    """What is done to a model after it was wrapped: taken up, or refused by the same type of exception."""
    import torch
    from timm.layers import GluMlp
    from torch import nn

    changes: dict[str, Callable[[Any], Any]] = {
        "weights": lambda base: shake(base, 0.1),
        "pool": lambda base: setattr(base, "global_pool", "avg"),
        "head": lambda base: base.reset_classifier(3),
        "float64": lambda base: base.double(),
        "an MLP": lambda base: setattr(base.blocks[2], "mlp", GluMlp(32, 64)),
        "LayerScale": lambda base: setattr(base.blocks[2], "ls1", nn.Linear(32, 32)),
        "a block": lambda base: base.blocks.__setitem__(1, nn.Identity()),
        "a deeper model": lambda base: base.blocks.append(copy.deepcopy(base.blocks[0])),
        "qkv": lambda base: setattr(base.blocks[0].attn, "qkv", nn.Identity()),
        "forward of a block": lambda base: setattr(base.blocks[0], "forward", base.blocks[1].forward),
        "a hook that is run": lambda base: base.blocks[0].norm1.register_forward_hook(lambda *all_: 2 * all_[2]),
        "a hook that is refused": lambda base: base.blocks[0].register_forward_hook(lambda *all_: 2 * all_[2]),
        "a pool that is refused": lambda base: setattr(base, "global_pool", "prr"),
        "patch dropout": lambda base: setattr(base, "patch_drop", nn.Dropout()),
        "unfused attention": lambda base: setattr(base.blocks[1].attn, "fused_attn", False),
        "no class token": lambda base: setattr(base, "has_class_token", False),
    }
    for name, data in methods(world).items():
        if name not in ("evit", "ats", "tome", "dynamicvit", "fixed_pattern"):
            continue
        for what, change in changes.items():

            def run(data=data, change=change, what=what) -> dict[str, Any]:
                model = reduced(vit(), (PLACES, data))
                torch.manual_seed(0)
                change(model.base)
                try:
                    with torch.no_grad():
                        return told(model, pictures(dtype=torch.float64 if what == "float64" else None))
                except Exception as error:  # noqa: BLE001  # the message lists what is supported, which may grow
                    return {"refused": type(error).__name__}

            world.book.attempt(f"{name} | {what}", run)


@group
def deit(world: World) -> None:
    """Every method in blocks 3, 6 and 9 of twelve, on six images of 224 px (more than 1024 rows), float32."""
    import timm
    import torch

    torch.manual_seed(0)
    model = timm.create_model("deit_tiny_patch16_224").eval()
    shake(model, 0.02)
    every = methods(world)
    for index, (name, data) in enumerate(every.items()):
        tell(world, name, lambda: model, ([3, 6, 9], data), images=pictures(6, 224, 224))
        world.book.progress(index + 1, len(every))


_LOOP, _CACHE = ("ablations.measure.finetune.loop",), ("ablations.measure.finetune.cache",)
LESSONS: dict[str, dict[str, Any]] = {
    "ats, all that draws or keeps a state": {
        "stages": [{"at": [1, 2], "stack": [{"name": "ats", "budget": {"count": 24}}]}],
        "images": 24, "batch": 4, "accumulate": 2, "lr": 1e-3, "clip": 1.0, "mixup": 0.4, "cutmix": 0.4,
        "drop_path": 0.2, "ema": 0.9, "keep_shrink": 1.0, "distill": {"alpha": 0.3, "tau": 2.0}, "holdout": 8,
        "warmup": 0.5,
    },
    **{
        name: {"stages": [{"at": [1, 2], "stack": [data]}], "images": 12, "batch": 4, "lr": 1e-3}
        for name, data in {
            "dynamicvit": {"name": "dynamicvit", "budget": {"ratio": 0.6}},
            "tps": {"name": "tps", "budget": {"ratio": 0.6}},
            "avit": {"name": "avit"},
            "ia_red2": {"name": "ia_red2"},
            "diffrate": {"name": "diffrate"},
            "sttabt": {"name": "sttabt", "budget": {"ratio": 0.6}},
            "sinkhorn": {"name": "sinkhorn", "budget": {"count": 9}},
            "stack patch_merger, evit": {"name": "stack", "stack": [
                {"name": "patch_merger", "budget": {"count": 16}},
                {"name": "evit", "budget": {"ratio": 0.8}},
            ]},
        }.items()
    },
}  # fmt: skip
INTERRUPTED = 4  # of the six updates, the one after which the checkpoint still holds the one before


@group
def loading(world: World) -> None:
    """Two epochs of three updates on the embedded scenes, to the end and interrupted in the middle."""
    shutil.rmtree(world.folder / "loading", ignore_errors=True)  # of a run that was broken off
    for index, (name, settings) in enumerate(LESSONS.items()):
        own, theirs = (side / "loading" / str(index) for side in (world.folder, world.old))
        world.book.attempt(f"{name} | trained here", functools.partial(_train_and_write, settings, own))
        world.book.attempt(f"{name} | weights of OLD", functools.partial(_evaluate, settings, theirs))
        world.book.attempt(f"{name} | checkpoint of OLD", functools.partial(_go_on, settings, theirs, own))
        world.book.progress(index + 1, len(LESSONS))


def _recipe(settings: dict[str, Any]) -> Any:
    whole_recipe = {"epochs": 2, "holdout": 0, **settings}
    return public("parse_recipe", *_RECIPE)(whole_recipe, workload="embedded")


def _pupil() -> Any:
    return vit(img_size=64, in_chans=1, num_classes=10, proj_drop_rate=0.1, attn_drop_rate=0.1)


def _finetuning(settings: dict[str, Any], scenes: Path) -> Any:
    import torch

    recipe = _recipe(settings)
    drawn = public("Scenes", "ablations.workloads.training")(
        scenes, count=48, augment=recipe.augment, holdout=recipe.holdout, seed=recipe.seed
    )
    return public("Finetuning", *_LOOP)(recipe, _pupil(), drawn, device=torch.device("cpu"))


def _result(begun: Any) -> dict[str, Any]:
    """What a training ends with, without the times."""
    model, reducers = begun.trained()
    curve = [{key: value for key, value in row.items() if key not in ("seconds", "eta")} for row in begun.curve]
    weights = {**{f"base {key}": value for key, value in model.items()}, **{f"own {k}": v for k, v in reducers.items()}}
    return {"curve": curve, "updates": begun.update, "order": list(weights), **weights}


def _train_and_write(settings: dict[str, Any], folder: Path) -> dict[str, Any]:
    """A finished training, its weights, and the checkpoint that it had in the middle of its second epoch."""
    folder.mkdir(parents=True)
    through, done, path = _finetuning(settings, folder.parent / "scenes"), itertools.count(1), folder / "checkpoint"

    def beat() -> None:
        if next(done) == INTERRUPTED:
            shutil.copy(path, folder / "unfinished")

    through.run(path=path, identity={}, every=0, report=lambda row: None, beat=beat)
    model, reducers = through.trained()
    dense = _pupil()
    dense.load_state_dict(model)
    public("Finetuned", *_CACHE)(dense, reducers, {}).save(folder)
    return _result(through)


def _evaluate(settings: dict[str, Any], folder: Path) -> dict[str, Any]:
    """The finished weights of OLD, in a model made here."""
    import torch
    from safetensors.torch import load_file

    from reducers import reduce_tokens

    dense, own = _pupil(), folder / "reducers.safetensors"
    dense.load_state_dict(load_file(folder / "finetuned.safetensors"))
    tensors = load_file(own) if own.exists() else {}
    placement = public("Finetuned", *_CACHE)(dense, tensors, {}).load_reducers(_recipe(settings).placement(DEPTH))
    with torch.no_grad():
        found = told(reduce_tokens(dense, placement), pictures(5, 64, 64, channels=1))
    return {**found, "tensors": sorted(tensors)}


def _go_on(settings: dict[str, Any], theirs: Path, own: Path) -> dict[str, Any]:
    """The interrupted training of OLD, to its end."""
    begun = _finetuning(settings, own.parent / "scenes")
    path = own / "going on"
    path.write_bytes((theirs / "unfinished").read_bytes())
    begun.run(path=path, identity={}, every=1e9, report=lambda row: None)
    return _result(begun)


# --- start -----------------------------------------------------------------------------------------------------------

if __name__ == "__main__":
    if sys.argv[1:2] == ["--child"]:
        sys.exit(child(sys.argv[2:]))
    sys.exit(main())
