"""How good the features are."""

from pyro_vje.representation.evaluation import evaluate, format_table, probe
from pyro_vje.representation.probes import probe_views, sgd_probe

__all__ = ["evaluate", "format_table", "probe", "probe_views", "sgd_probe"]
