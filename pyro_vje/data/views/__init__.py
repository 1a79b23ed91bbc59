"""Random views of an image, drawn and computed a batch at once."""

from pyro_vje.data.views.two_views import RECIPES, CleanView, Recipe, TwoViews
