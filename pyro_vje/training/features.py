"""What a frozen encoder makes of the images, once: the head then trains on these numbers in seconds."""

from __future__ import annotations

import dataclasses
import hashlib
import logging
from pathlib import Path

import lightning
import numpy as np
import torch
from torch import Tensor

from pyro_vje.config import TrainConfig
from pyro_vje.data import CleanView, ImageSet, TwoViews, derive_seed
from pyro_vje.model import VJE, Whitening
from pyro_vje.runs.files import read_json, write_json
from pyro_vje.runs.folder import build_head
from pyro_vje.training.module import Pretraining, quiet_lightning

log = logging.getLogger("pyro_vje")

ROWS = 32
"""Images at once; their views are drawn from a seed of these rows, so that a resumed cache is the same."""


def cache_features(
    vje: VJE,
    images: ImageSet,
    clean: CleanView,
    views: TwoViews,
    folder: Path,
    *,
    augmented: int,
    seed: int,
    device: torch.device | str = "cpu",
) -> tuple[Tensor, ImageSet]:
    """Features ``(N, 1 + augmented, feature_dim)`` of the clean image and of augmented views of it.

    They are written to ``folder/features.npy`` as they are made, ``ROWS`` images at a time, and mapped into memory, so
    that no more than that is held; an interrupted cache goes on where it was.

    Returns
    -------
    tuple
        The features, and the images that could be decoded, in the same order.
    """
    folder.mkdir(parents=True, exist_ok=True)
    path, state = folder / "features.npy", folder / "features.json"
    digest = hashlib.sha256()
    for name, tensor in vje.encoder.state_dict().items():
        digest.update(name.encode() + tensor.detach().cpu().contiguous().numpy().tobytes())
    made = {
        "images": images.fingerprint(),
        "encoder": digest.hexdigest(),
        "views": augmented,
        "seed": seed,
        "size": clean.image_size,
    }
    shape = (len(images), 1 + augmented, vje.feature_dim)
    before = read_json(state, dict) if state.is_file() and path.is_file() else {}
    done, good = 0, torch.zeros(len(images), dtype=torch.bool)
    if before.get("made") == made:
        array = np.lib.format.open_memmap(path, mode="r+")
        done, good[before["good"]] = before["done"], True
    else:
        array = np.lib.format.open_memmap(path, mode="w+", dtype=np.float32, shape=shape)
    vje.eval()
    for start in range(done, len(images), ROWS):
        rows = torch.arange(start, min(start + ROWS, len(images)))
        generator = torch.Generator(device).manual_seed(derive_seed("features", seed, start))
        for index, batch in images.select(rows).batches(ROWS):
            batch = batch.to(device)
            with torch.no_grad():
                found = [vje.features(clean(batch))]
                found += [vje.features(views.one(batch, generator)) for _ in range(augmented)]
            array[rows[index].numpy()] = torch.stack(found, 1).cpu().numpy()
            good[rows[index]] = True
        if (start // ROWS) % 8 == 7 or start + ROWS >= len(images):
            array.flush()
            write_json(
                state, {"made": made, "done": int(rows[-1]) + 1, "good": good.nonzero().flatten().tolist()}
            )
            log.info("features of %d of %d images", int(rows[-1]) + 1, len(images))
    features = torch.from_numpy(array)
    return (features, images) if bool(good.all()) else (features[good], images.select(good))


def fit_whitening(vje: VJE, features: Tensor) -> None:
    """Take the projector's whitening from the clean images' features ``(N, feature_dim)``, if it is one."""
    if isinstance(vje.projector, Whitening):
        vje.projector.fit(features)


def fit_folds(config: TrainConfig, features: Tensor) -> tuple[Tensor, list[VJE]]:
    """For each of ``config.folds`` folds a head that has not seen it: whitening and posterior network on the others.

    Parameters
    ----------
    config : TrainConfig
        Resolved settings of a run with a frozen encoder.
    features : tensor
        ``(N, V, feature_dim)``, as `cache_features` makes them.

    Returns
    -------
    tuple
        The fold of each image, int64 ``(N,)``, and the heads: models whose encoder is the identity, of features.
    """
    generator = torch.Generator().manual_seed(derive_seed("folds", config.seed))
    fold = torch.randperm(len(features), generator=generator) % config.folds
    heads = []
    for k in range(config.folds):
        rest = features[fold != k]
        head = build_head(config, features.shape[-1])
        fit_whitening(head, rest[:, 0])
        settings = dataclasses.replace(config, batch_size=min(config.batch_size or 0, len(rest)))
        with quiet_lightning():
            trainer = lightning.Trainer(
                max_epochs=config.epochs, accelerator="auto", devices=1, logger=False, enable_checkpointing=False,
                enable_progress_bar=False, enable_model_summary=False,
            )  # fmt: skip
            trainer.fit(Pretraining(head, settings, rest))
        heads.append(head.cpu().eval())
        log.info("fold %d of %d", k + 1, config.folds)
    return fold, heads
