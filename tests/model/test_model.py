"""Encoders and the VJE module."""

import math

import pyro
import pytest
import torch
from tiny import tiny_encoder
from torch import nn

from pyro_vje import VJE, SymmetricELBO
from pyro_vje.model.encoders import build_encoder, feature_dim


def make(**settings):
    return VJE(nn.Linear(6, 4), 4, **{"hidden_dim": 8, **settings})


@pytest.mark.parametrize(
    ("name", "size", "features", "first_stride", "pools"),
    [
        ("resnet18", 32, 512, 1, False),
        ("resnet18", 96, 512, 2, True),
        ("resnet-small", 16, 256, 1, False),
        ("resnet-small", 32, 256, 2, False),
    ],
)
def test_stem_fits_the_image_size(name, size, features, first_stride, pools):
    encoder = build_encoder(name, size)
    assert feature_dim(encoder, size) == features
    convolution = next(module for module in encoder.modules() if isinstance(module, nn.Conv2d))
    assert convolution.stride == (first_stride, first_stride)
    assert any(isinstance(module, nn.MaxPool2d) for module in encoder.modules()) == pools


def test_resnet50_keeps_its_width():
    with torch.device("meta"):
        assert build_encoder("resnet50", 224)(torch.zeros(1, 3, 224, 224)).shape == (1, 2048)


def test_another_width_of_features_than_was_said_is_named():
    vje = VJE(tiny_encoder(16), 9)
    with pytest.raises(ValueError, match="the encoder gives 8 features, but feature_dim is 9"):
        vje.encode_views(torch.zeros(2, 2, 3, 16, 16))


def test_encoder_of_a_wrong_shape_is_refused():
    with pytest.raises(ValueError, match=r"\(N, F\), but gave \(2, 4, 16, 16\).*pool and flatten"):
        feature_dim(nn.Conv2d(3, 4, 3, padding=1), 16)


def test_measuring_features_leaves_the_encoder_as_it_was():
    encoder = build_encoder("resnet-small", 16).train()
    before = {name: value.clone() for name, value in encoder.state_dict().items()}
    feature_dim(encoder, 16)
    assert encoder.training
    assert all(torch.equal(before[name], value) for name, value in encoder.state_dict().items())


def test_target_is_data_and_scale_is_shared():
    vje = make()
    pair = vje.encode_views(torch.randn(2, 9, 6))
    assert not pair.target.requires_grad
    assert pair.loc.shape == pair.scale.shape == pair.target.shape == (2, 9, 4)
    assert (pair.scale > 0).all()
    embeddings = vje.embed(torch.randn(9, 6))
    # the closing batch norm puts each feature at unit variance: radius √D on average, the unit of the prior
    torch.testing.assert_close(embeddings.square().sum(-1).mean().sqrt(), torch.tensor(2.0), rtol=1e-3, atol=0)
    scale = torch.rand(9, 4) + 0.1
    torch.testing.assert_close(vje.likelihood(pair.loc[0], scale).scale, scale)


def test_separate_variance_is_one_learned_scale_per_feature():
    vje = make(shared_variance=False)
    loc = torch.randn(9, 4)
    likelihood = vje.likelihood(loc, torch.rand(9, 4))
    assert torch.equal(likelihood.scale, likelihood.scale[:1].expand(9, 4))
    SymmetricELBO()(vje.model, vje.guide)(torch.randn(2, 9, 6)).backward()
    assert vje.likelihood_raw_scale.grad.abs().sum() > 0


def test_kl_weight_weighs_the_kl_alone(monkeypatch):
    noise = torch.randn(2, 9, 4)
    monkeypatch.setattr("torch.distributions.normal._standard_normal", lambda *a, **k: noise)
    vje, views = make(), torch.randn(2, 9, 6)
    none, half, whole = (SymmetricELBO(kl_weight=weight)(vje.model, vje.guide)(views) for weight in (0.0, 0.5, 1.0))
    assert whole > none  # the divergence is positive
    torch.testing.assert_close(half, (none + whole) / 2)
    with pytest.raises(ValueError, match="kl_weight must be finite and at least 0"):
        SymmetricELBO(kl_weight=-0.1)


