"""What the plots of the mathematics page share."""

import matplotlib.pyplot as plt

from pyro_vje.pages.pictures import BLUE, GREY, VERMILION

__all__ = ["BLUE", "GREEN", "GREY", "VERMILION", "figure"]
GREEN = "#009e73"


def figure(columns=1, height=3.2, **settings):
    """Axes in one row, without the upper and right lines."""
    fig, axes = plt.subplots(
        1, columns, figsize=(4.2 * columns, height), layout="constrained", squeeze=False, **settings
    )
    for ax in axes.flat:
        ax.spines[["top", "right"]].set_visible(False)
    return fig, axes[0]
