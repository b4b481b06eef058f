"""Checks of AdaMixConfig's fields."""

from __future__ import annotations

import re
from collections.abc import Iterable


def several(value: object) -> bool:
    return isinstance(value, (list, tuple, set, frozenset, range))


def check_names(name: str, value: object, optional: bool = True, string: bool = True) -> None:
    """A list of strings, or a string or None where these are allowed."""
    if (value is None and optional) or (isinstance(value, str) and string):
        return
    if not isinstance(value, Iterable) or not several(value) or not all(isinstance(item, str) for item in value):
        raise ValueError(
            f"{name}: got {value!r}, expected names{', a string' if string else ''}{' or None' if optional else ''}"
        )


def check_expression(name: str, value: object) -> None:
    """A string is a regular expression."""
    try:
        re.compile(value if isinstance(value, str) else "")
    except re.error as error:
        raise ValueError(f"{name}: got {value!r}, expected a regular expression ({error})") from error
