"""Flags: those of a configuration's settings, and those that several commands share."""

from __future__ import annotations

import argparse
import dataclasses
import difflib
import re
import typing
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NoReturn

from ..runs.settings import Setting, settings


class Parser(argparse.ArgumentParser):
    """A parser whose errors are one line, and whose positional arguments may be between flags.

    Attributes:
        of_command: the parser of the flags of one command.
    """

    of_command: Parser | None = None

    def error(self, message: str) -> NoReturn:
        self.exit(2, f"moco-ext: error: {message} (see {self.prog} --help)\n")

    def parse_args(self, args=None, namespace=None):  # type: ignore[no-untyped-def, override]
        found, rest = self.parse_known_args(args, namespace)
        if rest:
            parser = self.of_command or self
            close = difflib.get_close_matches(rest[0].partition("=")[0], parser._option_string_actions)
            hint = f"; did you mean {' or '.join(close)}?" if close else ""
            parser.error(f"unrecognized arguments: {' '.join(rest)}{hint}")
        return found

    def parse_known_args(self, args=None, namespace=None):  # type: ignore[no-untyped-def, override]
        found, rest = super().parse_known_args(args, namespace)
        several = next((action.dest for action in self._positionals._group_actions if action.nargs in ("*", "+")), None)
        if several and not any(word.startswith("-") for word in rest):  # argparse has taken only the first group
            setattr(found, several, getattr(found, several) + rest)
            rest = []
        return found, rest


def add_settings(
    parser: argparse.ArgumentParser, declared: Mapping[str, Setting], defaults: Mapping[str, Any] | None = None
) -> None:
    """Add a flag for each setting. Without its flag a setting is absent from the parsed arguments.

    Args:
        defaults: what help texts show instead of the settings' own defaults.
    """
    groups: dict[str, Any] = {"": parser}
    for name, setting in declared.items():
        if setting.group not in groups:
            groups[setting.group] = parser.add_argument_group(setting.group)
        default = (defaults or {}).get(name, setting.default if setting.shown is None else setting.shown)
        groups[setting.group].add_argument(
            *(setting.flags or [f"--{name.replace('_', '-')}"]),
            dest=name,
            default=argparse.SUPPRESS,
            help=setting.help + _shown(default),
            **type_of(setting),
        )


def type_of(setting: Setting) -> dict[str, Any]:
    """What argparse needs to know of a setting's values."""
    types = typing.get_args(setting.type) or (setting.type,)
    if bool in types:
        return {"action": argparse.BooleanOptionalAction if setting.negatable else "store_true"}
    number = next((number for number in (int, float) if number in types), None)
    choices = setting.valid.choices if setting.valid else ()
    letter = {int: "N", float: "X", None: setting.name.upper()}[number]
    options: dict[str, Any] = {"metavar": setting.metavar or (f"{{{','.join(choices)}}}" if choices else letter)}
    if number is not None:
        options["type"] = number
    if typing.get_origin(setting.type) is tuple:
        options["nargs"] = "*"
    return options


def given(args: argparse.Namespace, cls: type) -> dict[str, Any]:
    """The settings of a dataclass that were given as flags."""
    values = {name: getattr(args, name) for name in settings(cls) if hasattr(args, name)}
    return {name: tuple(value) if isinstance(value, list) else value for name, value in values.items()}


def add_data_flags(parser: argparse.ArgumentParser, default: str) -> None:
    parser.add_argument(
        "--data",
        metavar="NAME|DIR",
        help="digits, fashion-mnist, cifar10 or cifar100; a folder of images, with or without class folders, train/ "
        "and val/; a list of images (.txt, .csv, .tsv, .parquet); or shards: a folder, a URL, or a pattern such as "
        f"'shards-{{000..999}}.tar' of .tar or .parquet files, or a folder of LitData chunks (default: {default})",
    )
    add_data_root(parser)


def add_data_root(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--data-root", metavar="DIR", default="data", help="folder of downloaded data sets (default: data)"
    )


def name_of(data: str) -> str:
    """The last part of the path of the data, for the name of a directory, which TensorBoard needs to be text.

    Of a pattern only what precedes its braces and wildcards, or else the folder's name.
    """
    path = Path(data)
    name = path.name if path.exists() else re.sub(r"[-_.]*[{*?\[].*", "", path.name) or path.parent.name
    return name.encode(errors="ignore").decode()


def _shown(default: Any) -> str:
    if default is None or default is dataclasses.MISSING or isinstance(default, bool):
        return ""
    if isinstance(default, tuple):
        default = " ".join(map(str, default))
    return f" (default: {default:g})" if isinstance(default, float) else f" (default: {default})"
