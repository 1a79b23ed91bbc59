"""Two random views of an image."""

from pyro_vje.data.views.two_views import RECIPES, CleanView, Recipe, TwoViews, ViewParameters, views_for

__all__ = ["RECIPES", "CleanView", "Recipe", "TwoViews", "ViewParameters", "views_for"]
