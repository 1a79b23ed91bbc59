"""The run folder: what training leaves behind, and how it becomes a model again.

::

    RUN/config.json           settings, image size, classes, versions
    RUN/weights.safetensors   weights; its header repeats config.json, so that the file stands alone
    RUN/calibration.safetensors   embeddings and posteriors of held-out images, which calibrate scores
    RUN/reference.safetensors     the same of images that were trained on, at most 10,000: the score `aggregate`
    RUN/folds.safetensors     of a frozen encoder: heads that have each not seen a fold of the images
    RUN/maps.safetensors      of `pyro_vje maps`: a head of places, kernels, and what calibrates them
    RUN/held_out.json         names of the held-out images
    RUN/metrics.csv           a row for each epoch
    RUN/checkpoints/          what resuming needs
    RUN/pictures/             training curves
"""

from __future__ import annotations

import dataclasses
import json
import os
import platform
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path
from typing import Annotated, Any, TypeVar, cast

import torch
from pydantic import ConfigDict, Field, ValidationError
from pydantic.dataclasses import dataclass as checked_dataclass
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor, nn

from pyro_vje.config import TrainConfig, fields_of
from pyro_vje.data import CleanView, ImageSet, TwoViews, find_dataset, load_dataset, load_train_set
from pyro_vje.data.datasets import recipe_for
from pyro_vje.model.build import build_head, build_model
from pyro_vje.model.encoding import Encoded
from pyro_vje.model.pretrained import LIBRARIES, Preprocessing, preprocessing
from pyro_vje.model.vje import VJE
from pyro_vje.plugins import is_reference
from pyro_vje.runs.files import check_form, parse_json, read_json, sha256, write_atomic, write_json

T = TypeVar("T")

SCHEMA_VERSION = 4
CONFIG, HELD_OUT, METRICS = "config.json", "held_out.json", "metrics.csv"
WEIGHTS, CALIBRATION = "weights.safetensors", "calibration.safetensors"
REFERENCE, FOLDS, MAPS = "reference.safetensors", "folds.safetensors", "maps.safetensors"
CHECKPOINTS, PICTURES, CACHE = "checkpoints", "pictures", "cache"
HEADER_KEY = "pyro_vje"
POSTERIOR = Encoded._fields[:3]  # what is kept of images: embeddings, loc, scale


def versions() -> dict[str, str]:
    """Versions of what makes the numbers: Python, this package and those under it."""
    packages = ("pyro-vje", "torch", "torchvision", "pyro-ppl", "lightning")
    return {"python": platform.python_version(), **{name: version(name) for name in packages}}


def check_version(values: Any) -> dict[str, Any]:
    """The content of ``config.json`` or of a file's header, if it is of `SCHEMA_VERSION`; else a ``ValueError``."""
    version = values.get("schema_version") if isinstance(values, dict) else None
    if type(version) is not int:
        raise ValueError("schema_version is missing or no number: not written by pyro-vje")
    if version != SCHEMA_VERSION:
        raise ValueError(
            f"schema version {version}, but this pyro-vje reads {SCHEMA_VERSION}: use the version that wrote it"
        )
    return values


Side = Annotated[int, Field(ge=1, le=8192)]
Share = Annotated[float, Field(ge=0, le=1)]
Scale = Annotated[float, Field(gt=0, le=1)]
FromList = Field(strict=False)  # which JSON has in place of tuples
Three = Field(strict=False, min_length=3, max_length=3)


