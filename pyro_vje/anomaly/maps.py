"""Where an image is strange: the density of its places, by a head of places after an encoder's middle stages.

The head is that of images (whitening, posterior network, kernels at reference embeddings), trained on places of normal
images; two views of a place are the place and a neighbour of it. Beside the encoder's pass, which gives the features of
places as well, an image costs one matrix product (`pyro_vje.anomaly.places.PlaceDensity`).
"""

from __future__ import annotations

import logging
import math
import zipfile
from collections.abc import Iterator, Sequence
from pathlib import Path, PurePath
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from PIL import Image
from torch import Tensor

from pyro_vje.anomaly.places import PlaceDensity, PlaceFeatures, share_scales
from pyro_vje.config import ScoreConfig, TrainConfig
from pyro_vje.data import ImageSet, derive_seed
from pyro_vje.data.decode import decode_image, image_shape, list_images, shown_box
from pyro_vje.data.splits import evenly_spread
from pyro_vje.metrics.localisation import PixelCounts
from pyro_vje.model.build import build_head
from pyro_vje.model.encoding import Encoded, cpu_rows, encode_features, images_at_once, in_equal_parts
from pyro_vje.progress import Progress
from pyro_vje.runs import folder as runs
from pyro_vje.training.features import fit_head

log = logging.getLogger("pyro_vje")

REFERENCE = 10_000
"""Places, drawn evenly from the images, that a head learns from; and kernels, a greedy coreset of more of them."""
POOL = 100_000
"""Places, drawn evenly from the images, among which the kernels are chosen."""
PROJECTED = 32
"""Random directions in which they are, as by PatchCore (Roth et al. 2022)."""
IMAGES = 2_000
"""Images, at most, that a head learns from, and again that calibrate it."""
LEAST_CALIBRATION = 20  # images, of 40 or more: enough for a p-value below 0.05
DIM = 128
"""Directions of the whitened features: 96 of 152 lost 0.08 of AUROC on screws."""
SMOOTHING = 0.6
"""Standard deviation of the map's smoothing, in distances of neighbouring places."""
TAIL = 0.03
"""Share of a map's strangest pixels whose mean is the score `places`."""
NAT = 100
"""Levels of a map's file in a nat."""
SHARE = 0.05
"""Share of normal images that show a mark, where no ``alpha`` says another."""
_NEIGHBOURS = ((0, 0), (0, 1), (1, 0), (0, -1), (-1, 0))


def place_head(features: int, dim: int, seed: int = 0, places: int = REFERENCE) -> TrainConfig:
    """Settings of a head of places: those of a frozen encoder's, whatever the run's own are."""
    how: dict[str, Any] = {"encoder": "resnet-small", "encoder_lr_scale": 0.0, "projector": "whiten"}
    config = TrainConfig("images", ".", embedding_dim=min(dim, features), seed=seed, **how)
    return config.resolved().fitted(places)


class Maps:
    """Maps of images by a run's encoder and its head of places.

    ``calibration`` ``(n, 2)`` holds the largest value and the score `places` of the maps of normal images (`peaks`,
    `tails`) that nothing was learned from, and ``floor`` is the least value of these maps.
    """

    def __init__(
        self,
        run: runs.LoadedRun,
        modules: Sequence[str],
        density: PlaceDensity,
        calibration: Tensor | None = None,
        floor: float = 0.0,
    ) -> None:
        self.run, self.device, self.density = run, run.vje.device, density
        self.features = PlaceFeatures(run.vje.encoder, run.info.view_size, modules)
        calibration = torch.empty(0, 2) if calibration is None else calibration
        self.peaks, self.tails = calibration.double().numpy().T
        self.floor = floor
        self._smooth = smoothing(run.info.view_size, self.features.side).to(self.device)

    @torch.no_grad()
    def __call__(self, batch: Tensor) -> tuple[Tensor, Tensor]:
        """Pooled features ``(N, F)`` and maps ``(N, S, S)`` in nats of uint8 images, S the side of what is encoded."""

        def forward(part: Tensor) -> tuple[Tensor, Tensor]:
            return self.features(self.run.info.view(part))

        features, places = in_equal_parts(forward, batch.to(self.device), rows=cpu_rows(batch.shape[-1]))
        return features, self._smooth @ self.density(places) @ self._smooth.T

    def encode_batches(self, images: ImageSet, batch_size: int) -> Iterator[tuple[Encoded, Tensor]]:
        """What the run's model says of the images of each batch, and their maps."""
        for index, batch in images.batches(images_at_once(images, batch_size, self.device)):
            features, maps = self(batch)
            yield encode_features(self.run.vje, features)._replace(indices=index), maps

    def threshold(self, share: float) -> float | None:
        """Above which a map's value is a mark, so that at most this share of normal images shows one.

        That holds for a new normal image as for the calibration images, by the rank of the largest value among
        theirs; ``None`` if these are too few for it.
        """
        rank = math.ceil((1 - share) * (len(self.peaks) + 1) * (1 - 1e-12))
        return float(np.sort(self.peaks)[rank - 1]) if rank <= len(self.peaks) else None

    # Files ------------------------------------------------------------------------------------------------------------

    def levels(self, nats: Any) -> Any:
        """Values of a map's file for those of a map: `NAT` to the nat above ``floor``, rounded down."""
        return np.floor((np.asarray(nats, np.float64) - self.floor) * NAT).clip(0, 65535)

    def write(self, path: Path, nats: Tensor, size: tuple[int, int]) -> None:
        """Write a map ``(S, S)`` as a 16-bit PNG of its image's ``size`` (width, height); 0 where nothing is seen."""
        info = self.run.info
        left, top, right, bottom = shown_box(*size, info.fit)
        margin = (1 - info.view_size / info.image_size) / 2
        across, down = (right - left) * margin, (bottom - top) * margin
        left, top, right, bottom = left + across, top + down, right - across, bottom - down
        seen = Image.fromarray(self.levels(nats.cpu().numpy()).astype(np.float32))
        seen = seen.resize((max(1, round(right - left)), max(1, round(bottom - top))), Image.Resampling.BILINEAR)
        picture = Image.new("F", size)
        picture.paste(seen, (round(left), round(top)))
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(np.asarray(picture).astype(np.uint16)).save(path, compress_level=1)


