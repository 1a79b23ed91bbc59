"""The run folder: what training leaves behind, and how it becomes a model again.

::

    RUN/config.json           settings, image size, classes, versions
    RUN/weights.safetensors   weights; its header repeats config.json, so that the file stands alone
    RUN/calibration.safetensors   embeddings and posteriors of held-out images, which calibrate scores
    RUN/reference.safetensors     the same of images that were trained on, at most 10,000: the score `aggregate`
    RUN/folds.safetensors     of a frozen encoder: heads that have each not seen a fold of the images
    RUN/held_out.json         names of the held-out images
    RUN/metrics.csv           a row for each epoch
    RUN/checkpoints/          what resuming needs
    RUN/pictures/             training curves, embedding, scores
"""

from __future__ import annotations

import dataclasses
import json
import os
import platform
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save as safetensors_bytes
from torch import Tensor, nn

from pyro_vje.config import TrainConfig
from pyro_vje.data import (
    CleanView,
    ImageSet,
    TwoViews,
    find_dataset,
    load_dataset,
    load_train_set,
    recipe_for,
)
from pyro_vje.model.encoders import build_encoder, describe_stem, feature_dim
from pyro_vje.model.encoding import Posteriors
from pyro_vje.model.pretrained import LIBRARIES, Preprocessing, preprocessing
from pyro_vje.model.vje import VJE
from pyro_vje.plugins import is_reference
from pyro_vje.runs.files import check_form, parse_json, read_json, write_atomic, write_json

SCHEMA_VERSION = 3
MAX_IMAGE_SIZE = 8192
CONFIG, HELD_OUT, METRICS = "config.json", "held_out.json", "metrics.csv"
WEIGHTS, CALIBRATION, REFERENCE, FOLDS = (
    f"{name}.safetensors" for name in ("weights", "calibration", "reference", "folds")
)
CHECKPOINTS, PICTURES, CACHE = "checkpoints", "pictures", "cache"
HEADER_KEY = "pyro_vje"


def versions() -> dict[str, str]:
    """Versions of what makes the numbers: Python, this package and those under it."""
    packages = ("pyro-vje", "torch", "torchvision", "pyro-ppl", "lightning")
    return {"python": platform.python_version(), **{name: version(name) for name in packages}}


def _from_1(values: dict[str, Any]) -> dict[str, Any]:
    """Runs of the first versions held nothing out, and had no setting to say so."""
    config = values.get("config")
    return values | ({"config": {"holdout": 0.0, **config}} if isinstance(config, dict) else {})


def _from_2(values: dict[str, Any]) -> dict[str, Any]:
    """Runs of version 2 had an MLP between encoder and embedding, and the radius borrowed its scale."""
    config = values.get("config")
    before = {"projector": "mlp", "radius_scale": "shared"}
    return values | ({"config": {**before, **config}} if isinstance(config, dict) else {})


MIGRATIONS: dict[int, Callable[[dict[str, Any]], dict[str, Any]]] = {1: _from_1, 2: _from_2}
"""From each older schema version to the next: what a file of that version would say today."""


def migrate(values: Any) -> dict[str, Any]:
    """The content of ``config.json`` or of a file's header in the form of `SCHEMA_VERSION`.

    Raises
    ------
    ValueError
        If it has no version, or one that this package does not know.
    """
    try:
        version = check_form(values, {"schema_version": int})["schema_version"]
    except ValueError as error:
        raise ValueError(f"{error}: not written by pyro-vje") from None
    if version not in (*MIGRATIONS, SCHEMA_VERSION):
        raise ValueError(
            f"schema version {version}, but this pyro-vje reads {min(MIGRATIONS)} to {SCHEMA_VERSION}: "
            "use the version that wrote it, or a newer one"
        )
    for step in range(version, SCHEMA_VERSION):
        values = MIGRATIONS[step](values)
    return {**values, "schema_version": SCHEMA_VERSION}


