"""No reduction: the control of every comparison."""

from __future__ import annotations

from reducers.decision import Decision
from reducers.reducer import State, TokenReducer, Traits
from reducers.registry import register
from reducers.signals import Signals


@register("identity")
class Identity(TokenReducer):
    """Keep every token. The result must equal the plain model's."""

    summary = "no reduction"
    source = "control"
    traits = Traits(control=True, cuts_before_values=True)  # it cuts nothing: a stack is counted as its others

    def decide(self, signals: Signals, state: State) -> Decision | None:
        return None
