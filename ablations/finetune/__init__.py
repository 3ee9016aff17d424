"""Finetuning with reducers active in training, with timm's building blocks and torch alone.

``trained_model`` is the door for trials; ``python -m ablations.finetune`` trains one placement on its own.
"""

from ablations.finetune.cache import Finetuned, finetuned, trained_model
from ablations.finetune.checkpoint import CheckpointError
from ablations.finetune.loop import FinetuneError, Finetuning
from ablations.finetune.recipe import Distillation, Recipe, RecipeError, parse_recipe

__all__ = [
    "CheckpointError", "Distillation", "FinetuneError", "Finetuned", "Finetuning", "Recipe", "RecipeError",
    "finetuned", "parse_recipe", "trained_model",
]  # fmt: skip
