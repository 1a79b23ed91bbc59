"""What is learned: the model and guide, their objective, likelihood families, encoders; and running it over images."""

from pyro_vje.model.encoders import ENCODERS, build_encoder, describe_stem, feature_dim
from pyro_vje.model.encoding import (
    Encoded,
    Posteriors,
    cpu_rows,
    encode,
    encode_batches,
    encode_features,
    images_at_once,
    in_equal_parts,
)
from pyro_vje.model.likelihoods import (
    FAMILIES,
    SETTINGS,
    LikelihoodFamily,
    LikelihoodSettings,
    get_family,
    register,
)
from pyro_vje.model.objective import ELBO, SymmetricELBO, own_objective
from pyro_vje.model.projector import PROJECTORS, Whitening, build_projector
from pyro_vje.model.vje import MIN_SCALE, VJE, PosteriorNetwork, ViewPair, stack_views

__all__ = [
    "ELBO",
    "ENCODERS",
    "FAMILIES",
    "MIN_SCALE",
    "PROJECTORS",
    "SETTINGS",
    "VJE",
    "Encoded",
    "LikelihoodFamily",
    "LikelihoodSettings",
    "PosteriorNetwork",
    "Posteriors",
    "SymmetricELBO",
    "ViewPair",
    "Whitening",
    "build_encoder",
    "build_projector",
    "cpu_rows",
    "describe_stem",
    "encode",
    "encode_batches",
    "encode_features",
    "feature_dim",
    "get_family",
    "images_at_once",
    "in_equal_parts",
    "own_objective",
    "register",
    "stack_views",
]
