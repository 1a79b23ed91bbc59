"""Variational Joint Embedding in Pyro: self-supervised, probabilistic image representations.

The public API, imported on first use so that ``import pyro_vje`` costs nothing::

    VJE, SymmetricELBO, PosteriorNetwork     the model (Pyro model/guide) and its objective
    distributions                            PolarStudentT, ... for any Pyro program
    likelihoods                              named families, and how to register your own
    TrainConfig, ScoreConfig, load_recipe    settings, and those of published results
    train, evaluate, score, embed, export, load_run, ablate
    BatchScorer, BatchEmbedder               the same of batches, for an engine over many machines
"""

from importlib import import_module
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
    "config": "ScoreConfig TrainConfig load_recipe", "export.deploy": "export",
    "model": "likelihoods", "model.encoders": "build_encoder",
    "model.objective": "SymmetricELBO", "model.vje": "VJE PosteriorNetwork", "training.run": "train",
    "representation.evaluation": "evaluate", "runs.folder": "load_run",
}  # fmt: skip


def __getattr__(name: str) -> Any:
    if home := next((home for home, names in _HOMES.items() if name in names.split()), None):
        return getattr(import_module(f"pyro_vje.{home}"), name)
    if name == "distributions":
        return import_module("pyro_vje.distributions")
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted({*__all__, *(name for name in globals() if name.startswith("__"))})
