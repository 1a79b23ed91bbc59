"""Scores and embeddings of batches of images from anywhere: what an engine over many machines calls.

A callable of columns to columns, made for ``map_batches`` of Ray Data with an actor for each GPU or core. The numbers
are those of `score` and `embed`, which read folders by themselves in one process.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from torch import Tensor

from pyro_vje.anomaly.judge import HOW, prepare, say_level
from pyro_vje.config import ScoreConfig
from pyro_vje.data import ImageError, ImageSet, LazyImages
from pyro_vje.model.encoding import encode_batches
from pyro_vje.runs.folder import default_device, load_run

Columns = dict[str, NDArray[Any]]


@dataclass(frozen=True)
class _Column(LazyImages):
    """Images of a column; what is wrong with one is kept by its position."""

    errors: dict[int, str] = field(default_factory=dict)

    def __getitem__(self, index: int) -> Tensor:
        try:
            return super().__getitem__(index)
        except ImageError as error:
            self.errors[index] = error.reason
            raise


class _OverBatches:
    """From a column of images to columns of numbers: ``shapes``, of one image, and `_found` say which."""

    shapes: dict[str, tuple[int, ...]]
    dtype: type = np.float64
    used: tuple[str, ...] = ("batch_size", "trust_plugins")

    def __init__(
        self, ckpt: str | Path, column: str = "bytes", settings: ScoreConfig | None = None, **overrides: Any
    ) -> None:
        settings = dataclasses.replace(settings or ScoreConfig(), **overrides)
        changed = {name for name, value in vars(ScoreConfig()).items() if getattr(settings, name) != value}
        if idle := ", ".join(sorted(changed - {*self.used})):
            how = " (fdr needs all p-values: benjamini_hochberg of the column)" if "fdr" in changed else ""
            raise ValueError(f"{idle}: no settings of a batch, which are {', '.join(self.used)}{how}")
        self.ckpt, self.column, self.settings = ckpt, column, settings
        self.run = load_run(ckpt, trust_plugins=settings.trust_plugins, device=default_device())
        self._prepare()

    def __reduce__(self) -> tuple[Any, ...]:
        return type(self), (self.ckpt, self.column, self.settings)

    def _prepare(self) -> None:
        """Load what `_found` needs, once, and set ``shapes``."""
        raise NotImplementedError

    def _found(self, images: ImageSet) -> Iterator[tuple[Any, Any]]:
        """Positions of images that could be decoded, and their columns by name."""
        raise NotImplementedError

    def __call__(self, batch: Mapping[str, Any]) -> Columns:
        """The batch's columns, but for pixels and bytes, and those that are found."""
        if self.column not in batch:
            known = ", ".join(map(repr, batch))
            raise ValueError(f"no column {self.column!r}: name that of the images, one of {known}")
        sources, info = list(batch[self.column]), self.run.info
        lazy = _Column(sources, info.image_size, info.interpolation, info.fit)
        count = len(sources)
        columns: Columns = {name: np.full((count, *x), np.nan, self.dtype) for name, x in self.shapes.items()}
        for index, found in self._found(ImageSet(lazy, [""] * count)):
            for name in self.shapes:
                columns[name][index] = found[name]
        paths = all(isinstance(source, str) for source in sources)
        kept = {name: values for name, values in batch.items() if name != self.column or paths}
        errors = np.array([lazy.errors.get(i, "") for i in range(count)], object)
        return {**kept, **columns, "error": errors}


class BatchScorer(_OverBatches):
    """Scores of a batch: a callable that takes columns, a dict of arrays, and returns them with those of `score`.

    ``ckpt`` is a run folder (or weights file) that every worker can read; ``column`` names the images: paths, bytes of
    image files, or uint8 arrays ``(H, W, 3)``, which if they are of one size may be one ``(N, H, W, 3)``. ``settings``
    and ``overrides`` are those of `score` that say how: all on which scores depend, ``alpha``, ``batch_size`` (of the
    encoder), ``trust_plugins``.

    Added are, under their names in the CSV, ``anomaly_score``, ``p_value``, the likelihood's parts, and the texts
    ``decision`` (where ``alpha`` is given) and ``error``; columns of these names give way. An image that cannot be
    decoded has NaN and an error. A pickle holds the arguments, and loads the run again.

    Raises ``ValueError`` and ``FileNotFoundError`` as `score`, or if a setting means nothing in a batch.
    """

    used = (*(name for name in HOW if name != "maps"), "alpha", "batch_size", "trust_plugins")

    def _prepare(self) -> None:
        self._judge = prepare(self.run, self.settings)
        calibration = self._judge.calibration
        say_level(len(calibration.scores) if calibration else 0, 1, self.settings.alpha, None)
        self.shapes = dict.fromkeys(self._judge.columns, ())

    def _found(self, images: ImageSet) -> Iterator[tuple[Any, Any]]:
        return ((table.index, table) for table in self._judge.rows(images))

    def __call__(self, batch: Mapping[str, Any]) -> Columns:
        """The batch's columns, but for pixels and bytes, with scores, p-values and decisions."""
        columns = super().__call__(batch)
        errors, alpha = columns["error"], self.settings.alpha
        errors[np.isnan(columns["anomaly_score"]) & (errors == "")] = "its score is not a number"
        decisions = np.full(len(errors), "", object)
        if alpha is not None:
            decisions[errors == ""] = "normal"
            decisions[(errors == "") & (columns["p_value"] <= alpha)] = "anomaly"
        return {**columns, "decision": decisions}


class BatchEmbedder(_OverBatches):
    """Embeddings of a batch: as `BatchScorer`, with the arrays of `embed`, float32.

    Added are ``features`` (N, F), ``embeddings``, ``loc`` and ``scale`` (N, D), and the text ``error``.
    """

    dtype = np.float32

    def _prepare(self) -> None:
        dim = (self.run.vje.embedding_dim,)
        self.shapes = {"features": (self.run.vje.feature_dim,), "embeddings": dim, "loc": dim, "scale": dim}

    def _found(self, images: ImageSet) -> Iterator[tuple[Any, Any]]:
        size = self.settings.batch_size
        for encoded in encode_batches(self.run.vje, images, self.run.info.view, batch_size=size):
            yield encoded.indices.numpy(), encoded.to("cpu")._asdict()
