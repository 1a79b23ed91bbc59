"""What holds for any shapes and parameters, searched for counterexamples.

In ``make test`` the examples are always the same; ``HYPOTHESIS_PROFILE=thorough`` draws many others.
"""

import os

import pyro.distributions as dist
import pytest
import torch
from distributions.oracles import integrate, log_projected_student_t
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from pyro.poutine.messenger import Messenger
from scipy import stats
from torch import nn
from torch.nn.functional import normalize

from pyro_vje import VJE, SymmetricELBO, distributions
from pyro_vje.anomaly.parts import Scorer
from pyro_vje.distributions import (
    DiagonalStudentT,
    PolarProduct,
    PolarStudentT,
    PowerSpherical,
    ProjectedStudentT,
    SphericalCauchy,
    VonMisesFisher,
)
from pyro_vje.model.encoding import Encoded
from pyro_vje.model.likelihoods import FAMILIES

common = {"deadline": None, "suppress_health_check": list(HealthCheck)}
settings.register_profile("ci", derandomize=True, max_examples=15, database=None, **common)
settings.register_profile("thorough", max_examples=500, **common)
settings.load_profile(os.environ.get("HYPOTHESIS_PROFILE", "ci"))


def exact_polar(df, loc, scale):
    return PolarStudentT(
        df, loc, scale, direction="projected", radius="log-student-t", unit_radius=loc.shape[-1] ** 0.5
    )


def polar_product(df, loc, scale):
    radius = dist.LogNormal(loc.norm(dim=-1).log(), scale.mean(-1))
    return PolarProduct(ProjectedStudentT(df, loc, scale), radius)


SYMMETRIC = (PowerSpherical, SphericalCauchy, VonMisesFisher)
SPHERES = (ProjectedStudentT, *SYMMETRIC)
POLAR = (PolarStudentT, exact_polar, polar_product)
MAKERS = (*SPHERES, *POLAR, DiagonalStudentT)
DRAWN = tuple(make for make in MAKERS if make is not PolarStudentT)
"""Those that can be sampled; the paper's subdensity cannot."""
# What is new among the distributions is put among the makers; the uniform one has no parameters to vary.
exported = [getattr(distributions, name) for name in distributions.__all__]
assert {make for make in (*MAKERS, PolarProduct, distributions.HypersphericalUniform) if isinstance(make, type)} == {
    thing for thing in exported if isinstance(thing, type) and issubclass(thing, dist.Distribution)
}
every_maker = pytest.mark.parametrize("make", MAKERS)


@st.composite
def cases(draw, max_dim=300, isotropic=False, batches=((), (1,), (3,), (2, 3)), least_scale=0.03):
    """Numbers, from which `build` makes a distribution and values; tensors come from a seed, which shrinks well."""
    return {
        "dim": draw(st.integers(2, max_dim)),
        "batch": draw(st.sampled_from(batches)),
        "df": draw(st.floats(0.5, 300) | st.sampled_from([1.0, 2.0])),
        "spread": draw(st.floats(least_scale, 30)),
        "norm": draw(st.floats(0.01, 100)),
        "isotropic": isotropic,
        "seed": draw(st.integers(0, 10_000)),
    }


