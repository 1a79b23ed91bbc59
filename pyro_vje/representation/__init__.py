"""How good the features are."""

from pyro_vje.representation.evaluation import evaluate, features_of, format_table, load_split, pixels, probe
from pyro_vje.representation.probes import probe_views, sgd_probe

__all__ = [
    "evaluate",
    "features_of",
    "format_table",
    "load_split",
    "pixels",
    "probe",
    "probe_views",
    "sgd_probe",
]
