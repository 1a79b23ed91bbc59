"""Look a name up among the built-in choices, a user's ``module:attribute``, or installed entry points."""

import pkgutil
import sys
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from importlib.metadata import entry_points
from pathlib import Path
from typing import Any


def is_reference(name: str) -> bool:
    """Whether ``name`` has the form ``module:attribute``, that is, names code outside this package."""
    return ":" in name


def import_reference(reference: str) -> object:
    """Import ``module:attribute``, where the module may be a file in the current folder; ``ValueError`` if it fails."""
    module, here = reference.partition(":")[0], str(Path.cwd())
    sys.path.insert(0, here)  # a console script does not have it there, and a user's file usually lies in it
    try:
        return pkgutil.resolve_name(reference)
    except Exception as error:  # the user's code may raise anything
        name = error.name if isinstance(error, ModuleNotFoundError) else None
        why = f"importing it failed ({type(error).__name__}: {error})"
        if name is not None and f"{module}.".startswith(f"{name}."):
            why = f"there is no module {module!r} in the current folder or the environment"
        elif isinstance(error, AttributeError) and module in sys.modules:
            why = str(error)
        raise ValueError(f"{reference!r}: {why}") from error
    finally:
        sys.path.remove(here)


def look_up(name: str, known: Mapping[str, Any], *, what: str, form: str, group: str | None = None) -> Any:
    """What ``name`` is: among ``known``, or a function by ``module:attribute`` or entry point; else ``ValueError``."""
    if name in known:
        return known[name]
    installed = entry_points(group=group or "")
    if is_reference(name):
        found = import_reference(name)
    elif name in installed.names:
        found = installed[name].load()
    else:
        names = ", ".join([*known, *sorted(installed.names)])
        raise ValueError(f"unknown {what} {name!r}: choose one of {names}, or name your own as module:attribute")
    if not callable(found):
        raise ValueError(f"{what} {name!r} must be a function {form}, not {found!r}")
    return found


@contextmanager
def users_code(what: str) -> Iterator[None]:
    """Name ``what`` fails in whatever a user's own code raises, as a ``ValueError``."""
    try:
        yield
    except (ValueError, OSError, MemoryError):
        raise
    except Exception as error:
        raise ValueError(f"{what} ({type(error).__name__}: {error})") from error
