"""transformers' CvT (``CvtForImageClassification``, ``CvtModel``), driven exactly as it is: see ``reducers.hosts.cvt``.

It is not the authors' function of their weights: GELU stands for QuickGELU, and in training the second stochastic depth
of a layer drops the whole image. Nothing here imports transformers before a model of it is there.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from functools import cached_property
from importlib import import_module
from typing import Any, ClassVar

from torch import Tensor, nn

from reducers.errors import ReducerError
from reducers.hosts.cvt import Cvt, CvtBlock, check_convolutions, check_stage, check_type, check_unreplaced
from reducers.hosts.protocol import Call, Family, StochasticDepth
from reducers.tokens import Layout, TokenBatch

_TF = "transformers.models.cvt.modeling_cvt."


class HFCvtBlock(CvtBlock):
    """transformers' ``CvtLayer``, whose second stochastic depth drops the whole image and not the branch."""

    module: Any

    @property
    def attn(self) -> Any:
        return self.module.attention.attention

    @property
    def heads(self) -> int:
        return int(self.attn.num_heads)

    @property
    def dropout(self) -> float:
        return float(self.attn.dropout.p) if self.attn.dropout.training else 0.0

    @property
    def linears(self) -> tuple[nn.Linear, nn.Linear, nn.Linear]:
        attn = self.attn
        return attn.projection_query, attn.projection_key, attn.projection_value

    @property
    def _projections(self) -> tuple[Any, Any, Any]:
        attn = self.attn
        return (
            attn.convolution_projection_query, attn.convolution_projection_key, attn.convolution_projection_value,
        )  # fmt: skip

    @property
    def convolutions(self) -> tuple[nn.Conv2d, nn.Conv2d, nn.Conv2d]:
        query, key, value = (part.convolution_projection.convolution for part in self._projections)
        return query, key, value

    @property
    def output(self) -> nn.Linear:
        linear: nn.Linear = self.module.attention.output.dense
        return linear

    def convolved(self, part: int, grid: Tensor) -> Tensor:
        found: Tensor = self._projections[part](grid)
        return found

    def projected(self, summed: Tensor) -> Tensor:
        added: Tensor = self.module.attention.output(summed, summed)
        return added

    def attention_ends(self) -> tuple[nn.Module, ...]:
        return (self.module.attention.output,)

    def norm(self, branch: int) -> nn.Module:
        norm: nn.Module = self.module.layernorm_after if branch else self.module.layernorm_before
        return norm

    def _drop(self) -> StochasticDepth | None:
        path = self.module.drop_path
        if isinstance(path, nn.Identity) or not path.training or path.drop_prob == 0:
            return None
        return StochasticDepth(path.drop_prob)

    def depth(self, branch: int) -> StochasticDepth | None:
        return None if branch else self._drop()

    @property
    def mlp(self) -> nn.Module:
        return nn.Sequential(self.module.intermediate, self.module.output.dense)

    def after_mlp(self, x: Tensor, layout: Layout) -> Tensor:
        module = self.module
        found: Tensor = module.output(module.intermediate(module.layernorm_after(x)), x)
        drop = self._drop()
        return found if drop is None else drop(found, layout)


