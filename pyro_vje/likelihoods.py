"""`pyro_vje.model.likelihoods` under its short name."""

import sys

from pyro_vje.model import likelihoods

sys.modules[__name__] = likelihoods
