"""Data sets, views and loaders; knows no model."""

from pyro_vje.data.datasets import DATASETS, load_dataset
from pyro_vje.data.decode import ImageError, decode_image, list_images
from pyro_vje.data.imageset import ImageSet, LazyImages, free_memory
from pyro_vje.data.loaders import ResidentLoader, StreamingLoader, derive_seed, make_loader
from pyro_vje.data.views import RECIPES, CleanView, Recipe, TwoViews, views_for

__all__ = [
    "DATASETS",
    "RECIPES",
    "CleanView",
    "ImageError",
    "ImageSet",
    "LazyImages",
    "Recipe",
    "ResidentLoader",
    "StreamingLoader",
    "TwoViews",
    "decode_image",
    "derive_seed",
    "free_memory",
    "list_images",
    "load_dataset",
    "make_loader",
    "views_for",
]
