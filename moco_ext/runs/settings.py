"""Settings: dataclass fields that know their help text, flags and valid values."""

from __future__ import annotations

import dataclasses
import math
import typing
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple


class Valid(NamedTuple):
    """The values that a setting takes: a description, a test and, for an enumeration, its choices."""

    description: str
    holds: Callable[[Any], bool]
    choices: tuple[str, ...] = ()


POSITIVE = Valid("a positive number", lambda value: 0 < value < math.inf)
NOT_NEGATIVE = Valid("0 or more", lambda value: 0 <= value < math.inf)
FROM_0_TO_1 = Valid("a number from 0 to 1", lambda value: 0 <= value <= 1)
BELOW_1 = Valid("a number from 0 to below 1", lambda value: 0 <= value < 1)
SHARE = Valid("a share greater than 0 and at most 1", lambda value: 0 < value <= 1)


def at_least(least: int) -> Valid:
    return Valid(f"at least {least}", lambda value: value >= least)


def one_of(*choices: str) -> Valid:
    return Valid(f"one of {', '.join(choices)}", lambda value: value in choices, choices)


class Setting(NamedTuple):
    """A setting of a dataclass, as :func:`settings` finds it.

    Attributes:
        type: the field's annotation.
        default: the field's default; ``dataclasses.MISSING`` if it has none.
        shown: the default as help texts show it; None: ``default`` itself.
        flags: option strings; none: made from the field's name.
        group: heading in help texts.
        negatable: of a bool: there is a flag ``--no-NAME`` too, for defaults that presets may change.
    """

    name: str
    type: Any
    default: Any
    help: str
    flags: tuple[str, ...]
    metavar: str | None
    valid: Valid | None
    shown: str | None
    group: str
    negatable: bool

    def check(self, value: Any) -> None:
        """Raise a ValueError unless the setting takes ``value``; of a tuple, each of its elements."""
        if self.valid is None or (value is None and self.default is None):
            return
        if not all(map(self.valid.holds, value if isinstance(value, tuple) else (value,))):
            raise ValueError(f"{self.name}: expected {self.valid.description}, got {value!r}")


def setting(
    default: Any = dataclasses.MISSING,
    *,
    help: str,
    flags: tuple[str, ...] = (),
    metavar: str | None = None,
    valid: Valid | None = None,
    shown: str | None = None,
    group: str = "",
    negatable: bool = True,
) -> Any:
    """A dataclass field with what its flag needs; the arguments are the attributes of :class:`Setting`."""
    metadata = {
        "help": help,
        "flags": flags,
        "metavar": metavar,
        "valid": valid,
        "shown": shown,
        "group": group,
        "negatable": negatable,
    }
    return dataclasses.field(default=default, metadata=metadata)


def settings(cls: type, *names: str) -> dict[str, Setting]:
    """The settings of a dataclass by name, in order; with ``names``, only these."""
    types = typing.get_type_hints(cls)
    return {
        field.name: Setting(field.name, types[field.name], field.default, **field.metadata)
        for field in dataclasses.fields(cls)
        if field.metadata and (not names or field.name in names)
    }


def changed_settings(before: Mapping[str, Any], now: Any) -> list[str]:
    """``NAME OLD -> NEW`` of each field of a dataclass's instance ``now`` that had another value before."""
    return [
        f"{name} {before[name]} -> {value}"
        for name, value in dataclasses.asdict(now).items()
        if name in before and before[name] != value
    ]


def check_settings(instance: Any) -> None:
    """Check every setting of a dataclass's instance.

    Raises:
        ValueError: a value that the setting does not take.
    """
    for name, declared in settings(type(instance)).items():
        declared.check(getattr(instance, name))
