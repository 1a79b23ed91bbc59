"""The linear probe by SGD on augmented images, as self-supervised methods report it."""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import cross_entropy, linear

from pyro_vje.data import CleanView, ImageSet, Recipe, TwoViews, derive_seed, views_for

log = logging.getLogger("pyro_vje")

BASE_LR, MOMENTUM = 0.1, 0.9


def probe_views(dataset: str, view: CleanView) -> TwoViews:
    """Random resized crop and horizontal flip for a data set, nothing else, normalised as ``view`` is.

    The crop is torchvision's, 0.08 to 1 of the area. Where the data set's own views never flip, as a digit has one
    orientation, their crop is taken and nothing is flipped.
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
    views (`probe_views`) and so takes a forward pass of the encoder over all training images. ``features`` takes
    normalised images ``(B, 3, S, S)`` to features ``(B, F)``, frozen and in evaluation mode; the clean test images'
    features ``(M, F)`` are looked at once, after the last epoch. Training images that cannot be decoded or have no
    label are left out; ``seed`` draws the layer's start, the order and the views. Raises ``ValueError`` for settings
    or labels that make no probe, and ``FloatingPointError`` if the weights do not stay finite.
    """
    if epochs < 1 or batch_size < 1:
        raise ValueError(f"epochs and batch_size must be at least 1, got {epochs} and {batch_size}")
    train_set = train_set.labelled()
    labels = train_set.labels_at(torch.arange(len(train_set)))
    if (labels == labels[0]).all():
        raise ValueError(f"a linear probe needs two classes, but all training labels are {labels[0]}")
    batch_size = min(batch_size, len(train_set))
    lr = BASE_LR * batch_size / 256
    generator = torch.Generator().manual_seed(derive_seed("probe", seed))
    view_generator = torch.Generator(device).manual_seed(derive_seed("probe views", seed))
    # The usual start of this probe (MoCo, SimSiam): small weights, no bias.
    weight = torch.empty(int(labels.max()) + 1, test_features.shape[1]).normal_(0, 0.01, generator=generator)
    weight = weight.to(device).requires_grad_()
    bias = torch.zeros(len(weight), device=device, requires_grad=True)
    optimizer = torch.optim.SGD([weight, bias], lr=lr, momentum=MOMENTUM)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, epochs)
    for epoch in range(1, epochs + 1):
        order = torch.randperm(len(train_set), generator=generator)
        for index, images in _batches(train_set, order, batch_size):
            with torch.no_grad():
                inputs = features(views.one(images.to(device), view_generator))
            loss = cross_entropy(linear(inputs, weight, bias), labels[index].to(device))
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
        schedule.step()
        if epoch % max(1, epochs // 5) == 0:
            log.info(
                "linear probe by SGD: epoch %d/%d, loss of the last batch %.3f", epoch, epochs, loss.item()
            )
    if not (weight.isfinite().all() and bias.isfinite().all()):
        raise FloatingPointError(f"the linear probe by SGD diverged at lr {lr:g}: the features are too large")
    with torch.no_grad():
        predicted = linear(test_features.to(device), weight, bias).argmax(1)
    scale, flip = views.recipe.scale, views.recipe.flip
    return {
        "accuracy": (predicted == test_labels.to(device)).double().mean().item(),
        "classifier": "linear layer by SGD",
        "lr": lr,
        "schedule": "cosine to 0 by epoch",
        "momentum": MOMENTUM,
        "weight_decay": 0.0,
        "epochs": epochs,
        "epoch": "last",
        "batch_size": batch_size,
        "augmentation": f"random resized crop of {scale[0]} to {scale[1]} of the area, flip {flip}",
        "seed": seed,
        "train_images": len(labels),
        "test_images": len(test_labels),
    }


def _batches(images: ImageSet, order: Tensor, batch_size: int) -> Iterator[tuple[Tensor, Tensor]]:
    """Indices into the set and uint8 images, in ``order``."""
    if isinstance(images.images, Tensor):  # a reordered copy of the whole set would double its memory
        for index in order.split(batch_size):
            yield index, images.images[index]
    else:
        for index, batch in images.select(order).batches(batch_size):
            yield order[index], batch