def build(make, case, dtype=torch.float64):
    """Keyword arguments of ``make`` for a case, and values: near the location, opposite, anywhere."""
    generator = torch.Generator().manual_seed(case["seed"])

    def randn(*shape):
        return torch.randn(*shape, generator=generator, dtype=torch.float64)

    dim, batch = case["dim"], case["batch"]
    loc = normalize(randn(*batch, dim), dim=-1)
    scale = case["spread"] * torch.ones(*batch, dim, dtype=torch.float64)
    if not case["isotropic"]:
        scale = scale * (0.5 * randn(*batch, dim)).exp()
    if make in SYMMETRIC:
        concentration = torch.full(batch, case["spread"], dtype=torch.float64)
        arguments = {"loc": loc, "concentration": concentration / (1 + concentration * (make is SphericalCauchy))}
    else:
        arguments = {
            "df": torch.full(batch, case["df"], dtype=torch.float64),
            "loc": case["norm"] * loc,
            "scale": scale,
        }
    centre = arguments["loc"]
    near = centre + 1e-3 * centre.norm(dim=-1, keepdim=True) * randn(*batch, dim)
    # Opposite its centre the power spherical density is zero: there is no finite number to compare.
    opposite = -centre if make is not PowerSpherical else centre.roll(1, -1)
    values = torch.stack([near, opposite, randn(*batch, dim)])
    if make in SPHERES:
        values = normalize(values, dim=-1)
    arguments = {name: tensor.to(dtype) for name, tensor in arguments.items()}
    values = values.to(dtype)
    if make in SPHERES and dtype == torch.float32:
        values = normalize(values, dim=-1)
    if make in SYMMETRIC and dtype == torch.float32:
        arguments["loc"] = normalize(arguments["loc"], dim=-1)
    return arguments, values


@every_maker
@given(case=cases(least_scale=1e-3))
def test_log_prob_is_finite_with_finite_gradients_and_has_the_batchs_shape(make, case):
    arguments, values = build(make, case)
    for name in arguments.keys() - {"df"}:
        arguments[name] = arguments[name].requires_grad_()
    log_prob = make(**arguments).log_prob(values)
    assert log_prob.shape == (3, *case["batch"])
    assert log_prob.isfinite().all()
    gradients = torch.autograd.grad(log_prob.sum(), [arguments[name] for name in sorted(arguments.keys() - {"df"})])
    assert all(gradient.isfinite().all() for gradient in gradients)


@pytest.mark.parametrize("make", DRAWN)
@given(case=cases(max_dim=40))
def test_samples_lie_in_the_support_with_finite_log_prob(make, case):
    arguments, _ = build(make, case)
    distribution = make(**arguments)
    torch.manual_seed(case["seed"])
    sample = distribution.sample((5,))
    assert sample.shape == (5, *case["batch"], case["dim"])
    assert distribution.support.check(sample).all()
    assert distribution.log_prob(sample).isfinite().all()


@every_maker
@given(case=cases(batches=((), (3,), (1, 3))), extra=st.sampled_from([(), (2,), (4, 2)]))
def test_expand_changes_shapes_only(make, case, extra):
    arguments, values = build(make, case)
    distribution = make(**arguments)
    expanded = distribution.expand((*extra, *case["batch"]))
    assert (expanded.batch_shape, expanded.event_shape) == ((*extra, *case["batch"]), (case["dim"],))
    for value in values:
        expected = distribution.log_prob(value).broadcast_to(expanded.batch_shape)
        torch.testing.assert_close(expanded.log_prob(value), expected)


@every_maker
@given(case=cases())
def test_float32_says_what_float64_says(make, case):
    arguments, values = build(make, case, torch.float32)
    single = make(**arguments).log_prob(values)
    arguments = {name: tensor.double() for name, tensor in arguments.items()}
    values = values.double()
    if make in SPHERES:
        values = normalize(values, dim=-1)
    if make in SYMMETRIC:
        arguments["loc"] = normalize(arguments["loc"], dim=-1)
    double = make(**arguments).log_prob(values)
    torch.testing.assert_close(single.double(), double, rtol=1e-4, atol=2e-4 * case["dim"])


@every_maker
@given(case=cases(max_dim=100, isotropic=True))
def test_rotation_of_everything_changes_nothing_where_the_scale_is_isotropic(make, case):
    arguments, values = build(make, case)
    generator = torch.Generator().manual_seed(case["seed"] + 1)
    random = torch.randn(case["dim"], case["dim"], generator=generator, dtype=torch.float64)
    rotation = torch.linalg.qr(random)[0]
    before = make(**arguments).log_prob(values)
    after = make(**{**arguments, "loc": arguments["loc"] @ rotation}).log_prob(values @ rotation)
    torch.testing.assert_close(after, before, rtol=1e-6, atol=1e-6)


