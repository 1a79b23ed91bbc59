"""One run: from settings to a run folder."""

from pyro_vje.training.module import Pretraining
from pyro_vje.training.monitor import EpochReport, TrainingDiverged
from pyro_vje.training.run import choose_precision, train
