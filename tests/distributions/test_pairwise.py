"""pairwise_log_prob against log_prob by broadcasting: values, gradients, accuracy at small scales, memory."""

import math
from functools import partial

import pyro.distributions as dist
import pytest
import torch
from oracles import uniform_directions
from torch.utils._python_dispatch import TorchDispatchMode

from pyro_vje.distributions import (
    DiagonalStudentT,
    PolarProduct,
    PolarStudentT,
    PowerSpherical,
    ProjectedStudentT,
    SphericalCauchy,
    VonMisesFisher,
    pairwise_log_prob,
)

POLAR = [
    partial(PolarStudentT, direction=direction, radius=radius, unit_radius=2.0)
    for direction in ("restricted", "projected")
    for radius in ("student-t", "log-student-t", None)
]
STUDENT_T = [DiagonalStudentT, ProjectedStudentT, *POLAR]
SPHERICAL = [PowerSpherical, SphericalCauchy, VonMisesFisher]


def product(loc, concentration):
    radius = dist.LogNormal(torch.zeros_like(concentration), 1 + concentration)
    return PolarProduct(SphericalCauchy(loc, concentration), radius)


def normal(df, loc, scale):
    return dist.Normal(loc, scale).to_event(1)


def laplace(df, loc, scale):
    return dist.Laplace(loc, scale).to_event(1)


OTHERS = [normal, laplace]
MAKERS = [*STUDENT_T, *OTHERS, *SPHERICAL, product]


def name(make):
    if isinstance(make, partial):
        return "-".join(str(x) for x in ("polar", *make.keywords.values()))
    return str(getattr(make, "__name__", make))


def arguments(make, batch, dim, dtype, df=5.0):
    if make in (*SPHERICAL, product):
        loc = torch.nn.functional.normalize(torch.randn(*batch, dim, dtype=dtype), dim=-1)
        return [loc, 0.9 * torch.rand(batch, dtype=dtype)]
    return [df, torch.randn(*batch, dim, dtype=dtype), torch.rand(*batch, dim, dtype=dtype) + 0.2]


def values(make, count, dim, dtype):
    if make in (*SPHERICAL, ProjectedStudentT):
        return uniform_directions(count, dim, dtype)
    return 3 * torch.randn(count, dim, dtype=dtype)


def by_broadcasting(distribution, value):
    column = value.reshape(len(value), *(1 for _ in distribution.batch_shape), value.shape[-1])
    return distribution.log_prob(column).movedim(0, -1)


def check(make, dim, dtype, df=5.0, batch=(9,)):
    distribution, value = make(*arguments(make, batch, dim, dtype, df)), values(make, 7, dim, dtype)
    got, want = pairwise_log_prob(distribution, value), by_broadcasting(distribution, value)
    assert got.shape == (*batch, 7)
    assert got.dtype == dtype
    # Relative to the terms that make it up, of which (D - 1) log r is one: some roundings of each.
    size = want.abs().max() + dim
    assert (got - want).abs().max() <= 20 * torch.finfo(dtype).eps * size


@pytest.mark.parametrize("make", STUDENT_T, ids=name)
@pytest.mark.parametrize(("dim", "df"), [(2, 1.0), (3, 5.0), (128, 126.0), (128, math.inf)])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
def test_student_t_is_log_prob_by_broadcasting(make, dim, df, dtype):
    check(make, dim, dtype, df)


@pytest.mark.parametrize("make", [*SPHERICAL, product, *OTHERS], ids=name)
@pytest.mark.parametrize("dim", [2, 3, 128])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
def test_others_are_log_prob_by_broadcasting(make, dim, dtype):
    check(make, dim, dtype)


@pytest.mark.parametrize("make", MAKERS, ids=name)
@pytest.mark.parametrize("batch", [(), (1,), (2, 3)])
def test_batch_shape_is_any(make, batch):
    check(make, 4, torch.float64, batch=batch)


@pytest.mark.parametrize("make", STUDENT_T, ids=name)
def test_df_and_radius_scale_of_each_element_and_expanded(make):
    keywords = {"radius_scale": torch.rand(9).double() + 0.1} if make in POLAR else {}
    df = torch.linspace(1, 8, 9, dtype=torch.float64)
    distribution = make(*arguments(make, (9,), 3, torch.float64, df), **keywords)
    for each in (distribution, distribution.expand((2, 9))):
        value = values(make, 7, 3, torch.float64)
        torch.testing.assert_close(pairwise_log_prob(each, value), by_broadcasting(each, value), rtol=1e-11, atol=1e-11)


