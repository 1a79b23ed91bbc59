"""Random views of every image of a batch, drawn and computed at once on the batch's device."""

from __future__ import annotations

import math
from collections import namedtuple
from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor
from torch.nn.functional import interpolate
from torchvision.transforms.functional import center_crop

from pyro_vje.data.views import operations as pixels

Rgb = Sequence[float]  # a number for each channel
LOCAL_SCALE = (0.05, 0.4)  # of a local view: DINO's (Caron et al. 2021)
_PROPOSALS, _DRAWS = 10, 32  # crops proposed before the fallback, as in torchvision; uniform numbers a view


@dataclass(frozen=True)
class Recipe:
    """Distribution of a random view.

    Ranges: ``scale`` of the crop's area, as a fraction of the image's, ``ratio`` of its width / height (log-uniform),
    ``sigma`` of the blur's standard deviation in pixels. Probabilities: ``flip``, ``jitter``, ``grey``, ``blur``. The
    jitter draws factors from [1 - x, 1 + x] for ``brightness``, ``contrast`` and ``saturation``, and a shift from
    [-x, x] turns for ``hue``.
    """

    scale: tuple[float, float] = (0.2, 1.0)
    ratio: tuple[float, float] = (3 / 4, 4 / 3)
    flip: float = 0.5
    jitter: float = 0.8
    brightness: float = 0.4
    contrast: float = 0.4
    saturation: float = 0.4
    hue: float = 0.1
    grey: float = 0.2
    blur: float = 0.0
    sigma: tuple[float, float] = (0.1, 2.0)


RECIPES: dict[str, Recipe] = {
    # SimCLR (Chen et al. 2020, appendix B.9) and SimSiam (Chen & He 2021, section 4) on CIFAR: no blur
    "cifar": Recipe(),
    # a digit has a fixed orientation and no colour
    "digits": Recipe(scale=(0.4, 1.0), flip=0.0, saturation=0.0, hue=0.0, grey=0.0),
    "stl10": Recipe(blur=0.5),
    # MoCo v2 and SimSiam on ImageNet
    "imagenet": Recipe(blur=0.5),
}


ViewParameters = namedtuple(
    "ViewParameters", "top left height width flip brightness contrast saturation hue grey blur sigma"
)
"""What was drawn for V views of each of B images, (V, B) each, or for one view of each, (B,): the crop's box in whole
pixels, factors, a shift of the hue in turns, sigma in pixels, and whether to flip, grey and blur."""


class CleanView:
    """Images for evaluation, uint8 to normalised float, without any randomness.

    Images of another side than ``image_size`` are resized (bilinear, antialiased), or cut to their central square with
    ``crop``. ``mean`` and ``std`` are of each channel, in [0, 1]. ``ValueError``: no such side, or not three channels.
    """

    def __init__(self, image_size: int, mean: Rgb = (0.5,) * 3, std: Rgb = (0.25,) * 3, *, crop: bool = False) -> None:
        if image_size < 1:
            raise ValueError(f"image_size must be at least 1, got {image_size}")
        if len(mean) != 3 or len(std) != 3 or min(std) <= 0:
            raise ValueError(f"mean and std need three channels, std positive; got {mean} and {std}")
        self.image_size, self.mean, self.std, self.crop = image_size, tuple(mean), tuple(std), crop
        self._constants: dict[torch.device, tuple[Tensor, Tensor]] = {}

    @torch.no_grad()
    def __call__(self, images: Tensor) -> Tensor:
        """Normalise uint8 images (B, 3, H, W) to float32 (B, 3, S, S)."""
        check_images(images)
        if self.crop:
            images = center_crop(images, [self.image_size])
        x = images.float().div_(255)
        if images.shape[-2:] != (self.image_size, self.image_size):
            x = interpolate(x, (self.image_size, self.image_size), mode="bilinear", antialias=True)
        return self._normalise_(x)

    def _normalise_(self, x: Tensor) -> Tensor:
        """Normalise float images (B, 3, S, S) in place."""
        if x.device not in self._constants:  # copied to a device once: in every step one would wait for it
            mean, std = (torch.tensor(v, device=x.device).view(3, 1, 1) for v in (self.mean, self.std))
            self._constants[x.device] = (mean, std)
        mean, std = self._constants[x.device]
        return x.sub_(mean).div_(std)


