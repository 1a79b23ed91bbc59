"""How good the features are."""

from pyro_vje.representation.evaluation import evaluate, format_table, load_split, pixels, probe
from pyro_vje.representation.probes import probe_views, sgd_probe

__all__ = [
    "evaluate",
    "format_table",
    "load_split",
    "pixels",
    "probe",
    "probe_views",
    "sgd_probe",
]
