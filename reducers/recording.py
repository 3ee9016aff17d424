"""Whether operations are written down while they run."""

from __future__ import annotations

import torch


def recording() -> bool:
    """What is computed now may be asked for again: for a gradient, or by a graph that ``torch.jit.trace`` makes.

    Nothing is written over then, and steps that save time without gradients are not taken: a graph is traced with
    gradients, checked without, and has to be the same.
    """
    return torch.is_grad_enabled() or bool(torch.jit.is_tracing())  # type: ignore[attr-defined]  # documented
