"""Variational Joint Embedding in Pyro: self-supervised, probabilistic image representations.

The public API, imported on first use so that ``import pyro_vje`` costs nothing::

    VJE, SymmetricELBO, PosteriorNetwork     the model (Pyro model/guide) and its objective
    distributions                            PolarStudentT, ... for any Pyro program
    likelihoods                              named families, and how to register your own
    TrainConfig, ScoreConfig, load_recipe    settings, and those of published results
    train, evaluate, score, embed, export, load_run, ablate
    BatchScorer, BatchEmbedder               the same of batches, for an engine over many machines
"""

import sys
from importlib import import_module
from importlib.abc import Loader, MetaPathFinder
from importlib.machinery import ModuleSpec
from types import ModuleType
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from pyro_vje import distributions
    from pyro_vje.anomaly.batches import BatchEmbedder, BatchScorer
    from pyro_vje.anomaly.inspection import calibrate, inspect
    from pyro_vje.anomaly.maps import learn_maps
    from pyro_vje.anomaly.table import embed, score
    from pyro_vje.config import ScoreConfig, TrainConfig, load_recipe
    from pyro_vje.experiments.ablation import ablate
    from pyro_vje.export.deploy import export
    from pyro_vje.model import likelihoods
    from pyro_vje.model.encoders import build_encoder
    from pyro_vje.model.objective import SymmetricELBO
    from pyro_vje.model.vje import VJE, PosteriorNetwork
    from pyro_vje.representation.evaluation import evaluate
    from pyro_vje.runs.folder import load_run
    from pyro_vje.training.run import train

__version__ = "0.1.0"
__all__ = [
    "VJE", "BatchEmbedder", "BatchScorer", "PosteriorNetwork", "ScoreConfig", "SymmetricELBO", "TrainConfig", "ablate",
    "build_encoder", "calibrate", "distributions", "embed", "evaluate", "export", "inspect", "learn_maps",
    "likelihoods", "load_recipe", "load_run", "score", "train",
]  # fmt: skip
_HOMES = {
    "anomaly.batches": "BatchEmbedder BatchScorer", "anomaly.inspection": "calibrate inspect",
    "anomaly.maps": "learn_maps", "anomaly.table": "embed score",
    "experiments.ablation": "ablate",
    "config": "ScoreConfig TrainConfig load_recipe", "export.deploy": "export", "model.encoders": "build_encoder",
    "model.objective": "SymmetricELBO", "model.vje": "VJE PosteriorNetwork", "training.run": "train",
    "representation.evaluation": "evaluate", "runs.folder": "load_run",
}  # fmt: skip


_MOVED = {
    "ablation": "experiments.ablation", "calibration": "metrics.detection", "detectors": "experiments.protocols",
    "encoders": "model.encoders", "evaluation": "representation.evaluation", "likelihoods": "model.likelihoods",
    "objective": "model.objective", "pictures": "pages.pictures", "protocols": "experiments.protocols",
    "report": "pages.report", "scores": "anomaly.scores", "scoring": "anomaly.table",
}  # fmt: skip
"""Modules of version 0.1 that stand in a folder now and keep their names: ``import pyro_vje.likelihoods``."""


class _Moved(MetaPathFinder, Loader):
    def find_spec(self, name: str, path: Any, target: Any = None) -> ModuleSpec | None:
        return ModuleSpec(name, self) if name.removeprefix("pyro_vje.") in _MOVED else None

    def exec_module(self, module: ModuleType) -> None:
        home = _MOVED[module.__name__.removeprefix("pyro_vje.")]
        sys.modules[module.__name__] = import_module(f"pyro_vje.{home}")


sys.meta_path.append(_Moved())


def __getattr__(name: str) -> Any:
    if home := next((home for home, names in _HOMES.items() if name in names.split()), None):
        return getattr(import_module(f"pyro_vje.{home}"), name)
    if name == "distributions" or name in _MOVED:
        return import_module(f"pyro_vje.{name}")
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted({*__all__, *(name for name in globals() if name.startswith("__"))})