def smoothing(size: int, side: int) -> Tensor:
    """Weights ``(size, side)`` of a row of places for a row of pixels: a Gaussian's, to sum 1 for each pixel."""
    centres = (torch.arange(side) + 0.5) * size / side
    distance = (torch.arange(size)[:, None] + 0.5 - centres) * side / size / SMOOTHING
    return distance.square().mul(-0.5).softmax(1)


def peaks_and_tails(maps: Tensor) -> Tensor:
    """Largest value of maps ``(N, S, S)``, and mean of the share `TAIL` of the largest, ``(N, 2)``."""
    some = maps[:, 2::4, 2::4].flatten(1)  # of pixels that vary over a dozen
    tail = some.topk(max(1, round(TAIL * some.shape[1]))).values.double().mean(1)
    return torch.stack([maps.flatten(1).amax(1).double(), tail], 1)


def read_levels(path: Path) -> NDArray[np.uint16]:
    """A map's file as ``(H, W)``."""
    with Image.open(path) as image:
        return np.asarray(image).astype(np.uint16)


def map_file(folder: Path, name: str) -> Path:
    """Where the map of an image of this name lies."""
    parts = [part for part in PurePath(name).parts if part not in (PurePath(name).anchor, "..")]
    return folder.joinpath(*parts[:-1], parts[-1] + ".png")


def picture_size(images: ImageSet, i: int) -> tuple[int, int]:
    """Width and height of the file of an image, or of the image itself where it has none."""
    height, width = image_shape(images.paths[i]) or 2 * (images.image_size,)
    return width, height


# Learning -------------------------------------------------------------------------------------------------------------


