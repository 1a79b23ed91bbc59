"""What a person looks at: pictures and the report."""

from pyro_vje.pages.pictures import (
    plot_direction_radius,
    plot_embedding,
    plot_rejection,
    plot_score_histogram,
    plot_strangest,
    plot_training,
)
from pyro_vje.pages.report import render_report

__all__ = [
    "plot_direction_radius",
    "plot_embedding",
    "plot_rejection",
    "plot_score_histogram",
    "plot_strangest",
    "plot_training",
    "render_report",
]