class HFCvt(Cvt):
    """transformers' CvT."""

    library: ClassVar[str] = "transformers"
    families: ClassVar[tuple[Family, ...]] = (
        Family("cvt", "CvT, reduced in the stage with the class token", travels="its place on the grid of patches"),
    )
    block_of: ClassVar[type[CvtBlock]] = HFCvtBlock

    @classmethod
    def entry_points(cls, family: Family) -> list[str]:
        """Classes, for there are no names of models."""
        return ["CvtModel", "CvtForImageClassification"]

    @property
    def tower(self) -> Any:
        return self.model._modules.get("cvt", self.model)

    def check(self) -> None:
        name, tower = type(self.model).__name__, self.tower
        whole = {name: self.model, f"{name}'s tower": tower, f"{name}'s encoder": tower.encoder}
        for where, module in whole.items():
            check_unreplaced(module, where)
        last = len(tower.encoder.stages) - 1
        for index, stage in enumerate(tower.encoder.stages):
            check_stage(stage, index, last=index == last, has_class_token=hasattr(stage, "cls_token"))
            check_type(stage, _TF + "CvtStage", f"stage {index}")
            for number, layer in enumerate(stage.layers):
                where = f"layer {number} of stage {index}"
                check_type(layer, _TF + "CvtLayer", where)
                attention = layer.attention
                check_type(attention, _TF + "CvtAttention", f"the attention of {where}")
                check_type(attention.attention, _TF + "CvtSelfAttention", f"the attention of {where}")
                for part in ("query", "key", "value"):
                    projection = getattr(attention.attention, f"convolution_projection_{part}")
                    check_type(projection, _TF + "CvtSelfAttentionProjection", f"the {part} of {where}")
                    inner = projection._modules.get("convolution_projection")
                    check_type(inner, _TF + "CvtSelfAttentionConvProjection", f"the {part} of {where}")
                check_type(layer.intermediate, _TF + "CvtIntermediate", f"the MLP of {where}")
                check_type(layer.output, _TF + "CvtOutput", f"the MLP of {where}")
                if index == last:
                    for restated in (layer, attention, attention.attention):
                        check_unreplaced(restated, where)
                    path = layer.drop_path
                    if not isinstance(path, nn.Identity):
                        check_type(path, _TF + "CvtDropPath", f"the drop_path of {where}")
                        check_unreplaced(path, f"the drop_path of {where}")
                    check_convolutions(HFCvtBlock(layer, self.chosen), where)

    def parts(self) -> list[Any]:
        return list(self.tower.encoder.stages)

    def layers(self, stage: Any) -> Any:
        return stage.layers

    def convolution(self, stage: Any) -> nn.Conv2d:
        found: nn.Conv2d = stage.embedding.convolution_embeddings.projection
        return found

    def embedding(self, stage: Any) -> nn.Module:
        found: nn.Module = stage.embedding
        return found

    @cached_property
    def _none(self) -> nn.Module:
        return nn.Identity()

    @property
    def final_norm(self) -> nn.Module:
        """A bare tower has none."""
        norm: nn.Module = self.model._modules.get("layernorm", self._none)
        return norm

    @property
    def head(self) -> nn.Module | None:
        head: nn.Module | None = self.model._modules.get("classifier")
        return head

    @property
    def image_size(self) -> tuple[int, int]:
        """What the configuration says, where it does; else the size of the published models. Any other is taken too."""
        size = getattr(self.tower.config, "image_size", 224)
        height, width = (size, size) if isinstance(size, int) else size
        return int(height), int(width)

    def asked(self, images: Tensor | None, named: Mapping[str, Any]) -> Call:
        name = type(self.model).__name__
        known = {"pixel_values", "return_dict"} | ({"restore"} if self.head is None else {"labels"})
        given = {key: value for key, value in named.items() if value is not None}
        if wrong := sorted(set(given) - known):
            raise ReducerError(f"a reduced {name} does not answer {wrong[0]}=…; it takes {', '.join(sorted(known))}")
        pixels = given.get("pixel_values", images)
        if pixels is None or (images is not None and "pixel_values" in given):
            raise ReducerError(f"a reduced {name} is called as fast(pixel_values=…), (B, C, H, W)")
        restore = given.get("restore", "owner") if self.head is None else None
        return Call(pixels, restore, options={key: given[key] for key in ("labels", "return_dict") if key in given})

    def answer(self, batch: TokenBatch, call: Call, tokens: Callable[[], Tensor] | None) -> Any:
        model, found = self.model, {}
        if self.head is None:
            assert tokens is not None
            every = tokens()  # (B, 1 + N0, D)
            grid = self.grid_of(call.images)
            found = {
                "last_hidden_state": every[:, 1:].transpose(1, 2).unflatten(2, grid),
                "cls_token_value": every[:, :1],
            }
            output = import_module(_TF[:-1]).BaseModelOutputWithCLSToken(**found)
        else:
            found["logits"] = self.classify(batch)
            if "labels" in call.options:
                found["loss"] = model.loss_function(call.options["labels"], found["logits"], model.config)
            output = import_module("transformers.modeling_outputs").ImageClassifierOutputWithNoAttention(**found)
        as_it_is = call.options.get("return_dict", getattr(model.config, "return_dict", True))
        return output if as_it_is else output.to_tuple()


HOST = HFCvt
