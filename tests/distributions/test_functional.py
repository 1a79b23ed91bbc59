"""Every distribution under every transform of torch.func, against torch.autograd."""

import pytest
import torch
from registry import MEMBERS, build
from torch.func import grad, hessian, jacfwd, jacrev, jvp, vmap

pytestmark = pytest.mark.filterwarnings("ignore:.*torch.jit.script:FutureWarning")  # PyTorch's own, in forward mode


@pytest.fixture(params=MEMBERS)
def case(request):
    make, arguments, value = build(request.param)
    points = (*arguments, value)
    return lambda *x: make(*x[:-1]).log_prob(x[-1]), points


def close(got, want):
    torch.testing.assert_close(got, want, rtol=1e-8, atol=1e-8)


def by_autograd(function, points):
    leaves = [x.clone().requires_grad_() for x in points]
    out = function(*leaves)
    if not out.requires_grad:
        return tuple(map(torch.zeros_like, points))
    return torch.autograd.grad(out, leaves, allow_unused=True, materialize_grads=True)


def test_grad_and_jvp(case):
    function, points = case
    argnums = tuple(range(len(points)))
    want = by_autograd(function, points)
    close(grad(function, argnums)(*points), want)
    tangents = tuple(map(torch.randn_like, points))
    value, tangent = jvp(function, points, tangents)
    close(value, function(*points))
    close(tangent, sum((x * t).sum() for x, t in zip(want, tangents, strict=True)))


@pytest.mark.parametrize("name", MEMBERS)
def test_vmap_over_parameters_and_values_and_of_grad(name):
    make, arguments, value = build(name, (3,))
    points = (*arguments, value)

    def function(*x):
        return make(*x[:-1]).log_prob(x[-1])

    rows = [tuple(x[i] for x in points) for i in range(3)]
    close(vmap(function)(*points), torch.stack([function(*row) for row in rows]))
    argnums = tuple(range(len(points)))
    want = [torch.stack(column) for column in zip(*(by_autograd(function, row) for row in rows), strict=True)]
    close(vmap(grad(function, argnums))(*points), tuple(want))
    values = torch.stack([value, value.flip(0)])
    over_values = vmap(function, (*(None for _ in arguments), 0))(*arguments, values)
    close(over_values, function(*arguments, values))


def test_second_derivatives_by_each_order_of_modes(case):
    function, points = case
    shapes = [x.shape for x in points]
    flat = torch.cat([x.reshape(-1) for x in points])

    def of_vector(x):
        parts = x.split([shape.numel() for shape in shapes])
        return function(*(part.reshape(shape) for part, shape in zip(parts, shapes, strict=True)))

    want = torch.autograd.functional.hessian(of_vector, flat)
    for by in (hessian, lambda f: jacrev(jacrev(f)), lambda f: jacfwd(jacfwd(f)), lambda f: jacrev(jacfwd(f))):
        close(by(of_vector)(flat), want)
    step = 1e-5 * torch.randn_like(flat)
    numeric = (jacrev(of_vector)(flat + step) - jacrev(of_vector)(flat - step)) / 2
    torch.testing.assert_close(numeric, want @ step, rtol=1e-4, atol=1e-8)


@pytest.mark.parametrize("name", MEMBERS)
def test_vmap_draws(name):
    make, arguments, _ = build(name, (3,))
    if make(*arguments).has_rsample and name != "PolarProduct":  # whose radius is torch.distributions' own
        draws = vmap(lambda *x: make(*x).rsample(), randomness="different")(*arguments)
        assert make(*arguments).support.check(draws).all()
