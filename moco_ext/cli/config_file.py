"""``--config FILE``: flags from a YAML, TOML or JSON file."""

from __future__ import annotations

import argparse
import difflib
import json
import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from ..runs.files import read_json

_SUFFIXES = (".yaml", ".yml", ".toml", ".json")
_SEPARATORS = {"data": os.pathsep, "logger": ","}  # of flags that take several values in one word


def add_config_flag(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--config",
        metavar="FILE",
        help="YAML, TOML or JSON file with the names of these flags and their values, or a run directory, for its "
        "config.json; flags on the command line take precedence",
    )


def with_file(
    parser: argparse.ArgumentParser, argv: Sequence[str], args: argparse.Namespace, ignored: Sequence[str] = ()
) -> argparse.Namespace:
    """``args``, as ``parser`` made them from ``argv``, with the values of the file ``args.config`` below them.

    ``from_file`` of the result holds the names of the values that are the file's. Names in ``ignored`` are left out.

    Raises:
        ValueError: a file that cannot be read, an unknown name, or a value that its flag does not take.
    """
    if args.config is None:
        return args
    path = Path(args.config)
    content = {key: value for key, value in read_config(path).items() if key not in ignored}
    values = _typed(parser, content, path)
    merged, _ = parser.parse_known_args(argv, argparse.Namespace(**values))
    merged.from_file = frozenset(
        name for name in values if getattr(args, name, argparse.SUPPRESS) == parser.get_default(name)
    )
    return merged


def read_config(path: Path) -> dict[str, Any]:
    """The content of a configuration file, or of the ``config.json`` of a run directory."""
    if path.is_dir():
        path = path / "config.json"
    suffix = path.suffix.lower()
    if suffix not in _SUFFIXES or not path.is_file():
        raise ValueError(f"config: expected a file ({', '.join(_SUFFIXES)}) or a run directory, got {path}")
    try:
        text = path.read_text(encoding="utf-8-sig")
        if suffix == ".json":
            content = json.loads(text, object_pairs_hook=_each_once)
        elif suffix == ".toml":
            content = _toml(text)
        else:
            content = _yaml(text)
    except ValueError as error:
        raise ValueError(f"config: {path} cannot be read: {' '.join(str(error).split())}") from None
    if not isinstance(content, dict):
        raise ValueError(f"config: expected names and values in {path}, got {type(content).__name__}")
    if isinstance(content.get("data"), str) and path.name == "config.json":  # perhaps of a run
        from ..data import seen_from_here  # takes a second

        started = read_json(path.with_name("environment.json")).get("directory")
        content["data"] = seen_from_here(content["data"], started)
    return content


def _toml(text: str) -> Any:
    try:
        import tomllib
    except ModuleNotFoundError:  # Python 3.10
        raise ValueError("TOML needs Python 3.11 or newer; write YAML or JSON") from None
    return tomllib.loads(text)


def _yaml(text: str) -> Any:
    import yaml

    class Loader(yaml.SafeLoader):
        def construct_mapping(self, node: Any, deep: bool = False) -> Any:
            _each_once([(key.value, None) for key, _ in node.value if isinstance(key, yaml.ScalarNode)])
            return super().construct_mapping(node, deep)

    try:
        return yaml.load(text, Loader) or {}
    except yaml.YAMLError as error:
        raise ValueError(str(error)) from None


def _each_once(pairs: Sequence[tuple[Any, Any]]) -> dict[Any, Any]:
    """The object of these names and values; a ValueError for a name that is there twice, as in TOML."""
    found: dict[Any, Any] = {}
    for name, value in pairs:
        if name in found:
            raise ValueError(f"expected {name} once")
        found[name] = value
    return found


def _typed(parser: argparse.ArgumentParser, content: Mapping[str, Any], path: Path) -> dict[str, Any]:
    """The content by the destinations of the flags, with the types of the flags; null leaves a flag out."""
    actions = _flags(parser)
    values: dict[str, Any] = {}
    for key, value in content.items():
        name = str(key).replace("-", "_")
        if name not in actions:
            close = difflib.get_close_matches(name, actions, n=3)
            hint = f"; did you mean {' or '.join(close)}?" if close else ""
            raise ValueError(f"config: expected names of flags of {parser.prog} in {path}, got {key!r}{hint}")
        action = actions[name]
        if action.dest in values:
            raise ValueError(f"config: expected {action.dest} once in {path}, got another name of it, {key!r}")
        if value is not None:
            values[action.dest] = _value(action, name, value)
    return values


def _flags(parser: argparse.ArgumentParser) -> dict[str, argparse.Action]:
    """Flags by each of their names, with underscores, and by destination."""
    found: dict[str, argparse.Action] = {}
    for action in parser._actions:
        if not action.option_strings or action.dest in ("help", "config"):
            continue
        negated = "--no-" if isinstance(action, argparse.BooleanOptionalAction) else "\0"
        names = [s.lstrip("-").replace("-", "_") for s in action.option_strings if not s.startswith(negated)]
        found |= dict.fromkeys([action.dest, *(name for name in names if len(name) > 1)], action)
    return found


def _value(action: argparse.Action, name: str, value: Any) -> Any:
    if action.nargs == 0:
        if not isinstance(value, bool):
            raise ValueError(f"{name}: expected true or false, got {value!r}")
        return value
    if action.nargs in ("*", "+"):
        return [_one(action, name, item) for item in (value if isinstance(value, list) else [value])]
    if isinstance(value, list) and action.dest in _SEPARATORS:
        value = _SEPARATORS[action.dest].join(map(str, value))
    return _one(action, name, value)


def _one(action: argparse.Action, name: str, value: Any) -> Any:
    convert: Any = action.type or str
    try:
        if isinstance(value, (bool, list, dict)):
            raise ValueError
        converted = convert(str(value))  # YAML reads 1e-4 as text
    except ValueError:
        wanted = {int: "an integer", float: "a number"}.get(convert, "text")
        raise ValueError(f"{name}: expected {wanted}, got {value!r}") from None
    if action.choices is not None and converted not in action.choices:
        raise ValueError(f"{name}: expected one of {', '.join(action.choices)}, got {value!r}")
    return converted
