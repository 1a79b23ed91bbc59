"""A reparameterisation of latent directions, for Pyro's autoguides and Hamiltonian Monte Carlo."""

from typing import Any

import pyro
import pyro.distributions as dist
import torch
from pyro.infer.reparam.reparam import Reparam

from pyro_vje.distributions.numerics import unit
from pyro_vje.distributions.polar import PolarProduct
from pyro_vje.distributions.student_t import DiagonalStudentT, ProjectedStudentT


class SphereReparam(Reparam):
    """Sample a latent on the unit sphere as the direction of a latent ``{name}_ambient`` in R^D; exact.

    A :class:`ProjectedStudentT` becomes the Student-t vector whose direction it is. Any other law on the sphere with
    a ``log_prob`` becomes a :class:`PolarProduct` with a radius of its own, chi with D + 4 degrees of freedom, which
    keeps away from the origin. Only for latents, as Pyro's ``ProjectedNormalReparam``: an observed site is a
    NotImplementedError. Ours.
    """

    def apply(self, msg: Any) -> Any:
        """Replace the site; Pyro calls this."""
        name, value = msg["name"], msg["value"]
        if msg["is_observed"]:
            raise NotImplementedError(f"SphereReparam does not support observed sites, as {name!r} is")
        fn, event_dim = self._unwrap(msg["fn"])
        if isinstance(fn, ProjectedStudentT):
            size = fn.scale.mean(-1, keepdim=True)  # a common factor changes no direction
            ambient: Any = DiagonalStudentT(fn._df, fn.loc / size, fn.scale / size, validate_args=False)
            length = torch.linalg.vector_norm(ambient.loc, dim=-1, keepdim=True).clamp_min(1.0)
        else:
            dim = fn.event_shape[0]
            like = msg["fn"].mean if value is None else value
            square = dist.Gamma(like.new_full(fn.batch_shape, 0.5 * dim + 2), 0.5)
            root = dist.transforms.PowerTransform(like.new_tensor(0.5))
            radius = dist.TransformedDistribution(square, [root])
            ambient, length = PolarProduct(fn, radius), (dim + 4) ** 0.5
        x = pyro.sample(
            f"{name}_ambient",
            self._wrap(ambient, event_dim),
            obs=None if value is None else value * length,
            infer={"is_observed": False},
        )
        value = unit(x) if value is None else value
        return {"fn": dist.Delta(value, event_dim=event_dim).mask(False), "value": value, "is_observed": True}
