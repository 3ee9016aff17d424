"""The page on the models that are driven, made from the hosts themselves: ``sievit docs``."""

from __future__ import annotations

from reducers.hosts import hosts

_OPENING = """\
<!-- made by `sievit docs`: change `families` of the hosts in reducers/hosts instead -->

# Models that are driven

Each by its exact type and restated exactly: with no reduction, logits are the library's own. What is refused is refused
by name when it is wrapped. [`hosts.md`](hosts.md) shows how another family is added.
"""


def page() -> str:
    """The text of docs/families.md."""
    rows, why = ["| library | family | entry points | what travels with a token |", "| --- | --- | --- | --- |"], []
    for host in hosts():
        for family in host.families:
            every, refused = host.entry_points(family), [name for names in family.refused.values() for name in names]
            driven = f"{len(every) - len(refused)} of {len(every)}"
            rows.append(f"| {host.library} | `{family.name}`: {family.about} | {driven} | {family.travels} |")
            why += [
                f"* {reason}: {', '.join(f'`{name}`' for name in names)}" for reason, names in family.refused.items()
            ]
    return "\n".join([_OPENING, *rows, "", "## Refused", "", *why, ""])
