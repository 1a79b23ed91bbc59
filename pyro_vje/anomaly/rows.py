"""Rows on disk while images are being scored, so that an interrupted run can go on."""

from __future__ import annotations

import json
import logging
from collections.abc import Iterable
from contextlib import ExitStack
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from pyro_vje.data import ImageSet
from pyro_vje.runs.files import locked, parse_json, write_atomic

log = logging.getLogger("pyro_vje")


class Table(NamedTuple):
    """What was found: positions in the image set ``(N,)``, scores ``(N,)``, parts ``(N, P)``, unreadable files."""

    positions: Tensor
    scores: NDArray[np.float64]
    parts: NDArray[np.float64]
    failed: list[tuple[str, str]]


class Journal:
    """Rows on disk while images are being scored: a line of JSON for each, after one that says how they were made.

    Parameters
    ----------
    path : Path
        The file; without ``resume``, and where there is none, it is begun anew.
    fingerprint : dict
        What rows depend on.
    width : int
        Numbers in a row.

    Raises
    ------
    BlockingIOError
        If another process is writing it.
    ValueError
        If the file's rows were made in another way, or the file is damaged.
    """

    def __init__(self, path: Path, fingerprint: dict[str, Any], width: int, *, resume: bool) -> None:
        self.path, self.width = path, width
        self.done: set[str] = set()
        self._lock = ExitStack()
        self._lock.enter_context(locked(path))
        if not resume or not path.is_file() or not path.stat().st_size:
            if resume:
                log.info("there is no %s to resume: from the beginning", path)
            write_atomic(path, json.dumps(fingerprint) + "\n")
            return
        whole = 0
        with open(path, "rb") as file:
            for number, line in enumerate(file):
                if not line.endswith(b"\n"):  # what a kill cut off is scored again
                    break
                values = self._parse(line) if number == 0 else self._row(line)
                if number == 0 and values != fingerprint:
                    changed = [
                        name
                        for name, value in fingerprint.items()
                        if not isinstance(values, dict) or values.get(name) != value
                    ]
                    raise ValueError(
                        f"{path} was made with other settings ({', '.join(changed)}): score again without --resume"
                    )
                if number and values[0] in self.done:
                    raise self._damaged()
                if number:
                    self.done.add(values[0])
                whole += len(line)
        if not whole:
            raise self._damaged()
        with open(path, "r+b") as file:
            file.truncate(whole)

    def add(self, rows: Iterable[tuple[str, Any]]) -> None:
        """Append (path, [score, parts ...]) or (path, reason of failure), and flush."""
        lines = []
        for path, values in rows:
            self.done.add(path)
            lines.append(json.dumps([path, values]) + "\n")
        with open(self.path, "a", encoding="ascii") as file:
            file.writelines(lines)

    def remove(self) -> None:
        """Remove the file, when all that was made of it is written, and let other processes write it."""
        self.path.unlink()
        self._lock.close()

    def read(self, images: ImageSet) -> Table:
        """All rows, in the order of the images; raises ``ValueError`` for a row of an image that is not there."""
        position = {path: i for i, path in enumerate(images.paths)}
        positions, rows, failed = [], [], []
        with open(self.path, "rb") as file:
            next(file)
            for line in file:
                path, values = self._row(line)
                if path not in position:
                    raise self._damaged()
                if isinstance(values, str):
                    failed.append((path, values))
                else:
                    positions.append(position[path])
                    rows.append(np.array(values))
        order = np.argsort(positions, kind="stable")
        numbers = np.stack(rows)[order] if rows else np.empty((0, self.width))
        return Table(
            torch.tensor(positions, dtype=torch.int64)[order], numbers[:, 0], numbers[:, 1:], sorted(failed)
        )

    def _damaged(self) -> ValueError:
        return ValueError(f"{self.path} is damaged: score again without --resume")

    def _parse(self, line: bytes) -> Any:
        try:
            return parse_json(line)
        except ValueError:
            raise self._damaged() from None

    def _row(self, line: bytes) -> tuple[str, str | list[float]]:
        match self._parse(line):
            case [str(path), str(reason)]:
                return path, reason
            case [str(path), [*numbers]] if list(map(type, numbers)) == [float] * self.width:
                return path, numbers
        raise self._damaged()
