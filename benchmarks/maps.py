"""``python -m benchmarks.maps``: anomaly maps against k-NN and Gaussians at places, on the same frozen features.

Everything but the encoder's pass is timed in seconds of one CPU thread's own time, so that other work on the machine
does not count.
"""

from __future__ import annotations

import argparse
import shlex
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from benchmarks.__main__ import describe
from benchmarks.harness import Settings, compare
from pyro_vje import metrics
from pyro_vje.anomaly import maps as own
from pyro_vje.anomaly.places import KINDS, PlaceDensity, PlaceFeatures, share_scales
from pyro_vje.config import TrainConfig
from pyro_vje.data import load_dataset, load_train_set
from pyro_vje.data.decode import decode_image
from pyro_vje.metrics.localisation import PixelCounts
from pyro_vje.model.build import build_head, build_model
from pyro_vje.model.encoding import encode_features
from pyro_vje.model.vje import VJE
from pyro_vje.runs import folder as runs
from pyro_vje.runs.files import write_json
from pyro_vje.training.features import fit_head

STEEL = ("crazing", "inclusion", "patches", "pitted_surface", "rolled-in_scale", "scratches")
REWEIGHTED = 9  # neighbours of the nearest reference place in PatchCore's score of an image
SMALL = 1_000  # places of the references that are thinned by either rule
Maps = Callable[[Tensor], Tensor]  # features of places (N, h, h, C) to maps (N, h, h)


def nearest(reference: Tensor) -> Maps:
    """Distance of each place to the nearest reference place: PatchCore (Roth et al. 2022) without its thinning."""

    def score(places: Tensor) -> Tensor:
        return torch.stack([torch.cdist(x, reference).amin(1) for x in places.flatten(1, 2)]).view(places.shape[:3])

    return score


def patchcore(reference: Tensor) -> Callable[[Tensor], Tensor]:
    """PatchCore's score of images: the largest distance, less where the nearest reference place has few near it."""

    def score(places: Tensor) -> Tensor:
        found = []
        for image in places.flatten(1, 2):
            distances, which = torch.cdist(image, reference).min(1)
            strangest = distances.argmax()
            near = torch.cdist(reference[which[strangest]][None], reference)[0].topk(REWEIGHTED, largest=False)[1]
            to_near = torch.cdist(image[strangest][None], reference[near])[0]
            share = (distances[strangest] - to_near.logsumexp(0)).exp()
            found.append((1 - share) * distances[strangest])
        return torch.stack(found)

    return score


def gaussians(places: Tensor) -> Maps:
    """Mahalanobis distance to the Gaussian of each place over the normal images: PaDiM (Defard et al. 2021)."""
    x = places.flatten(1, 2)
    mean = x.mean(0)
    identity, found = torch.eye(x.shape[-1]), []
    for i in range(x.shape[1]):
        centred = x[:, i] - mean[i]
        found.append(torch.linalg.inv(centred.T @ centred / (len(x) - 1) + 1e-2 * _scale(x) * identity))
    inverse = torch.stack(found)

    def score(places: Tensor) -> Tensor:
        t = places.flatten(1, 2) - mean
        return torch.einsum("npc,pcd,npd->np", t, inverse, t).clamp_min(0).sqrt().view(places.shape[:3])

    return score


def _scale(x: Tensor) -> float:
    """Mean variance of a feature: PaDiM adds 0.01 to features of unit variance, those here are normalised."""
    return float(x.flatten(0, 1).var(0).mean())


def load(encoder: str, weights: str, size: int, train: Path, seed: int) -> tuple[runs.LoadedRun, Any]:
    """A frozen encoder as a run has it, and the normal images."""
    config = TrainConfig(
        "images", str(train), encoder=encoder, weights=weights, image_size=size, encoder_lr_scale=0.0, seed=seed
    ).resolved()
    images, _ = load_train_set(config, *runs.decoded_as(config))
    info = runs.describe_run(config, images)
    vje = build_model(config, info.view_size, weights=weights)
    return runs.LoadedRun(vje.eval().requires_grad_(False), info, None), images


def features(run: runs.LoadedRun, images: Any) -> Tensor:
    """Features of all places of all images, ``(N, h, h, C)``."""
    places = PlaceFeatures(run.vje.encoder, run.info.view_size)
    with torch.no_grad():
        return torch.cat([places(run.info.view(batch))[1].half() for _, batch in images.batches(32)])


