"""Variational Joint Embedding in Pyro: self-supervised, probabilistic image representations.

The public API, imported on first use so that ``import pyro_vje`` costs nothing::

    VJE, SymmetricELBO, PosteriorNetwork     the model (Pyro model/guide) and its objective
    distributions                            PolarStudentT, ... for any Pyro program
    likelihoods                              named families, and how to register your own
    TrainConfig, ScoreConfig, load_recipe    settings, and those of published results
    train, evaluate, score, embed, export, load_run, ablate
"""

from __future__ import annotations

import sys
from importlib import import_module
from importlib.abc import Loader, MetaPathFinder
from importlib.machinery import ModuleSpec
from types import ModuleType
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from pyro_vje import distributions as distributions
    from pyro_vje.anomaly.inspection import calibrate as calibrate
    from pyro_vje.anomaly.inspection import inspect as inspect
    from pyro_vje.anomaly.table import embed as embed
    from pyro_vje.anomaly.table import score as score
    from pyro_vje.config import ScoreConfig as ScoreConfig
    from pyro_vje.config import TrainConfig as TrainConfig
    from pyro_vje.config import load_recipe as load_recipe
    from pyro_vje.experiments.ablation import ablate as ablate
    from pyro_vje.export.deploy import export as export
    from pyro_vje.model import likelihoods as likelihoods
    from pyro_vje.model.encoders import build_encoder as build_encoder
    from pyro_vje.model.objective import SymmetricELBO as SymmetricELBO
    from pyro_vje.model.vje import VJE as VJE
    from pyro_vje.model.vje import PosteriorNetwork as PosteriorNetwork
    from pyro_vje.representation.evaluation import evaluate as evaluate
    from pyro_vje.runs.folder import load_run as load_run
    from pyro_vje.training.run import train as train

__version__ = "0.1.0"

_HOMES = {
    "anomaly.inspection": ("calibrate", "inspect"),
    "anomaly.table": ("embed", "score"),
    "config": ("ScoreConfig", "TrainConfig", "load_recipe"),
    "experiments.ablation": ("ablate",),
    "export.deploy": ("export",),
    "model.encoders": ("build_encoder",),
    "model.objective": ("SymmetricELBO",),
    "model.vje": ("VJE", "PosteriorNetwork"),
    "representation.evaluation": ("evaluate",),
    "runs.folder": ("load_run",),
    "training.run": ("train",),
}
__all__ = sorted(["distributions", "likelihoods", *(name for names in _HOMES.values() for name in names)])
_MOVED = {
    "calibration": "metrics.conformal",
    "encoders": "model.encoders",
    "likelihoods": "model.likelihoods",
    "objective": "model.objective",
    "scores": "anomaly.scores",
    "scoring": "anomaly.table",
    "evaluation": "representation.evaluation",
    "ablation": "experiments.ablation",
    "protocols": "experiments.protocols",
    "detectors": "experiments.baselines",
    "report": "pages.report",
    "pictures": "pages.pictures",
}
"""Modules of version 0.1 that stand in a folder now and keep their names: ``import pyro_vje.likelihoods``."""


class _Moved(MetaPathFinder, Loader):
    def find_spec(self, name: str, path: Any, target: Any = None) -> ModuleSpec | None:
        return ModuleSpec(name, self) if name.removeprefix("pyro_vje.") in _MOVED else None

    def exec_module(self, module: ModuleType) -> None:
        home = _MOVED[module.__name__.removeprefix("pyro_vje.")]
        sys.modules[module.__name__] = import_module(f"pyro_vje.{home}")


sys.meta_path.append(_Moved())


def __getattr__(name: str) -> Any:
    for home, names in _HOMES.items():
        if name in names:
            return getattr(import_module(f"pyro_vje.{home}"), name)
    if name == "distributions" or name in _MOVED:
        return import_module(f"pyro_vje.{name}")
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


def __dir__() -> list[str]:
    dunders = (name for name in globals() if name.startswith("__"))  # the rest is what this file imports
    return sorted({*__all__, *dunders})