class TwoViews(CleanView):
    """Two augmented views of each image, or more, by a :class:`Recipe` or the name of one in :data:`RECIPES`.

    The order is fixed: crop and resize, flip, brightness, contrast, saturation, hue, greyscale, blur, normalisation.
    The pixels are those of ``torchvision.transforms.v2.functional`` on float images; torchvision's ``ColorJitter``
    shuffles the four colour operations, this does not. Raises ``ValueError`` if the recipe is unknown or blurs a single
    pixel, or as :class:`CleanView`.
    """

    def __init__(
        self, image_size: int, recipe: str | Recipe = "cifar", mean: Rgb = (0.5,) * 3, std: Rgb = (0.25,) * 3
    ) -> None:
        super().__init__(image_size, mean, std)
        if isinstance(recipe, str) and recipe not in RECIPES:
            raise ValueError(f"unknown recipe {recipe!r}; known: {', '.join(RECIPES)}")
        self.recipe = RECIPES[recipe] if isinstance(recipe, str) else recipe
        if self.recipe.blur and image_size < 2:
            raise ValueError("one pixel cannot be blurred: take image_size 2, or a recipe without blur")
        self.kernel = max(3, image_size // 10 // 2 * 2 + 1)  # SimCLR's: a tenth of the image, odd

    def local(self, image_size: int) -> TwoViews:
        """The same views of small crops at another side, `LOCAL_SCALE` of the area (multi-crop, Caron et al. 2020)."""
        return TwoViews(image_size, replace(self.recipe, scale=LOCAL_SCALE), self.mean, self.std)

    @torch.no_grad()
    def __call__(
        self,
        images: Tensor,
        generator: torch.Generator | None = None,
        *,
        rank: int = 0,
        world_size: int = 1,
        num_views: int = 2,
    ) -> Tensor:
        """Draw V = ``num_views`` views of each of the uint8 images (B, 3, H, W): float32 (V, B, 3, S, S), normalised.

        The views are a function of the state of the ``generator``, on the images' device. Of several processes with
        equally seeded generators, the ``rank``-th of ``world_size`` draws for its part of one global batch what one
        process would draw.
        """
        check_images(images)
        batch, _, *sides = images.shape
        shape = (world_size, batch, num_views, _DRAWS)
        draws = torch.rand(shape, generator=generator, device=images.device)[rank]
        drawn = draw_parameters(draws.transpose(0, 1), (sides[0], sides[1]), self.recipe)
        out = torch.empty((num_views, batch, 3, self.image_size, self.image_size), device=images.device)
        with torch.autocast(images.device.type, enabled=False):  # grid_sample and conv2d would lose precision
            floats = images.float().div_(255)
            for view, p in zip(out, zip(*drawn, strict=True), strict=True):
                view.copy_(self._normalise_(self.augment(floats, ViewParameters(*p))))
        return out

    def one(self, images: Tensor, generator: torch.Generator | None = None) -> Tensor:
        """Draw a single view of each image, as the first of two: float32 (B, 3, S, S), normalised."""
        return self(images, generator, num_views=1)[0]

    def augment(self, images: Tensor, p: ViewParameters) -> Tensor:
        """Apply what was drawn to float images (B, 3, H, W) in [0, 1]; the result is not normalised."""
        recipe = self.recipe  # what it never does costs nothing
        x = pixels.crop_resize(images, p.top, p.left, p.height, p.width, p.flip, self.image_size)
        for name in ("brightness", "contrast", "saturation", "hue"):
            if recipe.jitter and getattr(recipe, name):
                x = getattr(pixels, f"{name}_")(x, getattr(p, name))
        if recipe.grey:
            x = pixels.greyscale_(x, p.grey)
        if recipe.blur:
            x = pixels.blur_(x, p.sigma, p.blur, self.kernel)
        return x


def draw_parameters(uniform: Tensor, image_shape: tuple[int, int], recipe: Recipe) -> ViewParameters:
    """Turn uniform numbers (V, B, 32) in [0, 1) into the parameters of V views of each of B images, (V, B).

    As in ``RandomResizedCrop``, of ten proposed crops the first that fits, else the largest central one in the range.
    """
    full_height, full_width = image_shape
    area, ratio, rest = uniform.split((_PROPOSALS, _PROPOSALS, _DRAWS - 2 * _PROPOSALS), dim=-1)
    u = rest.unbind(-1)
    area = _between(area, *recipe.scale) * (full_height * full_width)
    # Without exp, sqrt, round and floor: of few numbers already they wake torch's threads, which hold up the views'.
    root = math.sqrt(recipe.ratio[0]) * torch.pow(math.sqrt(recipe.ratio[1] / recipe.ratio[0]), ratio)
    side = torch.pow(area, torch.full_like(area, 0.5))
    widths, heights = _floor(side * root + 0.5), _floor(side / root + 0.5)
    fits = (widths > 0) & (widths <= full_width) & (heights > 0) & (heights <= full_height)
    first = fits.int().argmax(-1, keepdim=True)
    fitted = fits.any(-1)
    spare_width = min(full_width, round(full_height * recipe.ratio[1]))
    spare_height = min(full_height, round(full_width / recipe.ratio[0]))
    width = torch.where(fitted, widths.gather(-1, first).squeeze(-1), spare_width)
    height = torch.where(fitted, heights.gather(-1, first).squeeze(-1), spare_height)
    # floor(u (n + 1)) is uniform on 0..n
    top = torch.where(fitted, _floor(u[0] * (full_height - height + 1)), (full_height - spare_height) // 2)
    left = torch.where(fitted, _floor(u[1] * (full_width - width + 1)), (full_width - spare_width) // 2)
    jitter = u[3] < recipe.jitter

    def factor(number: Tensor, strength: float) -> Tensor:
        return torch.where(jitter, _between(number, max(0.0, 1 - strength), 1 + strength), 1.0)

    return ViewParameters(
        *(top, left, height, width),
        flip=u[2] < recipe.flip,
        brightness=factor(u[4], recipe.brightness),
        contrast=factor(u[5], recipe.contrast),
        saturation=factor(u[6], recipe.saturation),
        hue=torch.where(jitter, _between(u[7], -recipe.hue, recipe.hue), 0.0),
        grey=u[8] < recipe.grey,
        blur=u[9] < recipe.blur,
        sigma=_between(u[10], *recipe.sigma),
    )


def check_images(images: Tensor) -> None:
    """Raise ``ValueError`` unless these are uint8 images (B, 3, H, W)."""
    if images.dtype != torch.uint8 or images.dim() != 4 or images.shape[1] != 3:
        raise ValueError(f"expected uint8 images (B, 3, H, W), got {images.dtype} {tuple(images.shape)}")


def _between(uniform: Tensor, low: float, high: float) -> Tensor:
    return low + (high - low) * uniform


def _floor(positive: Tensor) -> Tensor:
    return positive.int().float()
