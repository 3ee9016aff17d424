"""What the docstrings and comments of a module say, as Markdown: the statements they mark, and its functions."""

from __future__ import annotations

import inspect
import io
import re
import tokenize
from collections.abc import Callable, Iterable, Iterator
from types import ModuleType

_TAG = re.compile(r"\[[RD](?:/[RD])*\]|\[[RD]: [^\]]+\]")
_ITEM = re.compile(r"    (?P<name>\w+): (?P<text>\S.*)")
_SENTENCE = re.compile(r"(?<=\.)\s+(?=[A-Z`(\[])")


def statements(module: ModuleType) -> Iterator[str]:
    """Every sentence of the module that carries a tag, once."""
    yield from tagged(_texts(module))


def tagged(texts: Iterable[str]) -> Iterator[str]:
    """Every sentence that carries a tag, once."""
    said: dict[str, None] = {}
    for text in texts:
        prose, settings = parted(text)
        for one in (prose, *(f"`{name}`: {meaning}" for name, meaning in settings.items())):
            for sentence in _SENTENCE.split(" ".join(one.split())):
                if _TAG.search(sentence):
                    said[markdown(sentence[:1].upper() + sentence[1:])] = None
    yield from said


def parted(docstring: str) -> tuple[str, dict[str, str]]:
    """A docstring without its ``Args:`` list, and the list: name -> meaning, in order.

    An item begins with a name and a colon, four columns deeper than ``Args:``; what is deeper goes on with it.
    """
    lines = inspect.cleandoc(docstring).splitlines()
    if "Args:" not in lines:
        return "\n".join(lines), {}
    start = lines.index("Args:")
    end = next((i for i, line in enumerate(lines) if i > start and line and not line.startswith("    ")), len(lines))
    found: dict[str, list[str]] = {}
    for line in filter(str.strip, lines[start + 1 : end]):
        item = _ITEM.match(line)
        if item:
            found[item["name"]] = [item["text"]]
        else:
            found[next(reversed(found))].append(line.strip())
    prose = [part for part in ("\n".join(lines[:start]).strip(), "\n".join(lines[end:]).strip()) if part]
    return "\n\n".join(prose), {name: " ".join(text) for name, text in found.items()}


def _texts(module: ModuleType) -> Iterator[str]:
    """Docstrings of the module, its classes, their methods and its functions, and its comments."""
    if module.__doc__:
        yield module.__doc__
    for thing in vars(module).values():
        if getattr(thing, "__module__", None) != module.__name__ or not (
            inspect.isfunction(thing) or inspect.isclass(thing)
        ):
            continue
        inner = vars(thing).values() if inspect.isclass(thing) else ()
        for part in (thing, *inner):
            documented = part is thing or inspect.isfunction(part)
            if documented and isinstance(part.__doc__, str):
                yield part.__doc__
    lines = io.StringIO(inspect.getsource(module)).readline
    comment: list[str] = []
    for token in tokenize.generate_tokens(lines):
        alone = token.type == tokenize.COMMENT and not token.line[: token.start[1]].strip()
        if comment and not alone and token.type != tokenize.NL:
            yield " ".join(comment)
            comment = []
        if alone:  # one that goes on over several lines is one text
            comment.append(token.string.lstrip("# "))
        elif token.type == tokenize.COMMENT:
            yield token.string.lstrip("# ")


def functions(module: ModuleType) -> list[str]:
    """The public functions of the module: their names, arguments and docstrings, a paragraph each."""
    own = (each for each in vars(module).values() if inspect.isfunction(each) and each.__module__ == module.__name__)
    return [part for each in own if not each.__name__.startswith("_") for part in described(each)]


def described(function: Callable[..., object]) -> list[str]:
    """A function's name and arguments, and its docstring."""
    title = f"**`{function.__name__}({', '.join(_arguments(function))})`**"
    return [title, markdown(inspect.cleandoc(function.__doc__ or ""))]


def _arguments(function: Callable[..., object]) -> Iterator[str]:
    starred = False
    for parameter in inspect.signature(function).parameters.values():
        if parameter.kind is parameter.KEYWORD_ONLY and not starred:
            starred = True
            yield "*"
        default = "" if parameter.default is parameter.empty else f"={parameter.default!r}"
        yield f"{parameter.name}{default}"


def markdown(text: str) -> str:
    """Double backquotes become single ones; a line that would begin a list or a heading does not."""
    return re.sub(r"^(?=[#>])", r"\\", text.replace("``", "`"), flags=re.MULTILINE)
