"""YAML files of a user: recipes and studies."""

from __future__ import annotations

from collections.abc import Hashable
from pathlib import Path
from typing import Any

import yaml

from pgpo.errors import UserError


def read_yaml(path: Path, what: str) -> Any:
    """The document in a file. `what` names the file in sentences, e.g. "recipe".

    Two things that YAML allows are errors: a name written twice (YAML keeps the last, silently) and aliases (nine lines
    of them can stand for 10^9 items).

    Raises:
        UserError: the file cannot be read, or is no such YAML.
    """
    try:
        text = path.read_text(encoding="utf-8")
    except OSError as error:
        raise UserError(f"the {what} {path} cannot be read ({error.strerror}); check the path.") from error
    except UnicodeDecodeError as error:
        raise UserError(f"the {what} {path} is not UTF-8 at byte {error.start}; save it as UTF-8.") from error
    try:
        return yaml.load(text, Loader=_Loader)
    except yaml.YAMLError as error:
        raise UserError(f"the {what} {path} is not valid YAML: {' '.join(str(error).split())}") from error
    except RecursionError as error:
        raise UserError(f"the {what} {path} is not valid YAML: it is nested too deeply.") from error
    except Exception as error:  # yaml lets those of int(), float(), datetime and its own tables through
        reason = " ".join(str(error).split())[:100]
        raise UserError(f"the {what} {path} is not valid YAML: {type(error).__name__}: {reason}") from error


class _Loader(yaml.SafeLoader):
    def compose_node(self, parent: Any, index: Any) -> Any:
        if self.check_event(yaml.AliasEvent):
            event = self.peek_event()
            raise yaml.MarkedYAMLError(
                problem=f"the alias *{event.anchor} is not supported, write the value out",
                problem_mark=event.start_mark,
            )
        return super().compose_node(parent, index)

    def construct_mapping(self, node: Any, deep: bool = False) -> dict[Any, Any]:
        names: set[Hashable] = set()
        for key, _ in node.value if isinstance(node, yaml.MappingNode) else ():
            name = self.construct_object(key, deep=True)
            if isinstance(name, Hashable) and name in names:
                raise yaml.MarkedYAMLError(problem=f"{name!r} stands twice", problem_mark=key.start_mark)
            if isinstance(name, Hashable):
                names.add(name)
        return dict(super().construct_mapping(node, deep))
