"""YAML read without its traps: plain data and nothing that could grow or run. PyYAML is imported when a file comes."""

from __future__ import annotations

import functools
import re
from typing import Any


@functools.cache
def strict_loader() -> Any:
    """A loader class of PyYAML's: plain data only, no duplicate keys, no aliases (they can grow without bound), keys
    that are plain names. Dates stay text, and truth is true or false, not on, off, yes or no.
    """
    import yaml

    class Loader(yaml.SafeLoader):  # type: ignore[misc]  # PyYAML has no types
        def compose_node(self, parent: Any, index: Any) -> Any:
            if self.check_event(yaml.AliasEvent):
                mark = self.peek_event().start_mark
                raise yaml.composer.ComposerError(None, None, "aliases (*name) are not read; repeat the value", mark)
            return super().compose_node(parent, index)

        def construct_mapping(self, node: Any, deep: bool = False) -> dict[Any, Any]:
            seen: set[str] = set()
            for key, _ in node.value:
                if key.tag != "tag:yaml.org,2002:str":
                    raise yaml.constructor.ConstructorError(
                        None,
                        None,
                        f"key {getattr(key, 'value', '')!r} is no plain name; put it in quotes",
                        key.start_mark,
                    )
                if key.value in seen:
                    raise yaml.constructor.ConstructorError(
                        None, None, f"duplicate key {key.value!r}; keep one of the two", key.start_mark
                    )
                seen.add(key.value)
            return super().construct_mapping(node, deep)

    # `<<` and `=` are names like any other
    unwanted = (":timestamp", ":merge", ":value", ":bool")
    Loader.yaml_implicit_resolvers = {
        first: [(tag, pattern) for tag, pattern in resolvers if not tag.endswith(unwanted)]
        for first, resolvers in yaml.SafeLoader.yaml_implicit_resolvers.items()
    }
    Loader.add_implicit_resolver("tag:yaml.org,2002:bool", re.compile(r"^(?:true|True|false|False)$"), list("tTfF"))
    return Loader


def read_yaml(text: str) -> Any:
    """What a text says as plain data.

    Raises:
        ValueError: it is no YAML, or holds more than plain data; the message says what and in which line.
    """
    import yaml

    try:
        loader = strict_loader()(text)
        try:
            return loader.get_single_data()
        finally:
            loader.dispose()
    except yaml.MarkedYAMLError as error:
        mark = error.problem_mark or error.context_mark
        raise ValueError(
            f"{f'line {mark.line + 1}: ' if mark else ''}{error.problem or 'not valid YAML':.300}"
        ) from error
    except RecursionError as error:
        raise ValueError("nested too deeply") from error
    except (yaml.YAMLError, ValueError, ArithmeticError, LookupError, AttributeError, TypeError) as error:
        # beyond YAMLError: characters YAML cannot hold, and PyYAML's own slips on values such as `!!int ""`
        raise ValueError(f"not valid YAML ({type(error).__name__}: {error!s:.200})") from error
