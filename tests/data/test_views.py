"""The distribution of the views, their determinism, and a whole view against torchvision's functions."""

import itertools
import math

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torchvision.transforms import v2
from torchvision.transforms.v2 import functional as reference

from pyro_vje.data import RECIPES, CleanView, Recipe, TwoViews, load_dataset, views_for
from pyro_vje.data.views.two_views import ViewParameters, draw_parameters

MEAN, STD = (0.4, 0.5, 0.6), (0.2, 0.25, 0.3)


def batch(size: int, side: int) -> torch.Tensor:
    generator = torch.Generator().manual_seed(0)
    return torch.randint(0, 256, (size, 3, side, side), dtype=torch.uint8, generator=generator)


def seeded(seed: int) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def drawn_from(generator: torch.Generator, images: torch.Tensor, recipe: Recipe) -> ViewParameters:
    """What `TwoViews` draws, (2, B)."""
    draws = torch.rand((1, len(images), 2, 32), generator=generator)[0]
    return draw_parameters(draws.transpose(0, 1), tuple(images.shape[-2:]), recipe)


@pytest.mark.parametrize(("recipe", "size"), [*zip(RECIPES, itertools.cycle([24, 40])), ("stl10", 40)])
def test_a_whole_view_is_torchvisions_composition(recipe, size):
    """Same parameters, same order, one image at a time; images of 32 pixels, shrunk and enlarged."""
    images = batch(8, 32)
    two = TwoViews(size, recipe, MEAN, STD)
    views = two(images, seeded(3))
    drawn = drawn_from(seeded(3), images, two.recipe)
    for view in (0, 1):
        for i, image in enumerate(images):
            p = type(drawn)(*(parameter[view, i].item() for parameter in drawn))
            box = [int(p.top), int(p.left), int(p.height), int(p.width)]
            x = reference.to_dtype(image, torch.float32, scale=True)
            x = reference.resized_crop(x, *box, [size, size], antialias=True)
            x = reference.horizontal_flip(x) if p.flip else x
            x = reference.adjust_brightness(x, p.brightness)
            x = reference.adjust_contrast(x, p.contrast)
            x = reference.adjust_saturation(x, p.saturation)
            x = reference.adjust_hue(x, p.hue)
            x = reference.rgb_to_grayscale(x, 3) if p.grey else x
            x = reference.gaussian_blur(x, [two.kernel] * 2, [p.sigma] * 2) if p.blur else x
            torch.testing.assert_close(views[view, i], reference.normalize(x, MEAN, STD), atol=1e-3, rtol=0)


@pytest.mark.parametrize("shape", [(32, 32), (24, 80)])
def test_crops_are_distributed_as_torchvisions(shape):
    """Area and ratio by their quantiles, also where many proposals do not fit and the fallback is used."""
    n = 1500
    drawn = draw_parameters(torch.rand((1, 2 * n, 32), generator=seeded(0)), shape, Recipe())
    torch.manual_seed(0)
    image = torch.empty(3, *shape)
    crop = v2.RandomResizedCrop(8, (0.2, 1.0))
    theirs = [crop.make_params([image]) for _ in range(n)]
    boxes = torch.tensor([[p[k] for k in ("height", "width", "top", "left")] for p in theirs]).float()
    ours = torch.stack([drawn.height, drawn.width, drawn.top, drawn.left], -1)[0]
    levels = torch.tensor([0.05, 0.25, 0.5, 0.75, 0.95])

    def summary(boxes):
        height, width, top, left = boxes.unbind(1)
        return height * width / math.prod(shape), (width / height).log(), top / shape[0], left / shape[1]

    for mine, theirs in zip(summary(ours), summary(boxes), strict=True):
        assert (mine.quantile(levels) - theirs.quantile(levels)).abs().max() < 0.04
    assert (ours[:, 2] >= 0).all()
    assert (ours[:, 0] + ours[:, 2] <= shape[0]).all()
    assert (ours[:, 1] + ours[:, 3] <= shape[1]).all()


def test_the_other_parameters_are_distributed_as_the_recipe_says():
    recipe = Recipe(blur=0.1)
    n = 20000
    both = draw_parameters(torch.rand((2, n, 32), generator=seeded(0)), (32, 32), recipe)
    drawn = ViewParameters(*(parameter[1] for parameter in both))
    for flag, probability in (("flip", 0.5), ("grey", 0.2), ("blur", 0.1)):
        assert abs(getattr(drawn, flag).float().mean() - probability) < 0.01
    jittered = drawn.brightness != 1
    assert abs(jittered.float().mean() - 0.8) < 0.01
    for name, low, high in (("brightness", 0.6, 1.4), ("contrast", 0.6, 1.4), ("hue", -0.1, 0.1)):
        values = getattr(drawn, name)[jittered]
        assert low <= values.min()
        assert values.max() <= high
        # a uniform distribution's mean and standard deviation
        assert abs(values.mean() - (low + high) / 2) < 0.02 * (high - low)
        assert abs(values.std() - (high - low) / math.sqrt(12)) < 0.02 * (high - low)
    assert (drawn.hue[~jittered] == 0).all()


