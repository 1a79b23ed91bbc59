"""Look a name up among the built-in choices, a user's ``module:attribute``, or installed entry points."""

from __future__ import annotations

import importlib
import sys
from collections.abc import Mapping
from importlib.metadata import entry_points
from pathlib import Path
from typing import TypeVar

T = TypeVar("T")


def is_reference(name: str) -> bool:
    """Whether ``name`` has the form ``module:attribute``, that is, names code outside this package."""
    return ":" in name


def import_reference(reference: str) -> object:
    """Import ``module:attribute``, where the module may be a file in the current folder.

    Raises
    ------
    ValueError
        If the module cannot be found or imported, or has no such attribute.
    """
    module_name, _, attribute = reference.partition(":")
    # A console script does not have the current folder on its path, and a user's file usually lies there.
    here = str(Path.cwd())
    added = here not in sys.path
    if added:
        sys.path.insert(0, here)
    try:
        module = importlib.import_module(module_name)
    except Exception as error:  # the user's code may raise anything
        name = error.name if isinstance(error, ModuleNotFoundError) else None
        if name is not None and (name == module_name or module_name.startswith(f"{name}.")):
            raise ValueError(
                f"{reference!r}: there is no module {module_name!r} in the current folder or the environment"
            ) from None
        raise ValueError(f"{reference!r}: importing it failed ({type(error).__name__}: {error})") from error
    finally:
        if added:
            sys.path.remove(here)
    try:
        return getattr(module, attribute)
    except AttributeError:
        raise ValueError(
            f"{reference!r}: the module {module_name!r} has no attribute {attribute!r}"
        ) from None


def look_up(name: str, known: Mapping[str, T], *, what: str, group: str | None = None) -> T | object:
    """Resolve ``name`` among ``known`` names, ``module:attribute`` references and an entry-point ``group``.

    Raises
    ------
    ValueError
        If nothing has that name; the message lists what is known.
    """
    if name in known:
        return known[name]
    if is_reference(name):
        return import_reference(name)
    installed = entry_points(group=group) if group else ()
    for entry_point in installed:
        if entry_point.name == name:
            return entry_point.load()
    names = ", ".join([*known, *(entry_point.name for entry_point in installed)])
    raise ValueError(f"unknown {what} {name!r}: choose one of {names}, or name your own as module:attribute")