@checked_dataclass(frozen=True, config=ConfigDict(strict=True))
class RunInfo:
    """What a run was trained with and on: the content of ``config.json`` and of the weights' header."""

    config: TrainConfig  # with the data set's defaults filled in
    image_size: Side  # pixels of the square images as they are decoded
    mean: Annotated[tuple[Share, ...], Three]  # of each channel, as is std
    std: Annotated[tuple[Scale, ...], Three]
    classes: Annotated[tuple[str, ...], FromList] | None  # of the training data, if it has labels
    train_images: int
    view_size: Side  # what the encoder sees, a central square: less than image_size for a pretrained one
    interpolation: str = "bilinear"  # how image files are resized, or bicubic
    fingerprint: str | None = None  # of the images (`pyro_vje.data.ImageSet.fingerprint`)

    @property
    def fit(self) -> str:
        """How images that are not square become so (`pyro_vje.data.decode_image`)."""
        return self.config.fit or "crop"

    @property
    def view(self) -> CleanView:
        """The deterministic view of an image that evaluation and scoring encode."""
        return CleanView(self.view_size, self.mean, self.std, crop=self.view_size < self.image_size)

    def class_name(self, which: str | None) -> str | None:
        """The name of a class that is given by name or by its index here: an index means nothing elsewhere."""
        known = self.classes or ()
        if which is None or which in known or not which.isdecimal() or int(which) >= len(known):
            return which
        return known[int(which)]

    @property
    def views(self) -> TwoViews:
        """The augmented views of training."""
        views = TwoViews(self.view_size, recipe_for(self.config.dataset, self.view_size), self.mean, self.std)
        least, (low, high) = self.config.crop_scale, views.recipe.scale
        views.recipe = dataclasses.replace(views.recipe, scale=(least or low, high))
        return views

    def to_dict(self) -> dict[str, Any]:
        """JSON-ready form, with the schema version and the versions of what made it."""
        values = {**vars(self), "config": self.config.to_dict(), "versions": versions()}
        return {"schema_version": SCHEMA_VERSION, **values}

    @classmethod
    def from_dict(cls, values: Any) -> RunInfo:
        """Read `to_dict`'s form; a ``ValueError`` says what is wrong in it."""
        values = check_version(values)
        known = {name: value for name, value in values.items() if name in fields_of(cls)}
        if isinstance(known.get("config"), dict):
            known["config"] = TrainConfig.from_dict(known["config"]).resolved()
        try:
            return cls(**known)
        except ValidationError as error:
            first = error.errors(include_url=False)[0]
        name = ".".join(map(str, first["loc"]))
        if name not in known and first["type"] == "missing":
            raise ValueError(f"{name} is missing")
        raise ValueError(f"{name}: {first['msg']}, not {first['input']!r}")


@dataclass(frozen=True)
class LoadedRun:
    """A trained model in evaluation mode, what it was trained with, and its run folder if it has one."""

    vje: VJE
    info: RunInfo
    folder: Path | None


def describe_run(config: TrainConfig, train_set: ImageSet) -> RunInfo:
    """Collect what a new run will be described by."""
    wanted, own, size = _preprocessing(config), find_dataset(config.dataset), train_set.image_size
    view_size = round(size * wanted.crop) if wanted and config.fit == "crop" else size
    mean, std = (wanted.mean, wanted.std) if wanted else (own.mean, own.std)
    return RunInfo(
        config=config,
        image_size=size,
        mean=tuple(mean),
        std=tuple(std),
        classes=train_set.classes,
        train_images=len(train_set),
        view_size=view_size,
        interpolation=wanted.interpolation if wanted else "bilinear",
        fingerprint=train_set.fingerprint(),
    )


def decoded_as(config: TrainConfig) -> tuple[int | None, str]:
    """Side in pixels and interpolation at which a run's image files are decoded; ``None``: the data set's own side."""
    wanted = _preprocessing(config)
    if wanted is None:
        return config.image_size, "bilinear"
    crop = wanted.crop if config.fit == "crop" else 1.0
    return round((config.image_size or wanted.image_size) / crop), wanted.interpolation


def _preprocessing(config: TrainConfig) -> Preprocessing | None:
    """How the encoder wants its images, where its weights are pretrained and it says so."""
    return None if config.weights == "none" else preprocessing(config.encoder or "")


def save_weights(folder: Path, vje: VJE, info: RunInfo) -> Path:
    """Write ``weights.safetensors`` (with the run's description in its header) and ``config.json``."""
    write_json(folder / CONFIG, info.to_dict())
    return _save(folder / WEIGHTS, vje.state_dict(), info.to_dict())