@pytest.mark.parametrize("make", MAKERS, ids=name)
def test_gradients_are_those_of_log_prob(make):
    df = torch.linspace(1, 8, 5, dtype=torch.float64)
    parameters = [x.requires_grad_() for x in arguments(make, (5,), 6, torch.float64, df)]
    value = values(make, 7, 6, torch.float64).requires_grad_()
    wanted = [x for x in (*parameters, value) if not (make in OTHERS and x is df)]
    weights = torch.randn(5, 7).double()
    got, want = (
        torch.autograd.grad((f(make(*parameters), value) * weights).sum(), wanted)
        for f in (pairwise_log_prob, by_broadcasting)
    )
    torch.testing.assert_close(got, want, rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("make", STUDENT_T, ids=name)
@pytest.mark.parametrize("width", [1e-2, 1e-4])
@pytest.mark.parametrize("dim", [3, 128])
def test_values_next_to_loc_lose_nothing_to_the_expansion(make, width, dim):
    # A, B and C are up to 1e8 times the squared distance: float32 products would leave no digit of it.
    loc, scale = uniform_directions(20, dim, torch.float32), width * (torch.rand(20, dim) + 0.5)
    value = torch.nn.functional.normalize(loc + scale * torch.randn(20, dim), dim=-1)
    distribution, exact = make(5.0, loc, scale), make(5.0, loc.double(), scale.double(), validate_args=False)
    want = by_broadcasting(exact, value.double()).diagonal()
    error, usual = (
        (log_prob.diagonal() - want).abs().max()
        for log_prob in (pairwise_log_prob(distribution, value), by_broadcasting(distribution, value))
    )
    assert error <= 2 * usual + 4 * torch.finfo(torch.float32).eps * want.abs().max()


@pytest.mark.parametrize("family", [PowerSpherical, VonMisesFisher])
def test_high_concentrations_lose_nothing_to_the_expansion(family):
    loc = uniform_directions(20, 128, torch.float32)
    value = torch.nn.functional.normalize(loc + 1e-4 * torch.randn(20, 128), dim=-1)
    distribution = family(loc, 1e6)
    want = by_broadcasting(distribution, value).diagonal()
    torch.testing.assert_close(pairwise_log_prob(distribution, value).diagonal(), want, rtol=1e-6, atol=0)


def test_direction_of_a_product_may_be_any():
    loc = torch.randn(9, 3).double()
    polar = PolarProduct(dist.ProjectedNormal(loc), dist.LogNormal(0.0, 1.0))
    value = torch.randn(7, 3).double()
    torch.testing.assert_close(pairwise_log_prob(polar, value), by_broadcasting(polar, value))


class LargestTensor(TorchDispatchMode):
    """Records the number of elements of the largest tensor that any operation returned."""

    largest = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        for x in out if isinstance(out, tuple | list) else [out]:
            if isinstance(x, torch.Tensor):
                self.largest = max(self.largest, x.numel())
        return out


@pytest.mark.parametrize("make", MAKERS, ids=name)
def test_memory_is_that_of_the_pairs(make):
    rows, count, dim = 300, 400, 64
    distribution, value = (make(*arguments(make, (rows,), dim, torch.float32)), values(make, count, dim, torch.float32))
    with LargestTensor() as recorded, torch.no_grad():
        pairwise_log_prob(distribution, value)
    # The projected factor's table has 150 nodes of 2^12 angles, whatever the numbers of rows and values.
    table = 150 * (4096 + 1) if make is ProjectedStudentT or make in POLAR[3:] else 0
    assert rows * count <= recorded.largest <= max(rows * count, table) < rows * count * dim


@pytest.mark.parametrize("make", MAKERS, ids=name)
@pytest.mark.parametrize("wrong", [torch.ones(4), torch.ones(2, 3), torch.ones(2, 2, 4), [[1.0] * 4]], ids=str)
def test_wrong_shapes_are_named(make, wrong):
    distribution = make(*arguments(make, (9,), 4, torch.float32))
    with pytest.raises(ValueError, match=r"shape \(M, D\)"):
        pairwise_log_prob(distribution, wrong)


def test_wrong_events_and_values_outside_the_support_are_named():
    with pytest.raises(ValueError, match=r"event shape \(D,\)"):
        pairwise_log_prob(dist.Normal(torch.zeros(4), 1.0), torch.ones(2, 4))
    for make in MAKERS:
        with pytest.raises(ValueError, match="support"):
            pairwise_log_prob(make(*arguments(make, (9,), 4, torch.float32)), torch.full((2, 4), math.nan))
