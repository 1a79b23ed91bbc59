"""What is learned: the model and guide, their objective, likelihood families, encoders; and running it over images."""

from pyro_vje.model.encoders import ENCODERS, build_encoder, describe_stem, feature_dim
from pyro_vje.model.encoding import (
    Encoded,
    Posteriors,
    cpu_rows,
    encode,
    encode_batches,
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
from pyro_vje.model.vje import MIN_SCALE, VJE, PosteriorNetwork, ViewPair, build_projector, stack_views

__all__ = [
    "ELBO",
    "ENCODERS",
    "FAMILIES",
    "MIN_SCALE",
    "SETTINGS",
    "VJE",
    "Encoded",
    "LikelihoodFamily",
    "LikelihoodSettings",
    "PosteriorNetwork",
    "Posteriors",
    "SymmetricELBO",
    "ViewPair",
    "build_encoder",
    "build_projector",
    "cpu_rows",
    "describe_stem",
    "encode",
    "encode_batches",
    "feature_dim",
    "get_family",
    "images_at_once",
    "in_equal_parts",
    "own_objective",
    "register",
    "stack_views",
]
