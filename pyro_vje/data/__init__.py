"""Data sets, views and loaders; knows no model."""

from pyro_vje.data.datasets import DATASETS, Dataset, Request, find_dataset, load_dataset, views_for
from pyro_vje.data.decode import ImageError, decode_image, list_images
from pyro_vje.data.imageset import ImageSet, LazyImages, counted, free_memory
from pyro_vje.data.loaders import EpochOrder, derive_seed, make_loader
from pyro_vje.data.splits import load_train_set, warn_if_shared
from pyro_vje.data.views import RECIPES, CleanView, Recipe, TwoViews
