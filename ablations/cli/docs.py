"""``sievit docs``: the pages on the methods, from their docstrings, and on the models, from their hosts."""

from __future__ import annotations

import argparse

from ablations.cli.options import FAILED, OK, Command

_EPILOG = """\
examples:
  sievit docs            write docs/methods: a page for each registered method, and an index; docs/families.md
  sievit docs --check    say which pages are not current

exit status: 0 written, or all pages are current; 1 with --check: some are not
"""


def _add_options(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--check", action="store_true", help="change nothing; exit status 1 if pages are stale")


def _docs(arguments: argparse.Namespace) -> int:
    from ablations.catalogue import docs

    if arguments.check:
        old = docs.stale()
        print("\n".join([f"stale: {name}" for name in old] or ["all pages are current"]))
        return FAILED if old else OK
    changed = docs.write()
    print(f"{docs.FOLDER}: {len(changed)} pages changed" + "".join(f"\n  {name}" for name in changed))
    return OK


COMMAND = Command(
    summary="make docs/methods and docs/families.md from docstrings, registry and hosts",
    description="Make the pages on methods and models again, from docstrings, the registry and the hosts.",
    epilog=_EPILOG,
    add_options=_add_options,
    carry_out=_docs,
)
