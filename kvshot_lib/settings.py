"""Settings are what their annotations say: no text for a number, no number for true, nothing that is not finite."""

import sys
from dataclasses import fields
from types import UnionType
from typing import Literal, get_args, get_origin, get_type_hints

from .errors import StudyError

_MOST = sys.float_info.max
_MEANT = {bool: "True or False", int: "a whole number", float: "a finite number", str: "text"}


def check_settings(settings: object) -> None:
    """Check every field of a dataclass against its annotation; numbers of numpy become plain ones.

    Raises
    ------
    StudyError : the field, what was given and what is meant.
    """
    kinds = get_type_hints(type(settings))
    for field in fields(settings):
        value = check_value(field.name, getattr(settings, field.name), kinds[field.name])
        object.__setattr__(settings, field.name, value)


def check_value(name: str, value: object, kind: object) -> object:
    """The value if it is of that kind: bool, int, float, str, ``tuple[kind, ...]``, a ``Literal``, or several by ``|``.

    >>> check_value("epochs", 2, int), check_value("learning_rate", 1, float)
    (2, 1)
    """
    plain = value.item() if hasattr(value, "item") and not getattr(value, "shape", ()) else value
    if not _fits(plain, kind):
        raise StudyError(f"{name}={plain!r} must be {_meant(kind)}")
    return plain


def at_least(least: int, **options: int) -> None:
    """Refuse options of a command that are no whole numbers, or below ``least``."""
    for name, value in options.items():
        if check_value(flag := f"--{name.replace('_', '-')}", value, int) < least:
            raise StudyError(f"{flag} is too small: it starts at {least}")


def _fits(value: object, kind: object) -> bool:
    if isinstance(kind, UnionType):
        return any(_fits(value, one) for one in get_args(kind))
    if get_origin(kind) is Literal:
        return isinstance(value, str) and value in get_args(kind)
    if get_origin(kind) is tuple:
        return isinstance(value, tuple) and all(_fits(one, get_args(kind)[0]) for one in value)
    if kind is int or kind is float:
        number = isinstance(value, int | float) and not isinstance(value, bool)
        return number and (isinstance(value, int) or kind is float) and -_MOST <= value <= _MOST
    return isinstance(value, kind)


def _meant(kind: object) -> str:
    if isinstance(kind, UnionType):
        return " or ".join(map(_meant, get_args(kind)))
    if get_origin(kind) is Literal:
        return f"one of {', '.join(map(repr, get_args(kind)))}"
    if get_origin(kind) is tuple:
        return f"a list, each of it {_meant(get_args(kind)[0])}"
    return _MEANT.get(kind, getattr(kind, "__name__", str(kind)))
