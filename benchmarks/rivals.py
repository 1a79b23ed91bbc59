"""What the package is measured against: the same work without Pyro, Lightning or our augmentation."""

from __future__ import annotations

import importlib.util
import math
from collections.abc import Callable, Iterator
from functools import partial

import torch
from PIL import Image
from torch import Tensor, nn
from torch.nn.functional import softplus
from torch.utils.data import DataLoader, Dataset
from torchvision.transforms import v2

from benchmarks.harness import Settings
from pyro_vje import VJE
from pyro_vje.data import TwoViews
from pyro_vje.model.vje import MIN_SCALE


def installed(module: str) -> bool:
    """Whether a rival that is no dependency of ours can be imported."""
    return importlib.util.find_spec(module) is not None


def plain_objective(vje: VJE, views: Tensor, kl_weight: float = 1.0) -> Tensor:
    """The default objective written straight down, of stacked views (2, B, ...) through the model's networks.

    One sample of z, restricted Student-t for the direction, Student-t for the radius; nats an image.
    """
    embeddings = vje.embed(views.flatten(0, 1))
    loc, scale = vje.posterior(embeddings)
    target = embeddings.detach().unflatten(0, (2, -1)).flip(0).flatten(0, 1)
    df, dim = vje.settings.df, loc.shape[-1]
    noise = torch.randn_like(loc)
    z = loc + scale * noise
    log_scale = scale.log().sum(-1)
    kl = 0.5 * (z.square() - noise.square()).sum(-1) - log_scale
    radius, norm = torch.linalg.vector_norm(target, dim=-1), torch.linalg.vector_norm(z, dim=-1)
    mean = z / norm[:, None]
    squared = ((target / radius[:, None] - mean) / scale).square().sum(-1) * vje.settings.unit_radius**2
    direction = _student_t(squared, df, dim) - log_scale + dim * math.log(vje.settings.unit_radius)
    radius_scale = softplus(vje.raw_radius_scale) + MIN_SCALE
    radial = _student_t(((radius - norm) / radius_scale).square(), df, 1) - radius_scale.log()
    return (kl_weight * kl - direction - radial + (dim - 1) * radius.log()).mean()


def _student_t(squared: Tensor, df: float, dim: int) -> Tensor:
    n = (df + dim) / 2
    constant = math.lgamma(n) - math.lgamma(df / 2) - dim / 2 * math.log(df * math.pi)
    return constant - n * torch.log1p(squared / df)


class LoaderViews:
    """Two views of each image by a rival's transform, in a `DataLoader` with a worker a core.

    Iterating gives batches (2, B, 3, S, S) on the device.

    Parameters
    ----------
    images : tensor
        uint8 (N, 3, H, W).
    transform : callable
        From one image (3, H, W) to its two views.
    """

    def __init__(
        self, images: Tensor, batch_size: int, transform: Callable[[Tensor], list[Tensor]], settings: Settings
    ) -> None:
        self.device = settings.device
        self.loader = DataLoader(
            _Pairs(images, transform),
            batch_size,
            shuffle=True,
            drop_last=True,
            num_workers=settings.threads,
            persistent_workers=settings.threads > 0,  # their start is not counted
            pin_memory=self.device.type == "cuda",
        )

    def __iter__(self) -> Iterator[Tensor]:
        for batch in self.loader:
            yield batch.to(self.device, non_blocking=True).transpose(0, 1)


class _Pairs(Dataset[Tensor]):
    def __init__(self, images: Tensor, transform: Callable[[Tensor], list[Tensor]]) -> None:
        self.images = images
        self.transform = transform

    def __len__(self) -> int:
        return len(self.images)

    def __getitem__(self, index: int) -> Tensor:
        return torch.stack(self.transform(self.images[index]))


