"""Which steps in time stay of a clip that is made shorter: methods choose them, and hosts find their embeddings."""

from __future__ import annotations


def spread_steps(steps: int, kept: int) -> list[int]:
    """``kept`` of ``steps`` steps at even distances, the first one always: step i is floor(i x steps / kept).

    It is what nearest-neighbour interpolation reads, so a step that stays has the embedding of its own time.
    """
    return [i * steps // kept for i in range(kept)]
