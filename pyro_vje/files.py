"""Writing files so that a reader never sees half of one."""

from __future__ import annotations

import json
import os
import tempfile
from pathlib import Path
from typing import Any


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
