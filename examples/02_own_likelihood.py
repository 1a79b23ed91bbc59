"""
A likelihood of your own
========================

A likelihood family is a function of a posterior sample, the shared scale and the settings that returns a Pyro
distribution over embeddings. Here is one in three lines, compared with the paper's on scikit-learn's digits.
"""

import tempfile

import pyro.distributions as dist
import torch

from pyro_vje import TrainConfig, ablate


# %%
# The family
# ----------
#
# ``loc`` is a sample z of the latent and ``scale`` the posterior's standard deviation, of shape ``(..., D)``
# each; the last dimension must be the event. One that does not fit is refused before training starts, with a
# line that says why. This one is Huber's contaminated Gaussian: one feature in ten, whichever, is five times as
# wide.
def contaminated(loc, scale, settings):
    wide = torch.stack([torch.ones_like(scale), torch.full_like(scale, 5.0)], -1)
    share = dist.Categorical(torch.tensor([0.9, 0.1], device=loc.device))
    parts = dist.Normal(loc.unsqueeze(-1), scale.unsqueeze(-1) * wide)
    return dist.MixtureSameFamily(share, parts).to_event(1)


# %%
# The comparison
# --------------
#
# It is named ``module:function``. In a project of yours it lies in a file, ``my_family:contaminated``, and the
# same grid is one command: ``pyro-vje ablate --likelihood polar-student-t --likelihood my_family:contaminated
# ...``. Every cell is a run folder with its weights; the command goes on where it was stopped, and more values
# may be added.
base = TrainConfig(dataset="digits", epochs=2, hidden_dim=128, knn_every=0)
axes = {"likelihood": ["polar-student-t", "__main__:contaminated"], "kl_weight": [0.03], "seed": [0]}
result = ablate(base, axes, tempfile.mkdtemp())
print(result.table)

# %%
# Two epochs and one seed on 1,370 small images are a test that a family trains, not a comparison;
# :doc:`/results/study` is one, with what it takes to tell families apart.
#
# A run folder never imports code by itself. To score with such a run, say that you trust the name that it
# holds: ``pyro-vje score --ckpt RUN --trust-plugins``. To make a family of yours known by a plain name wherever
# your package is installed, declare an entry point in the group ``pyro_vje.likelihoods``
# (:doc:`/howto/extend`).

# sphinx_gallery_thumbnail_path = 'images/controls.png'