def test_views_are_a_function_of_the_generator():
    two, images = TwoViews(32, "stl10"), batch(8, 32)
    first = two(images, seeded(1))
    assert first.shape == (2, 8, 3, 32, 32)
    assert first.dtype == torch.float32
    assert torch.equal(first, two(images, seeded(1)))
    assert not torch.equal(first, two(images, seeded(2)))
    assert not torch.equal(first[0], first[1])
    assert torch.equal(two.one(images, seeded(1)), two(images, seeded(1), num_views=1)[0])
    assert two(images, seeded(1), num_views=3).shape == (3, 8, 3, 32, 32)
    state = torch.get_rng_state()
    two(images, seeded(1))
    assert torch.equal(state, torch.get_rng_state())  # the global generator is not touched


def test_ranks_draw_the_views_of_the_global_batch():
    two, images = TwoViews(16, "cifar"), batch(8, 16)
    whole = two(images, seeded(1))
    parts = [two(images[4 * r : 4 * r + 4], seeded(1), rank=r, world_size=2) for r in (0, 1)]
    torch.testing.assert_close(torch.cat(parts, 1), whole, atol=1e-6, rtol=0)


def test_autocast_does_not_touch_the_pixels():
    two, images = TwoViews(16, "stl10"), batch(4, 24)
    with torch.autocast("cpu", torch.bfloat16):
        cast = two(images, seeded(1))
    assert torch.equal(cast, two(images, seeded(1)))


def test_nothing_is_read_back_from_the_device():
    """Every read of a number by Python is a wait on a GPU."""

    class Count(TorchDispatchMode):
        names: list[str] = []  # noqa: RUF012

        def __torch_dispatch__(self, func, types, args=(), kwargs=None):
            self.names.append(func.overloadpacket.__name__)
            return func(*args, **(kwargs or {}))

    two, images = TwoViews(32, "stl10"), batch(8, 32)
    floats = images.float() / 255
    two._normalise_(floats.clone())  # the constants are copied to the device once
    with Count() as count:
        drawn = drawn_from(seeded(1), images, two.recipe)
        for p in zip(*drawn, strict=True):
            two._normalise_(two.augment(floats, ViewParameters(*p)))
    assert len(count.names) > 100
    assert not {"_local_scalar_dense", "nonzero", "equal", "is_nonzero"} & set(count.names)


def test_clean_view_normalises():
    images = batch(4, 32)
    expected = reference.normalize(images.float() / 255, MEAN, STD)
    torch.testing.assert_close(CleanView(32, MEAN, STD)(images), expected)
    expected = reference.resize(images.float() / 255, [16, 16], antialias=True)
    torch.testing.assert_close(CleanView(16, MEAN, STD)(images), reference.normalize(expected, MEAN, STD))


def test_a_clean_view_that_crops_is_torchvisions_center_crop():
    for size in (32, 23, 16):
        cut = CleanView(size, MEAN, STD, crop=True)(batch(4, 32))
        expected = v2.CenterCrop(size)(batch(4, 32)).float() / 255
        torch.testing.assert_close(cut, reference.normalize(expected, MEAN, STD))


def test_views_for_a_data_set_standardise_it():
    images = load_dataset("digits")
    two, clean = views_for("digits", images.image_size)
    x = clean(images.images)
    assert abs(x.mean()) < 0.02
    assert abs(x.std() - 1) < 0.02
    assert two.recipe.flip == 0
    assert views_for("folder", 32)[0].recipe == RECIPES["cifar"]
    assert views_for("folder", 224)[0].recipe == RECIPES["imagenet"]


def test_user_errors_name_the_way_out():
    with pytest.raises(ValueError, match="unknown recipe 'cifr'; known: cifar"):
        TwoViews(32, "cifr")
    with pytest.raises(ValueError, match="unknown data set 'mnist': choose one of digits"):
        views_for("mnist", 32)
    with pytest.raises(ValueError, match=r"expected uint8 images .*float32 \(2, 3, 8, 8\)"):
        TwoViews(8)(torch.zeros(2, 3, 8, 8))
    with pytest.raises(ValueError, match="std positive"):
        CleanView(8, MEAN, (0.0, 1.0, 1.0))
    with pytest.raises(ValueError, match="at least 1"):
        CleanView(0)
    with pytest.raises(ValueError, match="one pixel cannot be blurred: take image_size 2"):
        TwoViews(1, "stl10")
