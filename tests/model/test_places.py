"""Features at places: which modules are chosen, and that each place's features are its own."""

import pytest
import torch
from torch import nn

from pyro_vje.model import build_encoder
from pyro_vje.model.places import PlaceFeatures


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
