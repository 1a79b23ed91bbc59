"""What is learned: the model and guide, their objective, likelihood families, encoders; and running it over images."""

from pyro_vje.model.build import build_head, build_model
from pyro_vje.model.encoders import ENCODERS, build_encoder, feature_dim
from pyro_vje.model.encoding import Encoded, encode, encode_batches, encode_features
from pyro_vje.model.likelihoods import FAMILIES, LikelihoodFamily, LikelihoodSettings, get_family, register
from pyro_vje.model.objective import ELBO, SymmetricELBO, own_objective
from pyro_vje.model.projector import Whitening, build_projector, whitened_dim
from pyro_vje.model.vje import VJE, PosteriorNetwork, ViewPairs, stack_views