def masks_of(run: runs.LoadedRun, images: Any, folder: Path | None) -> list[Any] | None:
    """Masks of what the encoder sees."""
    if folder is None:
        return None
    info, found = run.info, []
    edge = (info.image_size - info.view_size) // 2
    for name in images.names:
        path, seen = folder / Path(name).with_suffix(".png"), slice(edge, edge + info.view_size)
        mask = np.zeros((info.image_size,) * 2, bool)
        if path.is_file():
            mask = decode_image(path, info.image_size, "bilinear", info.fit)[0].numpy() > 127
        found.append(mask[seen, seen])
    return found


def measure(
    name: str, score: Maps, places: Tensor, labels: Any, masks: Any, smooth: Tensor, image_score: Any = None
) -> dict[str, Any]:
    """AUROC of images by the largest value and by the upper tail of smoothed maps, pixel metrics, seconds an image."""
    began, found = time.process_time(), []
    for part in places.split(8):
        found.append(smooth @ score(part.float()) @ smooth.T)
    seconds = (time.process_time() - began) / len(places)
    drawn = torch.cat(found)
    largest = own.peaks_and_tails(drawn).numpy()
    row = {"method": name, "auroc_largest": metrics.auroc(largest[:, 0], labels), "seconds_an_image": seconds}
    row["auroc_tail"] = metrics.auroc(largest[:, 1], labels)
    if image_score is not None:
        row["auroc_own_rule"] = metrics.auroc(torch.cat([image_score(x.float()) for x in places.split(8)]), labels)
    if masks is not None:
        low, high, counts = float(drawn.min()), float(drawn.max()), PixelCounts()
        levels = ((drawn - low) / (high - low) * 65535).numpy().astype(np.uint16)
        for image, mask in zip(levels, masks, strict=True):
            counts.add(image, mask)
        row |= counts.metrics() or {}
    print({key: round(value, 4) if isinstance(value, float) else value for key, value in row.items()}, flush=True)
    return row


def density(head: VJE, places: Tensor, seed: int) -> PlaceDensity:
    """Our density, with kernels at places."""
    encoded = encode_features(head, places)
    return PlaceDensity(head, encoded.embeddings, *share_scales(encoded.scale, seed))