def test_heavy_tails_bound_the_pull_of_an_outlier():
    """Gradient of the direction's log density by loc: bounded for the Student-t, not for its Gaussian limit."""
    gradients = {}
    for df in (3.0, math.inf):
        vje = make(df=df)
        loc = torch.tensor([1.0, 0.0, 0.0, 0.0], requires_grad=True)
        target = torch.tensor([-1.0, 0.1, 0.0, 0.0])
        vje.likelihood(loc, torch.full((4,), 0.01)).log_prob_direction(target).backward()
        gradients[df] = loc.grad.norm()
    assert gradients[3.0] < 100
    assert gradients[math.inf] > 1000


def test_projectors_close_with_a_batch_norm_and_name_what_they_cannot_do():
    images = torch.randn(64, 6)
    own = nn.Sequential(nn.Linear(4, 3, bias=False), nn.BatchNorm1d(3, affine=False))
    for settings, dim, count in (
        ({}, 4, 0),
        ({"projector": "linear", "embedding_dim": 5}, 5, 1),
        ({"projector": "mlp"}, 128, 4),  # the hidden batch norm has two
        ({"projector": own, "embedding_dim": 3}, 3, 1),
    ):
        vje = make(**settings)
        embeddings = vje.embed(images)
        assert (embeddings.shape, vje.embedding_dim) == ((64, dim), dim)
        assert len(list(vje.projector.parameters())) == count
        torch.testing.assert_close(embeddings.var(0, unbiased=False), torch.ones(dim), rtol=1e-3, atol=0)
    with pytest.raises(ValueError, match="the embedding is the encoder's 4 features, not 5: leave embedding_dim"):
        make(embedding_dim=5)


def test_the_radius_has_a_scale_of_its_own_where_its_density_has_one():
    learned, shared = make(), make(radius_scale="shared")
    assert learned.raw_radius_scale is not None
    assert shared.raw_radius_scale is None
    assert make(likelihood="normal").raw_radius_scale is None
    loc, scale, target = torch.randn(9, 4), torch.rand(9, 4) + 0.1, torch.randn(9, 4)
    radii = {}
    for name, vje in (("learned", learned), ("shared", shared)):
        radii[name] = [vje.likelihood(loc, s).log_prob_radius(target.norm(dim=-1)) for s in (scale, 2 * scale)]
    torch.testing.assert_close(*radii["learned"])
    assert (radii["shared"][0] != radii["shared"][1]).all()


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"embedding_dim": 1}, "embedding_dim must be at least 2"),
        ({"df": 0}, "df must be positive"),
        ({"unit_radius": "D"}, "unit_radius must be"),
        ({"radius": "gamma"}, "radius must be one of"),
        ({"radius_scale": "own"}, "radius_scale must be one of learned, shared, not 'own'"),
        ({"projector": "deep"}, "projector must be one of none, linear, mlp, whiten, not 'deep'"),
        ({"likelihood": "gauss"}, "unknown likelihood family 'gauss'"),
    ],
)
def test_settings_are_checked(settings, message):
    with pytest.raises(ValueError, match=message):
        make(**settings)


def test_model_samples_from_its_own_prior_and_guide():
    """Model and guide are ordinary Pyro callables: Predictive and the handlers work on them."""
    vje, views = make(likelihood="polar-student-t-exact"), torch.randn(2, 9, 6)
    trace = pyro.poutine.trace(vje.model).get_trace(views)
    assert trace.nodes["z"]["value"].shape == (2, 9, 4)
    assert trace.nodes["target"]["is_observed"]
    posterior = pyro.infer.Predictive(vje.model, guide=vje.guide, num_samples=5)(views)
    assert posterior["target"].shape == (5, 2, 9, 4)
    simulated = pyro.poutine.uncondition(vje.model)(views)
    assert simulated.shape == (2, 9, 4)
