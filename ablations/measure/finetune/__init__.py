"""Finetuning with reducers active in training, with timm's building blocks and torch alone.

``trained_model`` is the door for trials; ``python -m ablations.measure.finetune`` trains one placement on its own.
"""

from ablations.measure.finetune.cache import Finetuned, trained_model
from ablations.measure.finetune.checkpoint import CheckpointError
from ablations.measure.finetune.given import finetuned
from ablations.measure.finetune.loop import FinetuneError, Finetuning
from ablations.trial.recipe import Distillation, Recipe, RecipeError, parse_recipe

__all__ = [
    "CheckpointError", "Distillation", "FinetuneError", "Finetuned", "Finetuning", "Recipe", "RecipeError",
    "finetuned", "parse_recipe", "trained_model",
]  # fmt: skip
