"""Every distribution as a citizen of Pyro and PyTorch, and the ambient Student-t."""

import copy
import math

import pyro
import pyro.distributions as dist
import pytest
import torch
from oracles import neighbor_p_value
from pyro import poutine
from pyro.infer import SVI, Predictive, Trace_ELBO
from pyro.infer.autoguide import AutoDelta

from pyro_vje.distributions import (
    DiagonalStudentT,
    PolarStudentT,
    PowerSpherical,
    ProjectedStudentT,
    SphericalCauchy,
    VonMisesFisher,
)

DIM = 4


def arguments(family, batch=(), dtype=torch.float32):
    """Keyword arguments with the widest shapes that the family takes."""
    loc = torch.randn(*batch, DIM, dtype=dtype)
    if family in (PowerSpherical, SphericalCauchy, VonMisesFisher):
        return {"loc": torch.nn.functional.normalize(loc, dim=-1), "concentration": torch.rand(batch, dtype=dtype)}
    return {
        "df": torch.rand(batch, dtype=dtype) * 5 + 1,
        "loc": loc,
        "scale": torch.rand(*batch, DIM, dtype=dtype) + 0.3,
    }


def exact_polar(**keywords):
    return PolarStudentT(**keywords, direction="projected", radius="log-student-t")


SPHERES = (ProjectedStudentT, PowerSpherical, SphericalCauchy, VonMisesFisher)
CLASSES = (*SPHERES, DiagonalStudentT, PolarStudentT)
MAKERS = (*SPHERES, DiagonalStudentT, exact_polar)


@pytest.mark.parametrize("family", CLASSES)
def test_infer_shapes(family):
    shapes = {name: tuple(value.shape) for name, value in arguments(family, (3, 2)).items()}
    made = family(**arguments(family, (3, 2)))
    assert family.infer_shapes(**shapes) == (made.batch_shape, made.event_shape) == ((3, 2), (DIM,))
    for name in ("df", "concentration"):
        if name in shapes:
            assert family.infer_shapes(**(shapes | {name: (4, 1, 1)})) == ((4, 3, 2), (DIM,))


