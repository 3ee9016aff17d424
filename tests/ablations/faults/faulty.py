"""A reducer that fails on purpose, registered in every process of a run under test: see ``sitecustomize``."""

from __future__ import annotations

import os
import signal
import time
from pathlib import Path

import torch

from reducers import TokenReducer
from reducers.registry import register


@register("faulty")
class Faulty(TokenReducer):
    """Leaves the tokens alone, unless it fails in the way ``how`` names; with ``once``,
    only the first to make that file does.
    """

    summary, source = "fails on purpose", "the tests"

    def __init__(self, how: str = "nothing", once: str = "", images: int = 1) -> None:
        super().__init__()
        self.how, self.once, self.images = how, once, images

    def decide(self, signals: object, state: object) -> None:
        layout = signals.layout  # type: ignore[attr-defined]
        if self.how == "crowd":  # as a GPU does whose memory holds ``images`` images
            if layout.images > self.images:
                raise torch.OutOfMemoryError(f"CUDA out of memory with {layout.images} images")
            return
        if self.once and not self._first():
            return
        if self.how == "raise":
            raise RuntimeError("raised on purpose")
        if self.how == "memory":
            torch.empty(1 << 52, dtype=torch.uint8)  # four pebibytes: the allocator's own refusal
        if self.how == "kill":
            os.kill(os.getpid(), signal.SIGKILL)
        if self.how == "nan":
            signals.values().fill_(float("nan"))  # type: ignore[attr-defined]
        while self.how == "hang":
            time.sleep(3600)

    def _first(self) -> bool:
        try:
            Path(self.once).touch(exist_ok=False)
        except FileExistsError:
            return False
        return True