def save_posteriors(path: Path, posteriors: Encoded) -> Path:
    """Write embeddings and posteriors of a run's images: 12 bytes a feature and image."""
    kept = {name: x for name, x in posteriors._asdict().items() if name in (*POSTERIOR, "log_rotation")}
    return _save(path, {name: x for name, x in kept.items() if x is not None})


def save_folds(path: Path, fold: Tensor, heads: Sequence[VJE], features: Tensor) -> Path:
    """Write what cross-conformal p-values need: each image's fold and features, and the head that has not seen it."""
    return _save(path, {"fold": fold, "features": features, **nn.ModuleList(heads).state_dict()})


def _save(path: Path, tensors: Mapping[str, Tensor], header: dict[str, Any] | None = None) -> Path:
    text = json.dumps(header or {"schema_version": SCHEMA_VERSION})
    state = {name: value.detach().cpu().contiguous() for name, value in tensors.items()}

    def write(place: Path) -> None:  # not by way of bytes, which would be another copy in memory
        try:
            save_file(state, place, {HEADER_KEY: text})
        except SafetensorError as error:  # a full disk too
            raise OSError(str(error)) from None

    return write_atomic(path, write)


def _read(path: Path, read: Callable[[Any], T]) -> tuple[T, dict[str, Tensor]]:
    """What ``read`` makes of this package's entry in the header of a safetensors file ({}: none), and its tensors."""
    try:
        with safe_open(path, framework="pt") as file:
            header = (file.metadata() or {}).get(HEADER_KEY, "{}")
            tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 (no dict)
    except (SafetensorError, OSError, ValueError) as error:
        raise ValueError(f"{path} is no readable safetensors file: {error}") from None
    try:
        return read(parse_json(header)), tensors
    except ValueError as error:
        raise ValueError(f"header of {path}: {error}") from None


def _kept(run: LoadedRun, name: str) -> tuple[Path, dict[str, Tensor]] | None:
    """Path and tensors of a file of the run folder, if it has it."""
    path = run.folder / name if run.folder else None
    if path is None or not path.is_file():
        return None
    _, tensors = _read(path, check_version)
    return path, tensors


def load_posteriors(run: LoadedRun, name: str) -> Encoded | None:
    """Read what `save_posteriors` wrote as ``name``; ``None`` where there is none, ``ValueError`` if it is damaged."""
    found = _kept(run, name)
    if found is None:
        return None
    path, tensors = found
    images = len(tensors["loc"]) if "loc" in tensors and tensors["loc"].dim() else 0
    wanted = torch.empty(images, run.vje.embedding_dim, device="meta")
    turns = {"log_rotation": wanted[:, 0]} if "log_rotation" in tensors and run.vje.rotations else {}
    check_state(path, tensors, {**dict.fromkeys(POSTERIOR, wanted), **turns})
    if not images or not (tensors["scale"] > 0).all():
        raise ValueError(f"{path} holds no image, or a scale that is not positive")
    return Encoded(**tensors)


def load_folds(run: LoadedRun) -> tuple[Tensor, Tensor, list[VJE]] | None:
    """What `save_folds` wrote, if the run has it: folds ``(N,)``, features ``(N, F)``, heads of features."""
    found = _kept(run, FOLDS)
    if found is None:
        return None
    path, tensors = found
    folds = len({name.partition(".")[0] for name in tensors if name[:1].isdigit()})
    heads = [build_head(run.info.config, run.vje.feature_dim) for _ in range(folds)]
    all_heads = nn.ModuleList(heads).to(run.vje.device)
    wanted, images = all_heads.state_dict(), tensors["fold"].numel() if "fold" in tensors else 0
    rest = {
        "fold": torch.empty(images, dtype=torch.int64, device="meta"),
        "features": torch.empty(images, run.vje.feature_dim, device="meta"),
    }
    check_state(path, tensors, wanted | rest)
    all_heads.load_state_dict({name: tensors[name] for name in wanted})
    all_heads.eval().requires_grad_(False)
    return tensors["fold"], tensors["features"], heads


