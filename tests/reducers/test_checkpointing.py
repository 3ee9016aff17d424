"""Gradient checkpointing: timm's switch is honoured, and a block that runs again changes nothing but the memory."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from reducers import Identity, at, reduce_tokens

from .conftest import DEPTH, make_vit
from .test_contract import CASES, fresh, model_for, placed


def kept(model: torch.nn.Module, images: Tensor) -> int:
    """Bytes that a forward pass holds for the backward pass, parameters apart."""
    own = {parameter.data_ptr() for parameter in model.parameters()}
    held: dict[int, int] = {}

    def pack(tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in own:
            held[storage.data_ptr()] = storage.nbytes()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        out = model(images)
    del out
    return sum(held.values())


def test_as_much_memory_is_saved_as_timm_saves(images):
    model = make_vit().train()
    reduced = reduce_tokens(model, at([1, 2], Identity()))
    whole = kept(reduced, images)
    model.set_grad_checkpointing(True)
    assert kept(reduced, images) < 0.2 * whole
    assert kept(reduced, images) <= 1.1 * kept(model, images)
    model.set_grad_checkpointing(False)
    assert kept(reduced, images) == whole


def passed(name: str, images: Tensor, *, checkpointing: bool) -> list[Tensor | None]:
    """Logits, counts, costs, notes and every gradient of a traced training pass with dropout and stochastic depth."""
    model = model_for(CASES[name], drop_path_rate=0.3, proj_drop_rate=0.2, attn_drop_rate=0.1).train()
    reduced = reduce_tokens(model, placed(CASES[name], at_blocks=range(1, DEPTH) if name == "sttabt" else [1, 2]))
    model.set_grad_checkpointing(checkpointing)
    torch.manual_seed(5)
    logits, trace = reduced.trace(images)
    macs = trace.macs.clone()
    logits.square().sum().backward()
    assert torch.equal(trace.macs, macs), "running a block again costs nothing in the trace"
    after = torch.rand(1)
    gradients = [parameter.grad for parameter in reduced.parameters()]
    return [logits.detach(), trace.tokens, macs, trace.owner(DEPTH - 1), after, *gradients]


OFTEN = ["topk", "evit", "ats", "tome", "dynamicvit", "tps", "avit", "stvit", "diffrate", "stack topk tome evit"]
REST = [pytest.param(name, marks=pytest.mark.slow) for name in CASES if name not in OFTEN]


@pytest.mark.parametrize("name", [*(name for name in OFTEN if name in CASES), *REST])
def test_gradients_and_draws_are_those_without_it(name, images):
    expected = passed(name, images[:2], checkpointing=False)
    found = passed(name, images[:2], checkpointing=True)
    for ours, theirs in zip(found, expected, strict=True):
        assert (ours is None) == (theirs is None)
        assert ours is None or torch.equal(ours, theirs)  # type: ignore[arg-type]


def test_losses_read_the_notes_of_the_first_run(images):
    from ablations.measure.finetune.objective import TeacherOutputs, TrainingViT

    def losses(*, checkpointing: bool) -> list[Tensor]:
        model = make_vit().train()
        model.set_grad_checkpointing(checkpointing)
        training = TrainingViT(model, at([1, 2], fresh(CASES["dynamicvit"])))
        torch.manual_seed(3)
        outputs, state = training.observed(images)
        teacher = TeacherOutputs(torch.zeros(5, 7), torch.zeros(5, 37, 32))
        (member,) = training.losing()
        parts = member.losses(state, outputs, torch.zeros(5, dtype=torch.long), teacher)
        sum(parts.values()).backward()
        assert len(state.noted(member)) == 2
        return [*parts.values(), *(p.grad for p in training.parameters() if p.grad is not None)]

    for ours, theirs in zip(losses(checkpointing=True), losses(checkpointing=False), strict=True):
        assert torch.equal(ours, theirs)