@every_maker
@given(case=cases(max_dim=100))
def test_the_order_of_features_is_of_no_account(make, case):
    arguments, values = build(make, case)
    order = torch.randperm(case["dim"], generator=torch.Generator().manual_seed(case["seed"]))
    moved = {name: arguments[name][..., order] for name in arguments.keys() & {"loc", "scale"}}
    before = make(**arguments).log_prob(values)
    torch.testing.assert_close(
        make(**{**arguments, **moved}).log_prob(values[..., order]), before, rtol=1e-7, atol=1e-7
    )


@given(case=cases(), factor=st.floats(0.01, 100))
def test_a_change_of_units_changes_the_ambient_density_by_its_jacobian_and_the_projected_one_not(case, factor):
    arguments, values = build(DiagonalStudentT, case)
    scaled = {**arguments, "loc": factor * arguments["loc"], "scale": factor * arguments["scale"]}
    before, after = (DiagonalStudentT(**a).log_prob(v) for a, v in ((arguments, values), (scaled, factor * values)))
    torch.testing.assert_close(after, before - case["dim"] * torch.tensor(factor, dtype=torch.float64).log())
    directions = normalize(values, dim=-1)
    before, after = (ProjectedStudentT(**a).log_prob(directions) for a in (arguments, scaled))
    torch.testing.assert_close(after, before)


@pytest.mark.parametrize("make", POLAR)
@given(case=cases(), factor=st.floats(1e-3, 1e3))
def test_the_direction_does_not_see_the_length_of_the_embedding(make, case, factor):
    arguments, values = build(make, case)
    distribution = make(**arguments)
    before, after = (distribution.log_prob_direction(t) for t in (values, factor * values))
    torch.testing.assert_close(after, before, rtol=1e-9, atol=1e-9)
    # ... and all of the rest is the radius and the Jacobian
    radius = values.norm(dim=-1)
    rest = distribution.log_prob(values) - before
    expected = distribution.log_prob_radius(radius) - (case["dim"] - 1) * radius.log()
    torch.testing.assert_close(rest, expected, rtol=1e-9, atol=1e-8)


# Independent oracles --------------------------------------------------------------------------------------------------


@settings(max_examples=8)
@given(case=cases(max_dim=60, batches=((),)))
def test_projected_student_t_is_that_of_40_digits(case):
    arguments, values = build(ProjectedStudentT, case)
    found = ProjectedStudentT(**arguments).log_prob(values)
    loc, scale = arguments["loc"].tolist(), arguments["scale"].tolist()
    expected = [float(log_projected_student_t(case["df"], loc, scale, value.tolist())) for value in values]
    torch.testing.assert_close(found, torch.tensor(expected, dtype=torch.float64), rtol=1e-6, atol=1e-6)


