"""Features at places: which modules are chosen, that each place's are its own; their density against the library's."""

import math

import pytest
import torch
from torch import nn

from pyro_vje.anomaly.maps import place_head
from pyro_vje.anomaly.places import GROUP, KINDS, PlaceDensity, PlaceFeatures, share_scales
from pyro_vje.distributions import pairwise_log_prob
from pyro_vje.model import build_encoder
from pyro_vje.model.build import build_head


@pytest.mark.parametrize(
    ("name", "size", "modules", "side", "dim"),
    [
        ("resnet-small", 32, ["stages.1", "stages.2"], 4, 64 + 128),
        ("torchvision:mobilenet_v3_small", 64, ["features.3", "features.8"], 4, 24 + 48),
        ("timm:test_resnet.r160_in1k", 64, ["layer2", "layer3"], 4, 240),
        ("timm:test_vit.r160_in1k", 160, ["blocks.2", "blocks.3"], 10, 128),  # a class token and registers
        ("torchvision:swin_t", 64, ["features.3", "features.5"], 4, 192 + 384),  # channels last
    ],
)
def test_the_middle_of_an_encoder_in_one_pass(name, size, modules, side, dim):
    if name.startswith("timm"):
        pytest.importorskip("timm")
    encoder = build_encoder(name, size).eval()
    places = PlaceFeatures(encoder, size)
    assert (places.modules, places.side, places.dim) == (modules, side, dim)
    images = torch.randn(2, 3, size, size)
    with torch.no_grad():
        features, found = places(images)
        assert torch.equal(features, encoder(images))
    assert found.shape == (2, side, side, dim)
    assert not any(module._forward_hooks for module in encoder.modules())


def test_a_change_of_the_image_shows_where_it_is():
    torch.manual_seed(0)
    encoder = build_encoder("resnet-small", 64).eval()
    places = PlaceFeatures(encoder, 64, ["stages.1"])
    before = torch.rand(1, 3, 64, 64)
    after = before.clone()
    after[..., 8:12, 48:52] += 2  # row 2 and column 12 of 16
    with torch.no_grad():
        moved = (places(after)[1] - places(before)[1]).norm(dim=-1)[0]
    row, column = divmod(int(moved.argmax()), 16)
    assert abs(row - 2) <= 2
    assert abs(column - 12) <= 2
    assert moved[8:, :8].max() < 0.05 * moved.max()


def test_what_has_no_places_says_so():
    flat = nn.Sequential(nn.Flatten(), nn.Linear(192, 8))
    with pytest.raises(ValueError, match=r"no features at places.*none of its modules"):
        PlaceFeatures(flat, 8)
    encoder = build_encoder("resnet-small", 32)
    with pytest.raises(ValueError, match=r"no module stages\.9"):
        PlaceFeatures(encoder, 32, ["stages.9"])
    mixed = nn.Sequential(nn.Conv2d(3, 4, 3), nn.Flatten(), nn.Linear(144, 4))
    with pytest.raises(ValueError, match="its module 2 gives no"):
        PlaceFeatures(mixed, 8, ["2"])


@pytest.mark.parametrize(("count", "slack"), [(50, 0.0), (4096, math.log(GROUP))])
def test_the_density_is_that_of_the_kernels(count, slack):
    torch.manual_seed(1)
    head = build_head(place_head(24, 16), 24).eval()
    torch.nn.init.normal_(head.raw_radius_scale)
    reference = torch.randn(count, 16) * 2
    scale, kind = share_scales(0.3 + torch.rand(count, 16), seed=0)
    places = torch.randn(2, 3, 3, 24)
    found = PlaceDensity(head, reference, scale, kind)(places).flatten().double()
    kernels = pairwise_log_prob(head.likelihood(reference, scale[kind]), head.project(places.flatten(0, 2)))
    exact = math.log(count) - kernels.double().logsumexp(0)
    excess = found - exact
    excess = excess - (excess.mean() if not slack else excess.min())  # up to a constant
    assert excess.abs().max() <= slack + 1e-3


def test_kernels_share_the_scales_that_are_alike():
    torch.manual_seed(0)
    true = 0.2 + torch.rand(KINDS, 8)
    whose = torch.arange(KINDS).repeat(100)
    scale = true[whose] * torch.exp(0.01 * torch.randn(len(whose), 8))
    shared, kind = share_scales(scale, seed=0)
    assert shared.shape == (KINDS, 8)
    torch.testing.assert_close(shared[kind].log(), scale.log(), atol=0.05, rtol=0)
    own = scale[kind == kind[0]]
    torch.testing.assert_close(shared[kind[0]], own.log().mean(0).exp())
