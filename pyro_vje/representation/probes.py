"""The linear probe by SGD on augmented images, as self-supervised methods report it."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import cross_entropy, linear

from pyro_vje.data import CleanView, ImageSet, Recipe, TwoViews, derive_seed, views_for
from pyro_vje.progress import Progress


def probe_views(dataset: str, view: CleanView) -> TwoViews:
    """Random resized crop (torchvision's, 0.08 to 1 of the area) and horizontal flip, normalised as ``view`` is.

    Where the data set's own views never flip, as a digit has one orientation, their crop is taken and nothing flipped.
    """
    own = views_for(dataset, view.image_size)[0].recipe
    scale, flip = ((0.08, 1.0), 0.5) if own.flip else (own.scale, 0.0)
    recipe = Recipe(scale=scale, flip=flip, jitter=0.0, grey=0.0)
    return TwoViews(view.image_size, recipe, view.mean, view.std)


def sgd_probe(
    features: Callable[[Tensor], Tensor],
    train_set: ImageSet,
    test_features: Tensor,
    test_labels: Tensor,
    views: TwoViews,
    *,
    epochs: int = 90,
    batch_size: int = 256,
    seed: int = 0,
    device: str | torch.device = "cpu",
) -> dict[str, Any]:
    """``accuracy`` of a linear layer trained by SGD on features of augmented images, with the protocol behind it.

    Learning rate 0.1 · batch / 256 with a cosine schedule to 0, momentum 0.9, no weight decay. Every epoch draws new
    views (`probe_views`) and so takes a forward pass of the encoder over all training images; unlabelled ones are left
    out. ``features`` takes normalised images ``(B, 3, S, S)`` to features ``(B, F)``, frozen and in evaluation mode;
    the clean test images' features ``(M, F)`` are looked at once, after the last epoch. Raises ``ValueError`` for
    settings or labels that make no probe, and ``FloatingPointError`` if the weights do not stay finite.
    """
    if epochs < 1 or batch_size < 1:
        raise ValueError(f"epochs and batch_size must be at least 1, got {epochs} and {batch_size}")
    train_set = train_set.labelled()
    labels = train_set.labels_at(torch.arange(len(train_set)))
    if (labels == labels[0]).all():
        raise ValueError(f"a linear probe needs two classes, but all training labels are {labels[0]}")
    batch_size = min(batch_size, len(train_set))
    lr = 0.1 * batch_size / 256
    generator = torch.Generator().manual_seed(derive_seed("probe", seed))
    view_generator = torch.Generator(device).manual_seed(derive_seed("probe views", seed))
    # The usual start of this probe (MoCo, SimSiam): small weights, no bias.
    weight = torch.empty(int(labels.max()) + 1, test_features.shape[1]).normal_(0, 0.01, generator=generator)
    weight = weight.to(device).requires_grad_()
    bias = torch.zeros(len(weight), device=device, requires_grad=True)
    optimizer = torch.optim.SGD([weight, bias], lr=lr, momentum=0.9)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, epochs)
    progress = Progress("linear probe by SGD", epochs, "epochs")
    for _ in range(epochs):
        order = torch.randperm(len(train_set), generator=generator)
        # A reordered copy of a set in memory would double it; a streamed one is read ahead.
        parts = order.split(batch_size) if train_set.in_memory else [order]
        batches = ((part[at], x) for part in parts for at, x in train_set.select(part).batches(batch_size))
        for index, images in batches:
            with torch.no_grad():
                inputs = features(views.one(images.to(device), view_generator))
            loss = cross_entropy(linear(inputs, weight, bias), labels[index].to(device))
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
        schedule.step()
        progress.add(1)
    if not (weight.isfinite().all() and bias.isfinite().all()):
        raise FloatingPointError(f"the linear probe by SGD diverged at lr {lr:g}: the features are too large")
    with torch.no_grad():
        predicted = linear(test_features.to(device), weight, bias).argmax(1)
    scale, flip = views.recipe.scale, views.recipe.flip
    augmentation = f"random resized crop of {scale[0]} to {scale[1]} of the area, flip {flip}"
    protocol: dict[str, Any] = {"classifier": "linear layer by SGD", "lr": lr, "momentum": 0.9}
    protocol |= {"weight_decay": 0.0, "schedule": "cosine to 0 by epoch", "epochs": epochs, "epoch": "last"}
    protocol |= {"batch_size": batch_size, "augmentation": augmentation, "seed": seed}
    protocol |= {"train_images": len(labels), "test_images": len(test_labels)}
    return {"accuracy": (predicted == test_labels.to(device)).double().mean().item(), **protocol}
