"""What rides on a module that is restated and not called, and so would be bypassed. Knows no library."""

from __future__ import annotations

from typing import Literal

from torch import nn

_COUNTING = "fvcore.nn.jit_analysis"  # hooks every module while it counts, to name where an operator stands


def riding(module: nn.Module, *harmless: str) -> Literal["forward hook", "backward hook", "forward"] | None:
    """A hook of some kind, or a ``forward`` of the module's own; None where nothing does. ``harmless``: modules of
    Python whose hooks do nothing unless they are asked to.
    """
    hooks = (*module._forward_pre_hooks.values(), *module._forward_hooks.values())
    if hooks and any(
        getattr(hook, "__module__", type(hook).__module__) not in (_COUNTING, *harmless) for hook in hooks
    ):
        return "forward hook"
    if module._backward_hooks or module._backward_pre_hooks:
        return "backward hook"
    return "forward" if "forward" in module.__dict__ else None