@dataclass(frozen=True)
class RunInfo:
    """What a run was trained with and on: the content of ``config.json`` and of the weights' header.

    Attributes
    ----------
    config : TrainConfig
        The settings, with the data set's defaults filled in.
    image_size : int
        Pixels of the square images that the encoder saw.
    mean, std : tuple of float
        Pixel normalisation of each channel, in [0, 1].
    classes : tuple of str or None
        Class names of the training data, if it has labels.
    train_images : int
        Number of images pretrained on.
    stem : str
        The encoder's stem in words.
    view_size : int
        Pixels of what the encoder sees, a central square of the image: less than ``image_size`` for a pretrained one.
    interpolation : str
        How image files are resized: ``bilinear`` or ``bicubic``.
    fingerprint : str or None
        What identifies the images (`pyro_vje.data.ImageSet.fingerprint`).
    """

    config: TrainConfig
    image_size: int
    mean: tuple[float, ...]
    std: tuple[float, ...]
    classes: tuple[str, ...] | None
    train_images: int
    stem: str
    view_size: int
    interpolation: str
    fingerprint: str | None

    @property
    def view(self) -> CleanView:
        """The deterministic view of an image that evaluation and scoring encode."""
        return CleanView(self.view_size, self.mean, self.std, crop=self.view_size < self.image_size)

    @property
    def views(self) -> TwoViews:
        """The augmented views of training."""
        return TwoViews(self.view_size, recipe_for(self.config.dataset, self.view_size), self.mean, self.std)

    def to_dict(self) -> dict[str, Any]:
        """JSON-ready form, with the schema version and the versions of what made it."""
        values = {field.name: getattr(self, field.name) for field in dataclasses.fields(self)}
        values["config"] = self.config.to_dict()
        return {"schema_version": SCHEMA_VERSION, **values, "versions": versions()}

    @classmethod
    def from_dict(cls, values: Any) -> RunInfo:
        """Read `to_dict`'s form, of this schema version or an older one.

        Raises
        ------
        ValueError
            If it is of an unknown schema version, or something is missing, of another type or out of its range.
        """
        form: dict[str, Any] = {
            "config": dict,
            "image_size": int,
            "mean": list,
            "std": list,
            "classes": list | None,
            "train_images": int,
            "stem": str,
            "view_size": int,
            "interpolation": str,
            "fingerprint": str | None,
        }
        values = migrate(values)
        later = {"view_size": values.get("image_size"), "interpolation": "bilinear", "fingerprint": None}
        values = check_form({**later, **values}, form)
        kept = {name: values[name] for name in form}
        kept["config"] = TrainConfig.from_dict(kept["config"]).resolved()
        kept["classes"] = None if kept["classes"] is None else tuple(map(str, kept["classes"]))
        for name in ("image_size", "view_size"):
            if not 1 <= kept[name] <= MAX_IMAGE_SIZE:
                raise ValueError(f"{name} must lie between 1 and {MAX_IMAGE_SIZE}, not {kept[name]}")
        for name in ("mean", "std"):
            numbers = kept[name]
            if len(numbers) != 3 or not all(isinstance(x, int | float) and 0 <= x <= 1 for x in numbers):
                raise ValueError(f"{name} must be three numbers between 0 and 1, not {numbers}")
            kept[name] = tuple(map(float, numbers))
        if not all(kept["std"]):
            raise ValueError(f"std must be positive, not {kept['std']}")
        return cls(**kept)


@dataclass(frozen=True)
class LoadedRun:
    """A trained model in evaluation mode, what it was trained with, and its run folder if it has one."""

    vje: VJE
    info: RunInfo
    folder: Path | None


def build_model(
    config: TrainConfig, image_size: int, features: int | None = None, *, weights: str = "none"
) -> VJE:
    """A freshly initialised model; the same configuration gives the same weights.

    Parameters
    ----------
    config : TrainConfig
        Resolved settings.
    image_size : int
        Pixels of what the encoder sees.
    features : int, optional
        Width of the encoder's output, which is measured where it is not known.
    weights : str
        Of the encoder (`pyro_vje.model.build_encoder`); a run that is loaded brings its own.

    Raises
    ------
    ValueError
        If a name in the configuration is unknown or a value out of range.
    """
    if config.encoder is None:
        raise ValueError("the configuration names no encoder: use TrainConfig.resolved()")
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(config.seed)
        encoder = build_encoder(config.encoder, image_size, weights)
        # The encoder's convolutions are fastest with channels last on every device we measured.
        encoder.to(memory_format=torch.channels_last)
        vje = _model(config, encoder, features or feature_dim(encoder, image_size))
    if config.encoder_lr_scale == 0:
        vje.freeze_encoder()
    return vje