def learn_maps(ckpt: str | Path, *, places: Sequence[str] = (), trust_plugins: bool = False) -> Path:
    """Learn what places of a finished run's training images look like, for `score` with ``maps``; returns the file.

    ``places`` names modules of the encoder whose outputs describe them (`PlaceFeatures`). The maps are calibrated with
    the images that the run held out; where it held out none, a fifth of its images is kept for that, or 20 of 40 to 99.
    ``ValueError``: the run has no folder, its images are not as they were, or the encoder has no features at places.
    """
    run = runs.load_run(ckpt, trust_plugins=trust_plugins, device=runs.default_device())
    runs.weights_sha256(run)  # which says where there is no folder
    modules = PlaceFeatures(run.vje.encoder, run.info.view_size, places).modules
    known, held_out = runs.training_images(run, "maps are learned from places of the training images")
    seed = derive_seed("maps", run.info.config.seed)
    generator = torch.Generator().manual_seed(seed)
    if held_out is None:
        count = max(len(known) // 5, min(LEAST_CALIBRATION, len(known) // 2))
        order = torch.randperm(len(known), generator=generator)
        known, held_out = known.select(order[count:].sort().values), known.select(order[:count].sort().values)
    known, held_out = (part.select(evenly_spread(len(part), IMAGES)) for part in (known, held_out))
    log.info("maps: learned from %d images, calibrated with %d; places of %s", len(known), len(held_out), modules)
    features = PlaceFeatures(run.vje.encoder, run.info.view_size, modules)
    views, pool = _draw_places(features, run, known, generator)
    head = fit_head(place_head(views.shape[-1], DIM, run.info.config.seed, len(views)), views)
    chosen = coreset(pool @ torch.randn(pool.shape[1], PROJECTED, generator=generator), REFERENCE)
    reference = encode_features(head, pool[chosen])
    scale, kind = share_scales(reference.scale, seed)
    kernels = {"reference": reference.embeddings, "scale": scale, "kind": kind}
    maps = Maps(run, modules, PlaceDensity(head.to(run.vje.device), **kernels))
    found: list[Tensor] = []
    floor, progress = math.inf, Progress("maps of the images that calibrate them", len(held_out))
    for _, batch in held_out.batches(images_at_once(held_out, 64, maps.device)):
        values = maps(batch)[1].cpu()
        found, floor = [*found, peaks_and_tails(values)], min(floor, float(values.min()))
        progress.add(len(batch))
    if not found:
        raise ValueError("not one of the images that calibrate the maps could be decoded")
    calibration = {"calibration": torch.cat(found), "floor": torch.tensor(floor)}
    return runs.save_maps(run, modules, head, kernels | calibration)


@torch.no_grad()
def _draw_places(
    features: PlaceFeatures, run: runs.LoadedRun, images: ImageSet, generator: torch.Generator
) -> tuple[Tensor, Tensor]:
    """Features of `REFERENCE` places and their four neighbours ``(M, 5, C)``, and of `POOL` places ``(P, C)``."""
    device, learned, pool = run.vje.device, [], []
    few, many = (-(-count // len(images)) for count in (REFERENCE, POOL))
    progress = Progress("places", len(images))
    for _, batch in images.batches(images_at_once(images, 64, device)):
        places = features(run.info.view(batch.to(device)))[1].cpu()
        learned.append(with_neighbours(places, few, generator))
        pool.append(with_neighbours(places, many, generator, _NEIGHBOURS[:1])[:, 0])
        progress.add(len(batch))
    if not learned:
        raise ValueError("not one of the images that maps are learned from could be decoded")
    every = torch.cat(learned)
    return every[torch.randperm(len(every), generator=generator)[:REFERENCE]], torch.cat(pool)


def coreset(places: Tensor, count: int) -> Tensor:
    """Indices ``(count,)`` of a greedy coreset of ``(P, C)``: each next place is the farthest from those chosen.

    The k-centre rule of Sener & Savarese (arXiv 1708.00489); all places, if there are no more than ``count``.
    """
    if len(places) <= count:
        return torch.arange(len(places))
    squared, progress = places.square().sum(1), Progress("choosing among places", count, "places")
    chosen, far = [0], torch.full_like(squared, math.inf)
    for _ in range(count - 1):
        last = chosen[-1]
        far = torch.minimum(far, squared - 2 * (places @ places[last]) + squared[last])
        chosen.append(int(far.argmax()))
        progress.add(1)
    return torch.tensor(chosen)


def with_neighbours(
    places: Tensor, quota: int, generator: torch.Generator, around: Sequence[tuple[int, int]] = _NEIGHBOURS
) -> Tensor:
    """``quota`` places of each image, drawn from ``(N, h, h, C)``, and their four neighbours, ``(M, 5, C)``.

    ``around`` are the steps, down and across, to what is taken with each place.
    """
    side = places.shape[1]
    drawn = torch.rand(len(places), side**2, generator=generator).argsort(1)[:, :quota]
    image, views = torch.arange(len(places))[:, None], []
    for down, across in around:
        row, column = drawn // side + down, drawn % side + across
        # Beyond the edge is the neighbour on the other side.
        row, column = (x.abs().where(x < side, torch.full_like(x, side - 2)) for x in (row, column))
        views.append(places[image, row, column])
    return torch.stack(views, 2).flatten(0, 1)


def load_maps(run: runs.LoadedRun) -> Maps:
    """The maps of a run; ``ValueError`` with what to do where it has none."""
    seed = run.info.config.seed
    found = runs.load_maps(run, lambda features, dim: build_head(place_head(features, dim, seed), features))
    if found is None:
        raise ValueError(
            f"the run {run.folder or ''} has learned no maps: pyro-vje maps --ckpt RUN does, from its training images"
        )
    modules, head, tensors = found
    if lacking := {"reference", "scale", "kind", "calibration", "floor"} - tensors.keys():
        raise ValueError(
            f"{run.folder}/{runs.MAPS} lacks {', '.join(sorted(lacking))}: pyro-vje maps learns them again"
        )
    density = PlaceDensity(head.to(run.vje.device), tensors["reference"], tensors["scale"], tensors["kind"])
    return Maps(run, modules, density, tensors["calibration"], float(tensors["floor"]))


# Masks ----------------------------------------------------------------------------------------------------------------


def find_masks(masks: Path, images: ImageSet, normal: Sequence[bool]) -> dict[int, Path]:
    """The mask of each image, by position: a file of the same path within ``masks``, whatever its suffix.

    Its name may end in ``_mask``. Images that are ``normal`` by their label need none. ``ValueError``: an image has
    neither, or a mask another size than its image.
    """
    known = {_stem(path.relative_to(masks)): path for path in list_images(masks)}
    found, missing = {}, []
    for i, name in enumerate(images.names):
        path = known.get(_stem(PurePath(name)))
        if path is None:
            missing += [] if normal[i] else [name]
            continue
        size, shape = picture_size(images, i), image_shape(path)
        if shape is not None and shape != size[::-1]:
            raise ValueError(
                f"{path} has {shape[1]} x {shape[0]} pixels, its image {images.paths[i]} {size[0]} x {size[1]}: a mask "
                "must be of its image's size"
            )
        found[i] = path
    if missing:
        raise ValueError(
            f"{len(missing)} images have no mask in {masks}, among them {missing[0]}, and no label says that they are "
            "normal: a black one says that nothing is wrong"
        )
    return found


def _stem(path: PurePath) -> str:
    return path.with_suffix("").as_posix().removesuffix("_mask")


def read_mask(path: Path) -> NDArray[np.bool_]:
    """A mask as booleans ``(H, W)``: of 0 and 1, or white above the middle; ``ValueError`` if it is of neither kind."""
    grey = decode_image(path).amax(0).numpy()
    if 1 < (most := int(grey.max())) < 128:
        raise ValueError(f"{path} has values up to {most}: a mask is black (0) and white (255), or of 0 and 1")
    return grey > most // 2


def describe_maps(
    maps: Maps,
    folder: Path,
    settings: ScoreConfig,
    images: ImageSet,
    scored: Sequence[int],
    peaks: NDArray[np.float64],
    masks: dict[int, Path],
) -> dict[str, Any]:
    """What the summary says of the maps in ``folder``: of the images ``scored``, whose largest values are ``peaks``.

    Compares them with masks and writes them as one ``.npz``, where the settings ask for it.
    """
    share = SHARE if settings.alpha is None else settings.alpha
    threshold = maps.threshold(share)
    if settings.maps_npz:
        write_npz(folder.with_name(f"{folder.name}.npz"), folder, images, scored, maps.floor)
    return {
        "folder": str(folder),
        "places": maps.features.modules,
        "places_an_image": maps.features.side**2,
        "reference_places": maps.density.count,
        "nats": f"level / {NAT} + {maps.floor:.6g}: -log density of the place, up to a constant",
        "calibration_images": len(maps.peaks),
        "normal_images_with_a_mark": share,
        "threshold": threshold,
        "threshold_level": None if threshold is None else int(maps.levels(threshold)),
        "ordinary_level": int(maps.levels(np.median(maps.peaks))),
        "marked_images": None if threshold is None else int((peaks > threshold).sum()),
        "metrics": pixel_metrics(folder, images, scored, masks) if settings.masks is not None else None,
    }


def pixel_metrics(
    folder: Path, images: ImageSet, scored: Sequence[int], masks: dict[int, Path]
) -> dict[str, Any] | None:
    """`PixelCounts` of the maps in a folder, over all images that were scored; one without a mask has no defect."""
    counts, progress = PixelCounts(), Progress("comparing maps with masks", len(scored))
    for i in scored:
        levels = read_levels(map_file(folder, images.names[i]))
        counts.add(levels, read_mask(masks[i]) if i in masks else np.zeros(levels.shape, bool))
        progress.add(1)
    return counts.metrics()


def write_npz(path: Path, folder: Path, images: ImageSet, scored: Sequence[int], floor: float) -> Path:
    """Write all maps as one ``.npz``: float32 nats above ``floor`` ``(H, W)`` by the names of their images."""
    temporary = path.with_name(f".{path.name}.tmp")
    with zipfile.ZipFile(temporary, "w", zipfile.ZIP_DEFLATED) as archive:
        for i in scored:
            with archive.open(f"{images.names[i]}.npy", "w", force_zip64=True) as file:
                nats = read_levels(map_file(folder, images.names[i])).astype(np.float32) / NAT + np.float32(floor)
                np.lib.format.write_array(file, nats)
    temporary.replace(path)
    return path
