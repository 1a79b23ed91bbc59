"""What one compares: ablations, anomaly benchmarks, baselines."""

from pyro_vje.experiments.ablation import ablate
from pyro_vje.experiments.cells import Cell, Cells, Comparison
from pyro_vje.experiments.protocols import DETECTORS, all_scores, one_class, ood