def task(
    run: runs.LoadedRun, normal: Tensor, test: Tensor, labels: Any, masks: Any, seed: int, thin: bool
) -> list[Any]:
    """A row for each method on one set of normal images; ours and k-NN look at the same reference places."""
    generator = torch.Generator().manual_seed(seed)
    views = own.with_neighbours(normal.float(), -(-own.REFERENCE // len(normal)), generator)
    views = views[torch.randperm(len(views), generator=generator)[: own.REFERENCE]]
    every, random = normal.flatten(0, 2), views[:, 0]
    began = time.process_time()
    projected = every.float() @ torch.randn(random.shape[1], own.PROJECTED, generator=generator)
    reference = every[own.coreset(projected, own.REFERENCE)].float()
    thinned = time.process_time() - began
    head = fit_head(own.place_head(views.shape[-1], own.DIM, seed, len(views)), views)
    mine = density(head, reference, seed)
    seconds = time.process_time() - began
    smooth, count, dim = own.smoothing(run.info.view_size, test.shape[1]), len(reference), reference.shape[1]
    rows = [measure("ours", mine, test, labels, masks, smooth)]
    width = head.embedding_dim
    rows[-1] |= {"fit_seconds": seconds, "kept_mb": (count + KINDS + dim) * width * 4 / 1e6}
    rows.append(measure("k-NN at places", nearest(reference), test, labels, masks, smooth, patchcore(reference)))
    rows[-1] |= {"fit_seconds": thinned, "kept_mb": reference.numel() * 4 / 1e6}
    began = time.process_time()
    padim = gaussians(normal.float())
    seconds = time.process_time() - began
    rows.append(measure("Gaussian at each place", padim, test, labels, masks, smooth))
    rows[-1] |= {"fit_seconds": seconds, "kept_mb": normal.shape[1] ** 2 * dim * (dim + 1) * 4 / 1e6}
    if thin:
        for how, few in {
            f"{own.REFERENCE:,} random": random,
            f"{SMALL:,} random": random[:SMALL],
            f"{SMALL:,} greedy coreset": reference[:SMALL],  # as each was the farthest from those before it
        }.items():
            for name, score in (("ours", density(head, few, seed)), ("k-NN at places", nearest(few))):
                rows.append(measure(f"{name}, {how}", score, test, labels, masks, smooth))
    return rows


def speed(run: runs.LoadedRun, places: int = own.REFERENCE) -> dict[str, Any]:
    """Time of maps, the encoder's pass among it, against the bare pass, a batch of 8 images on one thread."""
    size = run.info.image_size
    found = PlaceFeatures(run.vje.encoder, run.info.view_size)
    head = build_head(own.place_head(found.dim, own.DIM), found.dim).eval()
    scale, kind = share_scales(0.5 + torch.rand(places, head.embedding_dim), 0)
    kernels = PlaceDensity(head, torch.randn(places, head.embedding_dim), scale, kind)
    maps = own.Maps(run, found.modules, kernels)
    batch = torch.randint(0, 256, (8, 3, size, size), dtype=torch.uint8)

    def bare() -> None:
        with torch.no_grad():
            run.vje.encoder(run.info.view(batch))

    times = compare(lambda: own.peaks_and_tails(maps(batch)[1]), bare, 7, clock=time.process_time)
    ratios = sorted(a / b for a, b in zip(*times, strict=True))
    return {
        "reference_places": places,
        "places_an_image": found.side**2,
        "ratio": ratios[len(ratios) // 2],
        "ratio_min": ratios[0],
        "ratio_max": ratios[-1],
        "images_a_second": 8 / float(np.median(times[0])),
        "images_a_second_bare": 8 / float(np.median(times[1])),
    }


def main(arguments: Sequence[str] | None = None) -> None:
    """Measure everything, and write what there is after each set of images."""
    arguments = sys.argv[1:] if arguments is None else list(arguments)
    parser = argparse.ArgumentParser(prog="python -m benchmarks.maps", description=__doc__)
    parser.add_argument("--data", type=Path, default=Path(".data/inspection"))
    parser.add_argument("--encoder", default="timm:tf_efficientnet_lite0")
    parser.add_argument("--weights", default="default")
    parser.add_argument("--size", type=int, default=224)
    parser.add_argument("--sets", nargs="+", default=["tile", "screw", "steel"])
    parser.add_argument("--every", type=int, default=1, help="of the test images every so many-th")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--out", type=Path, required=True)
    options = parser.parse_args(arguments)
    torch.set_num_threads(1)
    command = shlex.join(["python", "-m", "benchmarks.maps", *arguments])
    about = describe(command, Settings(False, 1, "32-true")) | {"seed": options.seed, "encoder": options.encoder}
    about |= {"weights": options.weights, "image_size": options.size, "every": options.every}
    about["data"] = "magnetic tiles, screws, steel"
    result: dict[str, Any] = {**about, "rows": []}
    how = (options.encoder, options.weights, options.size)
    for name in options.sets:
        if name == "steel":
            rows = steel(options.data / name, how, options.seed, options.every)
        else:
            run, images = load(*how, options.data / name / "train", options.seed)
            test = runs.load_split(run, "all", "folder", options.data / name / "test", residency="stream")
            test = test.select(torch.arange(0, len(test), options.every))
            labels = (test.labels != test.class_index("good")).numpy()
            masks = masks_of(run, test, options.data / name / "masks" if name == "tile" else None)
            rows = task(run, features(run, images), features(run, test), labels, masks, options.seed, True)
            result.setdefault("speed", speed(run))
        result["rows"] += [{"set": name, **row} for row in rows]
        write_json(options.out, result)


def steel(folder: Path, how: tuple[str, str, int], seed: int, every: int) -> list[Any]:
    """Means over the six kinds, each against the other five: every second image to learn from, the rest to test."""
    run, _ = load(*how, folder, seed)
    images = load_dataset("folder", folder, "all", image_size=run.info.image_size, interpolation=run.info.interpolation)
    if images.classes != STEEL:
        raise ValueError(f"{folder} does not hold the six kinds {', '.join(STEEL)}")
    known, tests = (images.select(torch.arange(k, len(images), step)) for k, step in ((0, 2), (1, 2 * every)))
    places, test = features(run, known), features(run, tests)
    found = []
    for kind in range(len(STEEL)):
        strange = (tests.labels_at(torch.arange(len(tests))) != kind).numpy()
        found.append(
            task(run, places[known.labels_at(torch.arange(len(known))) == kind], test, strange, None, seed, False)
        )
    means = []
    for rows in zip(*found, strict=True):
        numbers = {key: float(np.mean([row[key] for row in rows])) for key in rows[0] if key != "method"}
        means.append({"method": rows[0]["method"], **numbers})
    return means


if __name__ == "__main__":
    main()