@given(case=cases(max_dim=60, batches=((),)))
def test_ambient_student_t_and_von_mises_fisher_are_scipys(case):
    arguments, values = build(DiagonalStudentT, case)
    oracle = stats.multivariate_t(arguments["loc"].numpy(), arguments["scale"].square().diag().numpy(), case["df"])
    found = DiagonalStudentT(**arguments).log_prob(values)
    torch.testing.assert_close(found, torch.as_tensor(oracle.logpdf(values.numpy())), rtol=1e-6, atol=1e-6)
    arguments, values = build(VonMisesFisher, case)
    oracle = stats.vonmises_fisher(arguments["loc"].numpy(), arguments["concentration"].item())
    found = VonMisesFisher(**arguments).log_prob(values)
    torch.testing.assert_close(found, torch.as_tensor(oracle.logpdf(values.numpy())), rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("make", SPHERES)
@settings(max_examples=8)
@given(case=cases(max_dim=3, batches=((),), least_scale=0.3))
def test_laws_on_circle_and_sphere_integrate_to_one(make, case):
    wide = {name: min(case[name], most) for name, most in {"norm": 1.0, "df": 30.0, "spread": 4.0}.items()}
    case = {**case, **wide}  # laws that a hundred nodes resolve
    arguments, _ = build(make, case)
    assert integrate(make(**arguments).log_prob, case["dim"], 100) == pytest.approx(1, abs=1e-3)


# The objective --------------------------------------------------------------------------------------------------------


class GivenNoise(Messenger):
    """The latents are loc + noise · scale for a given noise."""

    def __init__(self, noise):
        super().__init__()
        self.noise = noise

    def _pyro_sample(self, msg):
        if msg["name"] == "z" and not msg["done"] and msg["value"] is None:
            base = msg["fn"].base_dist
            msg["value"], msg["done"] = base.loc + self.noise * base.scale, True


@st.composite
def models(draw):
    """A small model, two views of a batch, and noise."""
    seed, batch, dim = draw(st.integers(0, 10_000)), draw(st.integers(2, 7)), draw(st.integers(3, 12))
    torch.manual_seed(seed)
    vje = VJE(
        nn.Linear(6, dim),
        dim,
        hidden_dim=8,
        likelihood=draw(st.sampled_from(list(FAMILIES))),
        df=draw(st.floats(1, 50)),
        unit_radius=draw(st.sampled_from(["1", "sqrt-d"])),
        radius=draw(st.sampled_from(["student-t", "log-student-t"])),
        radius_scale=draw(st.sampled_from(["learned", "shared"])),
        shared_variance=draw(st.booleans()),
    ).double()
    return vje, torch.randn(2, batch, 6, dtype=torch.float64), torch.randn(2, batch, dim, dtype=torch.float64)


def loss_and_gradients(vje, views, noise, kl_weight):
    elbo = SymmetricELBO(kl_weight=kl_weight)(vje.model, vje.guide)
    with GivenNoise(noise):
        loss = elbo(views)
    return loss, torch.autograd.grad(loss, [p for p in vje.parameters() if p.requires_grad], allow_unused=True)


def assert_same(one, other):
    torch.testing.assert_close(one[0], other[0], rtol=1e-8, atol=1e-8)
    for a, b in zip(one[1], other[1], strict=True):
        assert (a is None) == (b is None)
        if a is not None:
            torch.testing.assert_close(a, b, rtol=1e-6, atol=1e-7)


@given(parts=models(), weight=st.floats(0, 2), seed=st.integers(0, 1000))
def test_the_objective_does_not_see_the_order_of_the_views_or_of_the_images(parts, weight, seed):
    vje, views, noise = parts
    before = loss_and_gradients(vje, views, noise, weight)
    assert before[0].isfinite()
    assert_same(loss_and_gradients(vje, views.flip(0), noise.flip(0), weight), before)
    order = torch.randperm(views.shape[1], generator=torch.Generator().manual_seed(seed))
    assert_same(loss_and_gradients(vje, views[:, order], noise[:, order], weight), before)


@given(parts=models(), seed=st.integers(0, 1000), factor=st.floats(0.01, 100))
def test_a_score_is_the_images_own_and_its_direction_has_no_length(parts, seed, factor):
    """Rows move with the images, do not depend on which others there are, and the direction is a direction's."""
    vje, views, _ = parts
    vje.eval().requires_grad_(False)
    embeddings = vje.embed(views.flatten(0, 1))
    posteriors = Encoded(embeddings, *vje.posterior(embeddings))
    scorer = Scorer(vje, num_particles=4)
    scorer.noise = scorer.noise.double()
    whole = scorer.parts(posteriors)
    order = torch.randperm(len(embeddings), generator=torch.Generator().manual_seed(seed))
    some = order[: len(order) // 2 + 1]
    parts = scorer.parts(Encoded(*(tensor[some] for tensor in posteriors[:3])))
    longer = scorer.parts(posteriors._replace(embeddings=factor * embeddings))
    for name in ("log_likelihood", "log_direction", "log_radius", "kl", "variance"):
        values = getattr(whole, name)
        torch.testing.assert_close(getattr(parts, name), values[some], rtol=1e-10, atol=1e-10, equal_nan=True)
    torch.testing.assert_close(longer.log_direction, whole.log_direction, rtol=1e-9, atol=1e-9, equal_nan=True)
