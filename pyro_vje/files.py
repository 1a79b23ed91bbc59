"""Writing files so that a reader never sees half of one, and reading JSON that may be damaged."""

from __future__ import annotations

import json
import os
import tempfile
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, TypeVar

T = TypeVar("T")


def write_atomic(path: Path, content: bytes | str) -> Path:
    """Write ``content`` beside ``path``, sync it, and rename it into place; the old file stays until then."""
    # A path from a folder may hold bytes that are not UTF-8; they go out as they came in.
    data = content.encode("utf-8", "surrogateescape") if isinstance(content, str) else content
    handle, temporary = tempfile.mkstemp(dir=path.parent, prefix=f".{path.name}.")
    try:
        with os.fdopen(handle, "wb") as stream:
            stream.write(data)
            stream.flush()
            os.fsync(stream.fileno())
        # mkstemp makes files private; give the result the permissions of an ordinary new file.
        mask = os.umask(0)
        os.umask(mask)
        os.chmod(temporary, 0o666 & ~mask)
        os.replace(temporary, path)
    except BaseException:
        Path(temporary).unlink(missing_ok=True)
        raise
    return path


def check_writable(path: Path) -> Path:
    """Check before hours of work that ``path`` can be written at their end, and return it.

    Raises
    ------
    FileNotFoundError, IsADirectoryError, PermissionError
        If it cannot, naming what is in the way.
    """
    folder = path.parent
    if not folder.is_dir():
        raise FileNotFoundError(f"cannot write {path}: there is no folder {folder}")
    if path.is_dir():
        raise IsADirectoryError(f"cannot write {path}: it is a folder; name a file (--out FILE)")
    if not os.access(folder, os.W_OK | os.X_OK):
        raise PermissionError(f"cannot write {path}: the folder {folder} is read-only; name another (--out)")
    return path


def write_json(path: Path, values: Any) -> Path:
    """Write ``values`` as indented JSON, atomically; NaN and infinities are refused."""
    return write_atomic(path, json.dumps(values, indent=2, allow_nan=False) + "\n")


def parse_json(text: bytes | str) -> Any:
    """The value of a JSON text; whatever is wrong with it is a ``ValueError``."""
    try:
        return json.loads(text)
    except RecursionError:
        raise ValueError("nested too deeply") from None


def check_form(values: Any, form: Mapping[str, Any]) -> dict[str, Any]:
    """Check that ``values`` is an object whose entries named in ``form`` are of the types there, and return it.

    Raises
    ------
    ValueError
        If it is no object, or an entry is missing or of another type.
    """
    if not isinstance(values, dict):
        raise ValueError(f"it holds {type(values).__name__}, not an object")
    for name, kind in form.items():
        value = values.get(name)
        # bool is an int to isinstance, and true is no number
        if (
            name not in values
            or not isinstance(value, kind)
            or (isinstance(value, bool) and kind is not bool)
        ):
            raise ValueError(f"{name} is missing or no {getattr(kind, '__name__', kind)}")
    return values


def read_json(path: Path, read: Callable[[Any], T]) -> T:
    """What ``read`` makes of a JSON file's value; a ``ValueError`` of either names the file."""
    try:
        return read(parse_json(path.read_bytes()))
    except ValueError as error:
        raise ValueError(f"{path}: {error}") from None