@pytest.mark.parametrize("make", MAKERS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_shapes_dtypes_and_support(make, dtype):
    distribution = make(**arguments(make, (3, 1), dtype)).expand((3, 2))
    sample = distribution.sample((7,))
    assert sample.shape == (7, 3, 2, DIM)
    assert sample.dtype == dtype
    assert distribution.support.check(sample).all()
    log_prob = distribution.log_prob(sample)
    assert log_prob.shape == (7, 3, 2)
    assert log_prob.dtype == dtype


@pytest.mark.parametrize("make", MAKERS)
def test_expand_changes_shapes_only(make):
    keywords = arguments(make, (3,))
    distribution = make(**keywords)
    expanded = distribution.expand((4, 3))
    sample = distribution.sample((4,))
    torch.testing.assert_close(expanded.log_prob(sample), distribution.log_prob(sample))
    assert expanded.batch_shape == (4, 3)
    assert (expanded.expand((2, 4, 3)).batch_shape, distribution.batch_shape) == ((2, 4, 3), (3,))
    assert not torch.equal(expanded.sample()[0], expanded.sample()[1])


@pytest.mark.parametrize("make", MAKERS)
def test_numbers_and_tensors_are_the_same_argument(make):
    keywords = arguments(make)
    scalar = {name: value.item() if value.dim() == 0 else value for name, value in keywords.items()}
    sample = make(**keywords).sample((6,))
    torch.testing.assert_close(make(**scalar).log_prob(sample), make(**keywords).log_prob(sample))
    assert make(**scalar).expand((6,)).log_prob(sample).shape == (6,)


@pytest.mark.parametrize("family", CLASSES)
def test_subclasses_expand(family):
    class Child(family):
        pass

    child = Child(**arguments(family, (3,))).expand((2, 3))
    assert isinstance(child, Child)
    assert child.batch_shape == (2, 3)


@pytest.mark.parametrize("family", CLASSES)
def test_arguments_are_validated(family):
    keywords = arguments(family)
    for name, value in keywords.items():
        with pytest.raises(ValueError, match=name):
            family(**(keywords | {name: torch.full_like(value, math.nan)}))
        if name != "loc":
            with pytest.raises(ValueError, match=name):
                family(**(keywords | {name: -value}))
    with pytest.raises(ValueError, match="D of 2 or more"):
        family(**{name: value[..., :1] if value.dim() else value for name, value in keywords.items()})


@pytest.mark.parametrize("family", CLASSES)
def test_arguments_of_another_type_are_named(family):
    keywords = arguments(family)
    for name, value in keywords.items():
        with pytest.raises(TypeError, match=f"{name} must be a tensor or a number, not a list"):
            family(**(keywords | {name: [value.tolist()]}))
    with pytest.raises(ValueError, match="parameters must be vectors"):
        family(**dict.fromkeys(keywords, 0.5))


@pytest.mark.parametrize("family", CLASSES)
def test_values_are_validated(family):
    distribution = family(**arguments(family))
    with pytest.raises(ValueError, match=r"support|shape"):
        distribution.log_prob(torch.ones(DIM + 1))
    with pytest.raises(ValueError, match="support"):
        distribution.log_prob(torch.full((DIM,), math.nan))
    if family in SPHERES:
        with pytest.raises(ValueError, match="support"):
            distribution.log_prob(torch.ones(DIM))
        family(**arguments(family), validate_args=False).log_prob(torch.ones(DIM))


@pytest.mark.parametrize("make", MAKERS)
def test_trains_in_a_pyro_program(make):
    truth = make(**arguments(make))
    data = truth.sample((50,))
    spherical = "concentration" in truth.arg_constraints

    def model(data=None):
        if spherical:
            loc = pyro.sample("loc", dist.ProjectedNormal(torch.zeros(DIM)))
            keywords = {"loc": loc, "concentration": pyro.sample("concentration", dist.Uniform(0.01, 0.99))}
        else:
            loc = pyro.sample("loc", dist.Normal(torch.zeros(DIM), 3.0).to_event(1))
            scale = pyro.sample("scale", dist.LogNormal(torch.zeros(DIM), 1.0).to_event(1))
            keywords = {"df": pyro.sample("df", dist.Gamma(2.0, 0.2)), "loc": loc, "scale": scale}
        with pyro.plate("data", 50):
            return pyro.sample("x", make(**keywords), obs=data)

    guide = AutoDelta(model, init_loc_fn=pyro.infer.autoguide.init_to_sample)
    svi = SVI(model, guide, pyro.optim.Adam({"lr": 0.05}), Trace_ELBO())
    losses = [svi.step(data) for _ in range(60)]
    assert sum(losses[-5:]) < sum(losses[:5])
    draws = Predictive(model, guide=guide, num_samples=3)(None)
    assert draws["x"].shape == (3, 50, DIM)
    with poutine.trace() as tracer, poutine.scale(scale=2.0), poutine.mask(mask=torch.arange(50) < 10):
        model(data)
    site = tracer.trace.nodes["x"]
    tracer.trace.compute_log_prob()
    assert site["log_prob"].shape == (50,)
    assert (site["log_prob"][10:] == 0).all()


@pytest.mark.parametrize("make", MAKERS)
def test_can_be_copied(make):
    distribution = make(**arguments(make, (2,)))
    sample = distribution.sample()
    assert torch.equal(copy.deepcopy(distribution).log_prob(sample), distribution.log_prob(sample))


@pytest.mark.parametrize("direction", ["restricted", "projected"])
@pytest.mark.parametrize("radius", ["student-t", "log-student-t", None])
@pytest.mark.parametrize("df", [3.0, torch.tensor(3.0, device="meta")], ids=["number", "tensor"])
def test_training_does_not_wait_for_the_device(direction, radius, df):
    # A meta tensor has no values: reading one (.item(), bool) raises, as it would stall an accelerator.
    loc, scale, value = (torch.ones(8, DIM, device="meta", requires_grad=True) for _ in range(3))
    polar = PolarStudentT(df, loc, scale, direction=direction, radius=radius, validate_args=False)
    polar.log_prob(value).sum().backward()
    assert loc.grad.shape == (8, DIM)


@pytest.mark.parametrize("df", [0.5, 3.0, 1e3])
def test_diagonal_student_t_is_pyros_multivariate_student_t(df):
    loc, scale, value = (
        torch.randn(4, DIM).double(),
        torch.rand(4, DIM).double() + 0.2,
        torch.randn(9, 4, DIM).double(),
    )
    ours, theirs = DiagonalStudentT(df, loc, scale), dist.MultivariateStudentT(df, loc, scale.diag_embed())
    torch.testing.assert_close(ours.log_prob(value), theirs.log_prob(value), rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(ours.mean, theirs.mean, equal_nan=True)
    torch.testing.assert_close(ours.variance, theirs.variance, equal_nan=True)


def test_diagonal_student_t_in_the_limit_is_normal():
    loc, scale, value = torch.randn(DIM), torch.rand(DIM) + 0.2, torch.randn(9, DIM)
    ours, normal = DiagonalStudentT(math.inf, loc, scale), dist.Normal(loc, scale).to_event(1)
    torch.testing.assert_close(ours.log_prob(value), normal.log_prob(value))
    torch.testing.assert_close(ours.variance, normal.variance)


@pytest.mark.parametrize("df", [1.0, 6.0])
def test_diagonal_student_t_samples_fit_log_prob(df):
    ours = DiagonalStudentT(df, torch.tensor([0.3, 2.0]).double(), torch.tensor([0.5, 1.5]).double())
    assert neighbor_p_value(ours, 2) > 1e-3


def test_diagonal_student_t_gradcheck():
    keywords = {k: v.requires_grad_() for k, v in arguments(DiagonalStudentT, (2,), torch.float64).items()}
    value = torch.randn(2, DIM, dtype=torch.float64)
    assert torch.autograd.gradcheck(lambda *a: DiagonalStudentT(*a).log_prob(value), tuple(keywords.values()))
