"""Writing files so that a reader never sees half of one, reading JSON that may be damaged, one writer a folder."""

import hashlib
import json
import os
import secrets
import socket
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any, TextIO, TypeVar

T = TypeVar("T")

try:
    import fcntl
except ImportError:  # Windows has no such locks
    fcntl = None  # type: ignore[assignment]

LOCK = ".lock"
LEFTOVERS = (".*.tmp", ".tmp" + 6 * "[0-9A-Za-z]")
"""Temporary files of `write_atomic` and of safetensors, which only a kill leaves behind."""


def sha256(path: Path) -> str:
    """The SHA-256 of a file, in hexadecimal."""
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def write_atomic(path: Path, content: bytes | memoryview | str | Callable[[Path], object]) -> Path:
    """Write ``content`` beside ``path``, sync it, rename it into place; an ``OSError`` names ``path``.

    A function writes the file whose path it is given.
    """
    temporary = path.with_name(f".{path.name}.{secrets.token_hex(4)}.tmp")
    try:
        temporary.touch(exist_ok=False)
        if callable(content):
            mode = temporary.stat().st_mode
            content(temporary)
            temporary.chmod(mode)  # safetensors puts a file of its own there, which nobody else may read
        else:
            # A path from a folder may hold bytes that are not UTF-8; they go out as they came in.
            data = content.encode("utf-8", "surrogateescape") if isinstance(content, str) else content
            temporary.write_bytes(data)
        with open(temporary, "rb+") as stream:
            os.fsync(stream.fileno())
        temporary.replace(path)
    except BaseException as error:
        with suppress(OSError):  # on a full or read-only disk too
            temporary.unlink()
        if isinstance(error, OSError):
            raise type(error)(f"cannot write {path}: {error.strerror or error}") from error
        raise
    with suppress(OSError):  # the new name too survives a power cut, where folders can be synced
        folder = os.open(path.parent, os.O_RDONLY)
        try:
            os.fsync(folder)
        finally:
            os.close(folder)
    return path


@contextmanager
def locked(what: Path) -> Iterator[None]:
    """Keep other processes off a run folder, or a file being written; ``BlockingIOError`` if one is at work on it.

    The system lets go when the process dies, however it dies. Where there are no such locks, nothing is kept off.
    """
    path = what / LOCK if what.is_dir() else what.with_name(f".{what.name}{LOCK}")
    with _open_locked(path, what) as file:
        file.truncate(0)
        file.write(f"{os.getpid()} on {socket.gethostname()}")
        file.flush()
        for found in what.rglob(".*") if what.is_dir() else ():
            if _is_leftover(found):
                found.unlink(missing_ok=True)
        try:
            yield
        finally:
            path.unlink(missing_ok=True)


def _open_locked(path: Path, what: Path) -> TextIO:
    while True:
        file = open(path, "a+")  # noqa: SIM115 (closed by the caller)
        try:
            if fcntl is not None:
                # Of the two kinds of lock the one that forked workers do not inherit (filelock's is the other).
                fcntl.lockf(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            if os.path.samestat(os.fstat(file.fileno()), os.stat(path)):
                return file
        except (BlockingIOError, PermissionError):
            file.seek(0)
            with file:
                raise BlockingIOError(
                    f"{what} is in use by process {file.read() or '?'}: wait for it, or name another (--out)"
                ) from None
        except FileNotFoundError:
            pass
        except OSError:  # this file system has no locks
            return file
        file.close()  # of a process that has just ended, and has removed its lock


def is_begun(folder: Path) -> bool:
    """Whether there is anything at ``folder``, but for what a kill at the very beginning leaves."""
    if not folder.is_dir():
        return folder.exists()
    return any(path.name != LOCK and not _is_leftover(path) for path in folder.iterdir())


def _is_leftover(path: Path) -> bool:
    return any(map(path.match, LEFTOVERS)) and path.is_file()


def check_writable(path: Path) -> Path:
    """Check before hours of work that ``path`` can be written, and return it; errors name what is in the way."""
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
    """Check that ``values`` is an object whose entries named in ``form`` are of the types there, and return it."""
    if not isinstance(values, dict):
        raise ValueError(f"it holds {type(values).__name__}, not an object")
    for name, kind in form.items():
        value = values.get(name)
        # bool is an int to isinstance, and true is no number
        a_bool = isinstance(value, bool) and kind is not bool
        if name not in values or not isinstance(value, kind) or a_bool:
            raise ValueError(f"{name} is missing or no {getattr(kind, '__name__', kind)}")
    return values


def read_json(path: Path, read: Callable[[Any], T]) -> T:
    """What ``read`` makes of a JSON file's value; a ``ValueError`` of either names the file."""
    try:
        return read(parse_json(path.read_bytes()))
    except ValueError as error:
        raise ValueError(f"{path}: {error}") from None