def build_head(config: TrainConfig, features: int) -> VJE:
    """The model of a run without its encoder: its images are features ``(N, features)``."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(config.seed)
        return _model(config, nn.Identity(), features)


def _model(config: TrainConfig, encoder: nn.Module, features: int) -> VJE:
    return VJE(
        encoder,
        features,
        embedding_dim=config.embedding_dim,
        hidden_dim=config.hidden_dim,
        projector="none" if config.projector == "auto" else config.projector,
        likelihood=config.likelihood,
        df=config.df,
        unit_radius=config.unit_radius,
        radius=config.radius,
        radius_scale=config.radius_scale,
        shared_variance=config.shared_variance,
    )


def describe_run(config: TrainConfig, train_set: ImageSet) -> RunInfo:
    """Collect what a new run will be described by."""
    wanted = preprocessing_of(config)
    dataset, size = find_dataset(config.dataset), train_set.image_size
    mean, std = (wanted.mean, wanted.std) if wanted else (dataset.mean, dataset.std)
    view_size = round(size * wanted.crop) if wanted else size
    return RunInfo(
        config,
        size,
        tuple(mean),
        tuple(std),
        train_set.classes,
        len(train_set),
        describe_stem(config.encoder or "", view_size),
        view_size,
        wanted.interpolation if wanted else "bilinear",
        train_set.fingerprint(),
    )


def decoded_as(config: TrainConfig) -> tuple[int | None, str]:
    """Side in pixels and interpolation at which a run's image files are decoded; ``None``: the data set's own side."""
    wanted = preprocessing_of(config)
    if wanted is None:
        return config.image_size, "bilinear"
    return round((config.image_size or wanted.image_size) / wanted.crop), wanted.interpolation


def preprocessing_of(config: TrainConfig) -> Preprocessing | None:
    """How the encoder of a run wants its images, where its weights are pretrained and it says so."""
    return None if config.weights == "none" else preprocessing(config.encoder or "")


def save_weights(folder: Path, vje: VJE, info: RunInfo) -> Path:
    """Write ``weights.safetensors`` (with the run's description in its header) and ``config.json``."""
    state = {name: value.detach().cpu().contiguous() for name, value in vje.state_dict().items()}
    header = {HEADER_KEY: json.dumps(info.to_dict())}
    write_json(folder / CONFIG, info.to_dict())
    return write_atomic(folder / WEIGHTS, safetensors_bytes(state, header))


def save_posteriors(path: Path, posteriors: Posteriors) -> Path:
    """Write embeddings and posteriors of a run's images: 12 bytes a feature and image."""
    tensors = {name: value.contiguous() for name, value in posteriors._asdict().items()}
    header = {HEADER_KEY: json.dumps({"schema_version": SCHEMA_VERSION})}
    return write_atomic(path, safetensors_bytes(tensors, header))


def load_posteriors(run: LoadedRun, name: str) -> Posteriors | None:
    """Read what `save_posteriors` wrote as ``name`` (`CALIBRATION` or `REFERENCE`); ``None`` where there is none.

    Raises
    ------
    ValueError
        If the file is damaged, of an unknown version or does not fit the model.
    """
    path = None if run.folder is None else run.folder / name
    if path is None or not path.is_file():
        return None
    header, tensors = _read_tensors(path)
    try:
        migrate({"schema_version": 1} if header is None else parse_json(header))  # version 1 had no header
    except ValueError as error:
        raise ValueError(f"header of {path}: {error}") from None
    images = len(next(iter(tensors.values()))) if tensors and all(t.dim() for t in tensors.values()) else 0
    wanted = torch.empty(images, run.vje.embedding_dim, device="meta")
    check_state(path, tensors, dict.fromkeys(Posteriors._fields, wanted))
    if not images or not (tensors["scale"] > 0).all():
        raise ValueError(f"{path} holds no image, or a scale that is not positive")
    return Posteriors(**tensors)


def save_folds(path: Path, fold: Tensor, heads: Sequence[VJE], features: Tensor) -> Path:
    """Write what cross-conformal p-values need: each image's fold and features, and the head that has not seen it."""
    tensors = {"fold": fold, "features": features.contiguous()}
    for k, head in enumerate(heads):
        tensors |= {f"{k}.{name}": value.contiguous() for name, value in head.state_dict().items()}
    header = {HEADER_KEY: json.dumps({"schema_version": SCHEMA_VERSION})}
    return write_atomic(path, safetensors_bytes(tensors, header))


def load_folds(run: LoadedRun) -> tuple[Tensor, Tensor, list[VJE]] | None:
    """What `save_folds` wrote, if the run has it: folds ``(N,)``, features ``(N, F)``, heads of features.

    Raises
    ------
    ValueError
        If the file is damaged or does not fit the model.
    """
    path = None if run.folder is None else run.folder / FOLDS
    if path is None or not path.is_file():
        return None
    _, tensors = _read_tensors(path)
    count, device = len(tensors.get("fold", ())), next(run.vje.parameters()).device
    images = torch.empty(count, run.vje.feature_dim, device="meta")
    head = build_head(run.info.config, run.vje.feature_dim)
    wanted = {"fold": torch.empty(count, dtype=torch.int64, device="meta"), "features": images}
    heads = sorted({int(name.partition(".")[0]) for name in tensors if name[0].isdigit()})
    for k in heads:
        wanted |= {f"{k}.{name}": value for name, value in head.state_dict().items()}
    check_state(path, tensors, wanted)
    found = []
    for k in heads:
        own = build_head(run.info.config, run.vje.feature_dim)
        own.load_state_dict({name: tensors[f"{k}.{name}"] for name in own.state_dict()})
        found.append(own.to(device).eval().requires_grad_(False))
    return tensors["fold"], tensors["features"], found


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
    """Read a run folder's ``config.json``.

    Raises
    ------
    FileNotFoundError
        If the folder is missing or is no run folder.
    ValueError
        If ``config.json`` cannot be understood.
    """
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
    """Let PyTorch use only kernels that give the same bits every time, and raise where it has none.

    To be entered before anything is computed on a GPU: cuBLAS reads its setting when it is first used.
    """
    before = torch.are_deterministic_algorithms_enabled()
    if wanted:
        os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
    torch.use_deterministic_algorithms(wanted or before)
    try:
        yield
    finally:
        torch.use_deterministic_algorithms(before)


def load_run(
    ckpt: str | Path, *, trust_plugins: bool = False, device: str | torch.device = "cpu"
) -> LoadedRun:
    """Load a trained model from a run folder or a weights file; nothing in either is executed.

    Parameters
    ----------
    ckpt : path
        A run folder, or a ``.safetensors`` file that `save_weights` wrote.
    trust_plugins : bool
        Whether ``module:attribute`` names in the configuration may be imported.
    device : str or torch.device
        Where the model is put.

    Raises
    ------
    FileNotFoundError
        If there is no such folder or file, or the folder holds no weights.
    ValueError
        If a file is damaged, of another version, does not fit the model, or needs plug-ins that are not trusted.
    """
    ckpt = Path(ckpt)
    folder = ckpt if ckpt.is_dir() else None
    path = ckpt
    if folder is not None or not ckpt.exists():
        read_info(ckpt)  # says what is wrong with the folder, if anything
        path = ckpt / WEIGHTS
        if not path.is_file():
            raise FileNotFoundError(
                f"{ckpt} holds no {WEIGHTS}: has its training finished? (train --resume goes on)"
            )
    info, state = _read_weights(path)
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
        head = _model(info.config, nn.Identity(), features).state_dict()
    check_state(path, {name: t for name, t in state.items() if not name.startswith("encoder.")}, head)
    vje = build_model(info.config, info.view_size, features)
    check_state(path, state, vje.state_dict())
    vje.load_state_dict(state)
    return LoadedRun(vje.to(device).eval().requires_grad_(False), info, folder)


def load_split(
    run: LoadedRun,
    split: str,
    dataset: str | None = None,
    data_dir: str | Path | None = None,
    *,
    download: bool = True,
    residency: str = "auto",
) -> ImageSet:
    """Load a split of the run's own data set, or of another one, as the run's encoder wants its images."""
    config = run.info.config
    own = dataset is None or dataset == config.dataset
    return load_dataset(
        dataset or config.dataset,
        data_dir if data_dir is not None or not own else config.data_dir,
        split,
        image_size=run.info.image_size,
        interpolation=run.info.interpolation,
        download=download,
        residency=residency,
    )


def training_images(run: LoadedRun) -> tuple[ImageSet, ImageSet | None]:
    """The images that a run was trained on, and those it held out; raises if they are not at hand any more."""
    config = dataclasses.replace(run.info.config, download=False)
    return load_train_set(config, run.info.image_size, run.info.interpolation)


def _read_tensors(path: Path) -> tuple[str | None, dict[str, Tensor]]:
    """This package's entry in the header of a safetensors file, and its tensors."""
    try:
        with safe_open(path, framework="pt") as file:
            header = (file.metadata() or {}).get(HEADER_KEY)
            return header, {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 (no dict)
    except (SafetensorError, OSError, ValueError) as error:
        raise ValueError(f"{path} is no readable safetensors file: {error}") from None


def _read_weights(path: Path) -> tuple[RunInfo, dict[str, Tensor]]:
    header, state = _read_tensors(path)
    if header is None:
        raise ValueError(f"{path} was not written by pyro-vje: its header has no {HEADER_KEY!r} entry")
    try:
        return RunInfo.from_dict(parse_json(header)), state
    except ValueError as error:
        raise ValueError(f"header of {path}: {error}") from None


def check_state(path: Path, state: dict[str, Tensor], wanted: dict[str, Tensor]) -> None:
    """Check that tensors read from ``path`` have the names, shapes and types of ``wanted``, and finite values.

    Raises
    ------
    ValueError
        If not, naming the first that is wrong.
    """
    if state.keys() != wanted.keys():
        names = sorted(state.keys() ^ wanted.keys())
        raise ValueError(
            f"{path} does not fit its configuration: tensors missing or too many: {', '.join(names[:5])}"
        )
    for name, tensor in state.items():
        if tensor.shape != wanted[name].shape or tensor.dtype != wanted[name].dtype:
            raise ValueError(
                f"{path}: {name} is {tensor.dtype} {tuple(tensor.shape)}, but the configuration asks for "
                f"{wanted[name].dtype} {tuple(wanted[name].shape)}"
            )
        if not torch.isfinite(tensor).all():
            raise ValueError(f"{path}: {name} holds non-finite values")
