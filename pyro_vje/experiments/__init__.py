"""What one compares: ablations, anomaly benchmarks, baselines."""

from pyro_vje.experiments.ablation import AblationResult, ablate
from pyro_vje.experiments.baselines import DETECTORS
from pyro_vje.experiments.cells import Cell, Cells, train_cell
from pyro_vje.experiments.protocols import ProtocolResult, all_scores, one_class, ood

__all__ = [
    "DETECTORS",
    "AblationResult",
    "Cell",
    "Cells",
    "ProtocolResult",
    "ablate",
    "all_scores",
    "one_class",
    "ood",
    "train_cell",
]