def weights_sha256(run: LoadedRun) -> str:
    """What says which weights of a run folder something was made with."""
    if run.folder is None:
        raise ValueError("a weights file alone has no maps: name the run folder")
    return sha256(run.folder / WEIGHTS)


def save_maps(run: LoadedRun, modules: Sequence[str], head: VJE, tensors: Mapping[str, Tensor]) -> Path:
    """Write what maps are made with: the modules whose outputs they are of, a head of places, other ``tensors``."""
    header = {"schema_version": SCHEMA_VERSION, "modules": [*modules], "weights_sha256": weights_sha256(run)}
    state = {f"head.{name}": value for name, value in head.state_dict().items()}
    return _save(cast(Path, run.folder) / MAPS, {**state, **tensors}, header)


def load_maps(run: LoadedRun, build: Callable[[int, int], VJE]) -> tuple[list[str], VJE, dict[str, Tensor]] | None:
    """What `save_maps` wrote, where ``build`` makes a head of its width of features and D; ``None`` if there is none.

    ``ValueError``: the file is damaged, or was made with other weights of the run.
    """
    path = None if run.folder is None else run.folder / MAPS
    if path is None or not path.is_file():
        return None
    form = {"modules": list, "weights_sha256": str}
    header, tensors = _read(path, lambda values: check_form(check_version(values), form))
    if header["weights_sha256"] != weights_sha256(run):
        raise ValueError(f"{path} was made with other weights than those of the run: remove it, and make it again")
    matrix = tensors.get("head.projector.matrix", torch.empty(0))
    if matrix.dim() != 2:
        raise ValueError(f"{path} holds no head of places")
    head = build(*matrix.shape)
    state = nn.ModuleDict({"head": head}).state_dict()
    rest = {name: value for name, value in tensors.items() if name not in state}
    check_state(path, tensors, state | rest)
    head.load_state_dict({name.removeprefix("head."): tensors[name] for name in state})
    return header["modules"], head.eval().requires_grad_(False), rest


def calibration_file(name: str) -> str:
    """The file of a calibration that `pyro_vje.calibrate` made under a name."""
    if not name or Path(name).name != name:
        raise ValueError(f"a calibration is called by a plain name, not {name!r}")
    return f"calibration-{name}.safetensors"


def calibrations(run: LoadedRun) -> list[str]:
    """Names of the calibrations that a run has beside its own."""
    found = [] if run.folder is None else run.folder.glob(calibration_file("*"))
    return sorted(path.stem.removeprefix("calibration-") for path in found)


def read_info(folder: Path) -> RunInfo:
    """Read a run folder's ``config.json``; ``FileNotFoundError`` if there is none, ``ValueError`` if it is damaged."""
    if not folder.exists():
        raise FileNotFoundError(f"no such run folder: {folder}")
    path = folder / CONFIG
    if not path.is_file():
        raise FileNotFoundError(f"{folder} is not a run folder: it holds no {CONFIG}")
    return read_json(path, RunInfo.from_dict)


def default_device() -> str:
    """The GPU, where there is one."""
    return "cuda" if torch.cuda.is_available() else "cpu"


@contextmanager
def deterministic_kernels(wanted: bool = True) -> Iterator[None]:
    """Kernels of the same bits every time, or an error; before the first use of cuBLAS, which reads its setting."""
    before = torch.are_deterministic_algorithms_enabled()
    if wanted:
        os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
    torch.use_deterministic_algorithms(wanted or before)
    try:
        yield
    finally:
        torch.use_deterministic_algorithms(before)


