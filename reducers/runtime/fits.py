"""Whether a placement fits a model: its blocks are there, its reducers find what they need and get their parameters."""

from __future__ import annotations

from reducers.errors import ReducerError
from reducers.hosts.protocol import Host, stage_of
from reducers.placement import check_blocks
from reducers.reducer import TokenReducer
from reducers.runtime.plain import PlainModel
from reducers.runtime.plan import Plan


def check_plan(host: Host, plan: Plan) -> None:
    """Refuse what the model cannot do; reducers that have parameters make them, the first time."""
    check_blocks(plan.at, host.depth)
    _check_embedding(host, plan)
    _check_members(host, plan)
    _check_class_token(host, plan)
    _check_borders(host, plan)
    if host.regroups or host.between_units is not None:
        _check_regrouped(host, plan)
    _check_clips(host, plan)
    if any(member.steps.attaches for member in plan.members):
        attach(host, plan)


def attach(host: Host, plan: Plan) -> None:
    """Let every reducer that has parameters make them for this model; those that have them already keep them."""
    for member, blocks in plan.blocks.items():
        stages = list(dict.fromkeys(stage_of(block, host.stages) for block in blocks))
        if member.steps.attaches and len(stages) > 1:
            raise ReducerError(
                f"{member.name} has parameters of one width, and its blocks lie in {len(stages)} stages of this "
                f"{type(host.model).__name__}; place it in one, or one of its own in each: at(…) | at(…)"
            )
        member.join(PlainModel(host, stages[0] if len(host.stages) > 1 else None), blocks)


def _check_borders(host: Host, plan: Plan) -> None:
    """Refuse reducers that ask the block before for what no longer belongs to the tokens of a new stage."""
    borders = host.borders
    for block, member in plan.acts:
        if block in borders and member.traits.uses_previous_attention:
            raise ReducerError(
                f"{member.name} asks for the attention of the block before, and block {block} is the first of a stage "
                f"of this {type(host.model).__name__}, whose tokens are other ones; place it at block {block + 1} or "
                "later"
            )


def _check_members(host: Host, plan: Plan) -> None:
    """Refuse reducers for what they are, wherever they stand."""
    model = type(host.model).__name__
    for member in plan.members:
        if host.inputs not in member.traits.inputs:
            raise ReducerError(
                f"{member.name} reads {' and '.join(member.traits.inputs)} alone, and this {model} reads "
                f"{host.inputs}; use a method that looks at tokens (ats, topk, evit, …)"
            )
        if (why := host.unfit(member)) is not None:
            raise ReducerError(f"{member.name} is not for this {model}: {why}")


def _check_clips(host: Host, plan: Plan) -> None:
    """Refuse reducers that choose by clips what is to be chosen alike in all frames, and what they cannot do twice."""
    model = type(host.model).__name__
    for block, member in plan.acts:
        traits = member.traits
        if host.decided == "alike" and (traits.whole_clip or member.steps.selects):
            raise ReducerError(
                f"{member.name} keeps other places in each frame, and over='tube' has all frames of a clip keep the "
                "same; use over='frame' or over='clip'"
            )
        if traits.whole_clip and traits.site != "input" and host.units > 1:
            raise ReducerError(
                f"{member.name} at block {block} decides on whole clips, which is possible at site='input' alone: this "
                f"{model} attends frame by frame"
            )
    selecting = [member.name for member in plan.members if member.steps.selects]
    if len(selecting) > 1:
        raise ReducerError(
            f"{' and '.join(selecting)} choose among all patches before the first block, and only one can; place one"
        )


def _check_regrouped(host: Host, plan: Plan) -> None:
    """Refuse reducers that do more than decide, or leave tokens without places, in a model whose blocks form units of
    their own by places, or work between units by them.
    """
    by = host.between_units or "forms units of its own (windows)"
    for block, member in plan.acts:
        steps = member.steps
        early = (steps.prepares or steps.selects) and host.regroups  # acts before there are units that last
        if early or steps.plans or steps.runs_blocks or steps.finishes:
            raise ReducerError(
                f"{member.name} at block {block} prepares images, plans, runs blocks or ends by itself, and every "
                f"block of this {type(host.model).__name__} {by}; place a method that only decides"
            )
        if member.traits.pools:
            raise ReducerError(
                f"{member.name} at block {block} mixes all patches into tokens that lie nowhere, and every block of "
                f"this {type(host.model).__name__} {by}; use a method that keeps patches or merges them"
            )


def _check_embedding(host: Host, plan: Plan) -> None:
    """Refuse reducers in blocks that are a part of the embedding, or closed."""
    closed = host.closed
    for block, member in plan.acts:
        if block in closed:
            raise ReducerError(
                f"{member.name} at block {block}: {closed[block]}; place it at one of the blocks "
                f"{', '.join(str(other) for other in range(host.embedded, host.depth) if other not in closed)}"
            )
        if block < host.embedded:
            raise ReducerError(
                f"{member.name} at block {block}: blocks 0 to {host.embedded - 1} of this {type(host.model).__name__} "
                f"take no reducer, as {host.embedded_as}; place it at block {host.first_free} or later"
            )
        if block == host.embedded > 0 and member.traits.uses_previous_attention:
            raise ReducerError(
                f"{member.name} asks for the attention of the block before, and block {block - 1} of this "
                f"{type(host.model).__name__} shows none, as blocks 0 to {block - 1} are a part of its embedding; "
                f"place it at block {block + 1} or later"
            )


def _check_class_token(host: Host, plan: Plan) -> None:
    """Refuse reducers that ask a class token the model has not, or that another reducer may have dropped by then."""
    stages = host.stages
    dropper: tuple[int, TokenReducer] | None = None
    for block, member in plan.acts:
        if member.traits.needs_class_token:
            if not stage_of(block, stages).has_class_token:
                raise ReducerError(
                    f"{member.name} needs a class token and this model has none ({host.head_words}); "
                    "use a score that needs none: score='attention_received', 'value_norm' or 'random', or ToMe"
                )
            if dropper is not None:
                raise ReducerError(
                    f"{member.name} at block {block} needs the class token, which {dropper[1].name} at block "
                    f"{dropper[0]} may have dropped; keep it there ({dropper[1].keeps_class_token_by}) or use "
                    "score='attention_received' here"
                )
        if member.traits.may_drop_class_token:
            if not stage_of(block, stages).has_class_token:
                raise ReducerError(
                    f"{member.name} is asked to drop the class token, and this model has none "
                    f"({host.head_words}); use {member.keeps_class_token_by}"
                )
            if host.shares_class_token:
                raise ReducerError(
                    f"{member.name} at block {block} may drop the class token, of which every frame has a copy in this "
                    f"{type(host.model).__name__}; use {member.keeps_class_token_by}"
                )
            dropper = (block, member)
