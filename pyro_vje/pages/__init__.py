"""What a person looks at: pictures and the report."""

from pyro_vje.pages.pictures import (
    BLUE,
    GREY,
    PALETTE,
    VERMILION,
    new_figure,
    plot_direction_radius,
    plot_embedding,
    plot_rejection,
    plot_score_histogram,
    plot_strangest,
    plot_training,
    plot_views,
    save,
    style,
)
from pyro_vje.pages.report import ReportData, render_report

__all__ = [
    "BLUE",
    "GREY",
    "PALETTE",
    "VERMILION",
    "ReportData",
    "new_figure",
    "plot_direction_radius",
    "plot_embedding",
    "plot_rejection",
    "plot_score_histogram",
    "plot_strangest",
    "plot_training",
    "plot_views",
    "render_report",
    "save",
    "style",
]
