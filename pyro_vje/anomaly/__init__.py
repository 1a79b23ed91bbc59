"""Which image is strange: scores, likelihood parts, from images to rows to table.

Only the scores' names and meanings are imported at once, so that ``--help`` can tell them.
"""

from importlib import import_module
from typing import Any

from pyro_vje.anomaly.scores import SCORES, Score, get_score

_HOMES = {"LikelihoodParts": "parts", "Scorer": "parts", "embed": "table", "score": "table"}
_HOMES |= {"ScoreResult": "table", "calibrate": "inspection", "inspect": "inspection"}
_HOMES |= {"learn_maps": "maps", "BatchEmbedder": "batches", "BatchScorer": "batches"}
__all__ = ["SCORES", "Score", "get_score", *_HOMES]


def __getattr__(name: str) -> Any:
    if name in _HOMES:
        return getattr(import_module(f"{__name__}.{_HOMES[name]}"), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