def torchvision_views(ours: TwoViews) -> Callable[[Tensor], list[Tensor]]:
    """The same recipe in torchvision v2, on uint8 tensors as long as it can."""
    r = ours.recipe
    transform = v2.Compose([
        v2.RandomResizedCrop(ours.image_size, r.scale, r.ratio, antialias=True),
        v2.RandomHorizontalFlip(r.flip),
        v2.RandomApply([v2.ColorJitter(r.brightness, r.contrast, r.saturation, r.hue)], r.jitter),
        v2.RandomGrayscale(r.grey),
        *([v2.RandomApply([v2.GaussianBlur(ours.kernel, r.sigma)], r.blur)] if r.blur else []),
        v2.ToDtype(torch.float32, scale=True),
        v2.Normalize(ours.mean, ours.std),
    ])  # fmt: skip
    return partial(_twice, transform)


def lightly_views(ours: TwoViews) -> Callable[[Tensor], list[Tensor]]:
    """The same recipe in lightly's transform of SimSiam, whose steps are SimCLR's, on PIL images."""
    from lightly.transforms import SimSiamTransform  # type: ignore[import-not-found]

    r = ours.recipe
    transform = SimSiamTransform(
        input_size=ours.image_size,
        cj_prob=r.jitter,
        cj_bright=r.brightness,
        cj_contrast=r.contrast,
        cj_sat=r.saturation,
        cj_hue=r.hue,
        min_scale=r.scale[0],
        random_gray_scale=r.grey,
        gaussian_blur=r.blur,
        sigmas=r.sigma,
        hf_prob=r.flip,
        normalize={"mean": list(ours.mean), "std": list(ours.std)},
    )
    return partial(_of_pil_image, transform)


# At the module's top, so that worker processes can be started by pickling.
def _twice(transform: Callable[[Tensor], Tensor], image: Tensor) -> list[Tensor]:
    return [transform(image), transform(image)]


def _of_pil_image(transform: Callable[[Image.Image], list[Tensor]], image: Tensor) -> list[Tensor]:
    return transform(Image.fromarray(image.movedim(0, -1).numpy()))


def kornia_views(ours: TwoViews) -> Callable[[Tensor], Tensor]:
    """The same recipe in kornia, on whole batches of uint8 images, on their device."""
    import kornia.augmentation as k

    r, size = ours.recipe, (ours.image_size, ours.image_size)
    pipeline = k.AugmentationSequential(
        k.RandomResizedCrop(size, r.scale, r.ratio),
        k.RandomHorizontalFlip(r.flip),
        k.ColorJitter(r.brightness, r.contrast, r.saturation, r.hue, p=r.jitter),
        k.RandomGrayscale(p=r.grey),
        *([k.RandomGaussianBlur((ours.kernel,) * 2, r.sigma, p=r.blur)] if r.blur else []),
        k.Normalize(ours.mean, ours.std),
        data_keys=["input"],
    )
    return lambda images: torch.stack([pipeline(images.float() / 255) for _ in range(2)])


class SimSiam(nn.Module):
    """SimSiam (Chen & He 2021) of lightly's heads and loss, at their default width, on a given encoder."""

    def __init__(self, encoder: nn.Module, feature_dim: int) -> None:
        super().__init__()
        from lightly.loss import NegativeCosineSimilarity  # type: ignore[import-not-found]
        from lightly.models.modules import SimSiamPredictionHead, SimSiamProjectionHead  # type: ignore[import-not-found]

        self.encoder = encoder
        self.projector = SimSiamProjectionHead(feature_dim)
        self.predictor = SimSiamPredictionHead()
        self.criterion = NegativeCosineSimilarity()

    def forward(self, views: Tensor) -> Tensor:
        """Symmetric loss of views (2, B, 3, S, S)."""
        z = [self.projector(self.encoder(view)) for view in views]
        p = [self.predictor(projection) for projection in z]
        return 0.5 * (self.criterion(p[0], z[1].detach()) + self.criterion(p[1], z[0].detach()))
