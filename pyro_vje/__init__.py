"""Variational Joint Embedding in Pyro: self-supervised, probabilistic image representations.

The public API, imported on first use so that ``import pyro_vje`` costs nothing::

    VJE, SymmetricELBO, PosteriorNetwork     the model (Pyro model/guide) and its objective
    distributions                            PolarStudentT, ... for any Pyro program
    likelihoods                              named families, and how to register your own
    TrainConfig, train, evaluate, score, embed, export, load_run, ablate
    load_recipe                              settings of published results
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from pyro_vje import distributions, likelihoods
    from pyro_vje.ablation import ablate
    from pyro_vje.config import TrainConfig, load_recipe
    from pyro_vje.encoders import build_encoder
    from pyro_vje.evaluation import evaluate
    from pyro_vje.exporting import export
    from pyro_vje.model import VJE, PosteriorNetwork
    from pyro_vje.objective import SymmetricELBO
    from pyro_vje.runs import load_run
    from pyro_vje.scoring import embed, score
    from pyro_vje.training import train

__version__ = "0.1.0"

__all__ = [
    "VJE",
    "PosteriorNetwork",
    "SymmetricELBO",
    "TrainConfig",
    "ablate",
    "build_encoder",
    "distributions",
    "embed",
    "evaluate",
    "export",
    "likelihoods",
    "load_recipe",
    "load_run",
    "score",
    "train",
]

_HOMES = {
    "VJE": "model",
    "PosteriorNetwork": "model",
    "SymmetricELBO": "objective",
    "TrainConfig": "config",
    "ablate": "ablation",
    "build_encoder": "encoders",
    "embed": "scoring",
    "evaluate": "evaluation",
    "export": "exporting",
    "load_recipe": "config",
    "load_run": "runs",
    "score": "scoring",
    "train": "training",
}


def __getattr__(name: str) -> Any:
    if name in ("distributions", "likelihoods"):
        return import_module(f"pyro_vje.{name}")
    if name in _HOMES:
        return getattr(import_module(f"pyro_vje.{_HOMES[name]}"), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


def __dir__() -> list[str]:
    dunders = (name for name in globals() if name.startswith("__"))  # the rest is what this file imports
    return sorted({*__all__, *dunders})
