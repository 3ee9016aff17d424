"""Models in the wrappers of torch.distributed, in a process group of one: equal to the plain ones, or refused."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from reducers import EViT, Ratio, ReducedViT, ToMe, UnsupportedModel, at, reduce_tokens

from .conftest import make_vit

fsdp = pytest.importorskip("torch.distributed.fsdp")
pytestmark = [
    pytest.mark.skipif(not dist.is_available() or not dist.is_gloo_available(), reason="torch without gloo"),
    pytest.mark.skipif(not hasattr(fsdp, "fully_shard"), reason="torch without FSDP2"),
]
PLACEMENT = at([1, 2], EViT(Ratio(0.6))) | at(3, ToMe(Ratio(0.8)))


@pytest.fixture(scope="module")
def mesh() -> Iterator[object]:
    """One process on this machine's CPU."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("GLOO_SOCKET_IFNAME", "lo")
        dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
        try:
            yield dist.device_mesh.init_device_mesh("cpu", (1,))
        finally:
            dist.destroy_process_group()


def reduced() -> ReducedViT:
    return reduce_tokens(make_vit(), PLACEMENT)


def learned(model: nn.Module, images: Tensor) -> tuple[Tensor, dict[str, Tensor]]:
    """Logits, and the gradient of every parameter by its name in the plain wrapper."""
    logits = model(images)
    logits.square().sum().backward()
    found = {}
    for name, parameter in model.named_parameters():
        gradient = parameter.grad
        assert gradient is not None, name
        found[name.removeprefix("module.")] = gradient.full_tensor() if hasattr(gradient, "full_tensor") else gradient
    return logits.detach(), found


def assert_learns_alike(wrapped: nn.Module, images: Tensor) -> None:
    expected, theirs = learned(reduced(), images)
    logits, found = learned(wrapped, images)
    torch.testing.assert_close(logits, expected, rtol=0, atol=1e-6)
    assert found.keys() == theirs.keys() and len(found) > 50
    for name, gradient in theirs.items():
        torch.testing.assert_close(found[name], gradient, rtol=1e-5, atol=1e-6, msg=lambda text, n=name: f"{n}: {text}")


def test_a_reduced_model_learns_in_distributed_data_parallel_as_it_does_alone(mesh, images):
    assert_learns_alike(DistributedDataParallel(reduced()), images)


def test_a_model_inside_distributed_data_parallel_is_refused_with_its_remedy(mesh):
    remedy = r"DistributedDataParallel\(reduce_tokens\(wrapped.module, placement\)\)"
    with pytest.raises(UnsupportedModel, match=remedy):
        reduce_tokens(DistributedDataParallel(make_vit()), PLACEMENT)


def whole(model: ReducedViT) -> list[nn.Module]:
    return [model]


def called_parts(model: ReducedViT) -> list[nn.Module]:
    """Parts that the runtime calls, and then all that is left."""
    return [*(block.mlp for block in model.base.blocks), model.base.head, model]


@pytest.mark.parametrize("parts", [whole, called_parts])
def test_a_sharded_reduced_model_learns_as_it_does_alone(parts, mesh, images):
    model = reduced()
    for part in parts(model):
        fsdp.fully_shard(part, mesh=mesh)
    assert_learns_alike(model, images)


SHARDED = {
    "block 1 is a FSDPBlock.*shard the reduced model": lambda m: m.blocks[1],
    "block 1 attends with FSDPAttention.*shard the reduced model": lambda m: m.blocks[1].attn,
    "block 1 has its qkv replaced by a FSDPLinear.*shard the reduced model": lambda m: m.blocks[1].attn.qkv,
    "the model has become a FSDPVisionTransformer.*shard the reduced model": lambda m: m,
}


@pytest.mark.parametrize("message", SHARDED)
def test_what_is_restated_and_sharded_is_refused_before_wrapping_and_after(message, mesh, images):
    model = make_vit()
    wrapped = reduce_tokens(model, PLACEMENT)
    wrapped(images)
    fsdp.fully_shard(SHARDED[message](model), mesh=mesh)
    for ask in (wrapped, wrapped.trace, wrapped.cost, lambda _: reduce_tokens(model, PLACEMENT)):
        with pytest.raises(UnsupportedModel, match=message):
            ask(images)
