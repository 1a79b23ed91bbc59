"""How good the features are."""

from pyro_vje.representation.evaluation import evaluate, format_table, probe, probe_views, sgd_probe

__all__ = ["evaluate", "format_table", "probe", "probe_views", "sgd_probe"]