def load_run(ckpt: str | Path, *, trust_plugins: bool = False, device: str | torch.device = "cpu") -> LoadedRun:
    """Load a trained model from a run folder or a weights file, in evaluation mode; nothing in either is executed.

    ``ckpt`` is a run folder, or a ``.safetensors`` file that a run or an export wrote; ``trust_plugins`` allows to
    import ``module:attribute`` names of its configuration; ``device`` is where the model is put.

    Raises ``FileNotFoundError`` if there is no such folder or file, or the folder holds no weights; ``ValueError`` if a
    file is damaged, of another version, does not fit the model, or needs plug-ins that are not trusted.
    """
    ckpt = Path(ckpt)
    folder = ckpt if ckpt.is_dir() else None
    path = ckpt
    if folder is not None or not ckpt.exists():
        read_info(ckpt)  # says what is wrong with the folder, if anything
        path = ckpt / WEIGHTS
        if not path.is_file():
            how = "has its training finished? (train --resume goes on)"
            raise FileNotFoundError(f"{ckpt} holds no {WEIGHTS}: {how}")
    info, state = _read(path, RunInfo.from_dict)
    for setting in ("dataset", "encoder", "likelihood"):
        name = getattr(info.config, setting)
        built_in = setting == "encoder" and str(name).partition(":")[0] in LIBRARIES
        if is_reference(name) and not built_in and not trust_plugins:
            raise ValueError(
                f"{path} uses the {setting} {name!r}, which is code outside this package: if you trust it, say so "
                "(--trust-plugins, or trust_plugins=True)"
            )
    # All but the encoder first, and without memory: a damaged configuration may ask for more than there is.
    # The width of the encoder's features: what the projector takes, or without one the posterior network.
    takes = state.get("projector.0.weight", state.get("posterior_network.trunk.0.weight", torch.empty(1, 1)))
    takes = state["projector.matrix"].T if "projector.matrix" in state else takes
    features = takes.shape[-1] if takes.dim() == 2 else 1
    with torch.device("meta"):
        head = build_head(info.config, features).state_dict()
    check_state(path, {name: t for name, t in state.items() if not name.startswith("encoder.")}, head)
    vje = build_model(info.config, info.view_size, features)
    check_state(path, state, vje.state_dict())
    vje.load_state_dict(state)
    return LoadedRun(vje.to(device).eval().requires_grad_(False), info, folder)


def load_split(
    run: LoadedRun, split: str, dataset: str | None = None, data_dir: str | Path | None = None, **how: Any
) -> ImageSet:
    """A split of the run's own or another data set, as its encoder wants images; ``how`` as in `load_dataset`."""
    config, info = run.info.config, run.info
    if dataset in (None, config.dataset) and data_dir is None:
        data_dir = config.data_dir
    how |= {"image_size": info.image_size, "interpolation": info.interpolation, "fit": info.fit}
    return load_dataset(dataset or config.dataset, data_dir, split, **how)


def training_images(run: LoadedRun, why: str) -> tuple[ImageSet, ImageSet | None]:
    """The images that a run was trained on, and those it held out.

    ``ValueError``, which says ``why`` they are needed: they are not at hand any more, or not as they were.
    """
    config = dataclasses.replace(run.info.config, download=False)
    try:
        train_set, held_out = load_train_set(config, run.info.image_size, run.info.interpolation)
    except (FileNotFoundError, ValueError) as error:
        raise ValueError(f"{why}: {error}") from None
    if run.info.fingerprint not in (None, train_set.fingerprint()) or len(train_set) != run.info.train_images:
        raise ValueError(f"{why}: the training images have changed since, and with them what was held out")
    return train_set, held_out


def check_state(path: Path, state: dict[str, Tensor], wanted: dict[str, Tensor]) -> None:
    """Check names, shapes and types of tensors read from ``path``, and that they are finite; else a ``ValueError``."""
    if state.keys() != wanted.keys():
        names = sorted(state.keys() ^ wanted.keys())
        raise ValueError(f"{path} does not fit its configuration: tensors missing or too many: {', '.join(names[:5])}")
    for name, tensor in state.items():
        if tensor.shape != wanted[name].shape or tensor.dtype != wanted[name].dtype:
            raise ValueError(
                f"{path}: {name} is {tensor.dtype} {tuple(tensor.shape)}, but the configuration asks for "
                f"{wanted[name].dtype} {tuple(wanted[name].shape)}"
            )
        if not torch.isfinite(tensor).all():
            raise ValueError(f"{path}: {name} holds non-finite values")
