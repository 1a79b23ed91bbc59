"""Settings of a pretraining run, with their defaults. Imports nothing heavy, so that ``--help`` answers at once."""

from __future__ import annotations

import dataclasses
import logging
import math
import os
import tomllib
from dataclasses import dataclass
from pathlib import Path
from typing import Any


@dataclass(frozen=True)
class TrainConfig:
    """Every setting of a pretraining run; ``None`` means the data set's default (`DATASET_DEFAULTS`).

    Attributes
    ----------
    dataset, data_dir, download :
        What to pretrain on, where it lies, and whether it may be downloaded.
    normal_class :
        Pretrain on this class alone (name or index): the one-class protocol.
    image_size :
        Pixels of a square view.
    holdout :
        Share of the images that is kept out of training to calibrate scores into p-values (0: none).
    encoder, embedding_dim, hidden_dim :
        Encoder by name or ``module:factory``; D; hidden width of projector and posterior network.
    likelihood, df, unit_radius, radius, kl_weight, shared_variance :
        The model's probabilistic settings, as in `pyro_vje.VJE`. ``df`` is D - 2 unless said.
    objective :
        ``elbo``, or a ``module:function`` that takes its place on the same networks, data and schedule (a control).
    epochs, batch_size, lr, weight_decay, warmup_epochs :
        SGD with momentum 0.9 and a cosine schedule after linear warm-up. ``lr`` is for 256 images and is scaled by
        ``batch_size / 256``; weights of one dimension (biases, batch norm) are not decayed. Data smaller than the
        default batch become one batch (`fitted`); a batch size that was asked for and is too large is an error.
    num_particles :
        Samples of z for each image and direction.
    devices, precision, compile, deterministic :
        Number of devices; ``auto``, ``32`` or ``bf16``; whether the encoder is compiled; whether a GPU computes the
        same bits every time too, as a CPU does anyway, by kernels that may be slower.
    residency, workers :
        ``auto``, ``memory`` or ``stream``: where the images live; processes that decode a streamed set.
    knn_every :
        Epochs between k-NN evaluations during training (0: never).
    seed :
        Seed of every random draw.
    """

    dataset: str = "digits"
    data_dir: str | None = None
    download: bool = True
    normal_class: str | None = None
    image_size: int | None = None
    holdout: float = 0.05
    encoder: str | None = None
    projector: str = "none"
    embedding_dim: int | None = None
    hidden_dim: int = 512
    likelihood: str = "polar-student-t"
    df: float | None = None
    unit_radius: str = "sqrt-d"
    radius: str | None = "student-t"
    radius_scale: str = "learned"
    kl_weight: float = 0.03
    analytic_kl: bool = False
    shared_variance: bool = True
    objective: str = "elbo"
    epochs: int | None = None
    batch_size: int | None = None
    lr: float = 0.2
    weight_decay: float = 5e-4
    warmup_epochs: float | None = None
    num_particles: int = 1
    devices: int = 1
    precision: str = "auto"
    compile: bool = False
    deterministic: bool = False
    residency: str = "auto"
    workers: int = 2
    knn_every: int | None = None
    seed: int = 0

    def resolved(self) -> TrainConfig:
        """A copy in which the data set's defaults stand in for ``None``, and every value has been checked.

        Raises
        ------
        ValueError
            If a value is out of its range.
        """
        defaults = {**DATASET_DEFAULTS["folder"], **DATASET_DEFAULTS.get(self.dataset, {})}
        missing = {name: value for name, value in defaults.items() if getattr(self, name) is None}
        config = dataclasses.replace(self, **missing)
        if config.warmup_epochs is None:
            config = dataclasses.replace(config, warmup_epochs=min(10.0, 0.1 * (config.epochs or 0)))
        if config.knn_every is None:
            config = dataclasses.replace(config, knn_every=max(1, (config.epochs or 0) // 10))
        config._check()
        return config

    def fitted(self, images: int, processes: int = 1) -> TrainConfig:
        """Resolved settings whose default batch is no larger than the data, in equal shares for the processes.

        Of fewer images than the default batch it takes a quarter: a step an epoch would hardly train.

        Raises
        ------
        ValueError
            If there are too few images for any batch.
        """
        most = self.batch_size or images
        if images < most:
            most = max(images // 4, min(16, images))
        most -= most % processes
        if most < 2:  # batch norm needs two
            raise ValueError(f"training needs at least two images, and one a process, but has {images}")
        if most != self.batch_size:
            logging.getLogger("pyro_vje").info("batch_size %d, to fit %d images", most, images)
        return dataclasses.replace(self, batch_size=most)

    def _check(self) -> None:
        if self.dataset == "folder" and self.data_dir is None:
            raise ValueError("the data set 'folder' needs to know which folder: name it (--data-dir DIR)")
        ranges: dict[str, tuple[float, float]] = {
            "epochs": (1, math.inf),
            "batch_size": (2, math.inf),  # batch norm needs two images
            "embedding_dim": (2, 2**20),
            "hidden_dim": (1, 2**20),
            "num_particles": (1, math.inf),
            "devices": (1, math.inf),
            "workers": (0, math.inf),
            "knn_every": (0, math.inf),
            "lr": (0, math.inf),
            "weight_decay": (0, math.inf),
            "kl_weight": (0, math.inf),
            "warmup_epochs": (0, math.inf),
            "holdout": (0, 0.5),
            "seed": (0, 2**31 - 1),
        }
        for name, (low, high) in ranges.items():
            value = getattr(self, name)
            if value is None:
                continue
            if not (low <= value < high if math.isinf(high) else low <= value <= high):
                upper = "" if math.isinf(high) else f" and at most {high}"
                why = (
                    " (batch norm has no statistics of one image)"
                    if (name, value) == ("batch_size", 1)
                    else ""
                )
                raise ValueError(f"{name} must be at least {low}{upper}, not {value}{why}")
        if self.image_size is not None and self.image_size < 8:
            raise ValueError(f"image_size must be at least 8 pixels, not {self.image_size}")
        if self.df is not None and not self.df > 0:
            raise ValueError(f"df must be positive (inf for the Gaussian limit), not {self.df}")
        choices = {
            "projector": ("none", "linear", "mlp"),
            "radius_scale": ("learned", "shared"),
            "unit_radius": ("1", "sqrt-d"),
            "radius": ("student-t", "log-student-t", None),
            "precision": ("auto", "32", "bf16"),
            "residency": ("auto", "memory", "stream"),
        }
        for name, known in choices.items():
            if getattr(self, name) not in known:
                raise ValueError(
                    f"{name} must be one of {', '.join(map(str, known))}, not {getattr(self, name)!r}"
                )

    def to_dict(self) -> dict[str, Any]:
        """The settings as JSON-ready values (an infinite df becomes the string ``"inf"``)."""
        values = dataclasses.asdict(self)
        if self.df is not None and math.isinf(self.df):
            values["df"] = "inf"  # JSON has no infinity
        return values

    @classmethod
    def from_dict(cls, values: dict[str, Any]) -> TrainConfig:
        """Settings from `to_dict`'s form.

        Raises
        ------
        ValueError
            If a setting is unknown or has a value of another type.
        """
        known = {field.name: field for field in dataclasses.fields(cls)}
        unknown = sorted(set(values) - set(known))
        if unknown:
            raise ValueError(f"unknown settings {', '.join(unknown)}: written by a newer version?")
        values = dict(values)
        for name, value in values.items():
            kinds = str(known[name].type)
            allowed = [kind for kind in (str, bool, int, float) if kind.__name__ in kinds.split(" | ")]
            if float in allowed:
                allowed.append(int)
                if value == "inf":
                    values[name] = value = math.inf
            if value is None and "None" in kinds:
                continue
            # bool is an int to isinstance, and true is no number of epochs
            if not isinstance(value, tuple(allowed)) or (isinstance(value, bool) and bool not in allowed):
                raise ValueError(f"setting {name} must be {kinds}, not {value!r}")
        return cls(**values)


RECIPES = {path.stem: path for path in sorted((Path(__file__).parent / "recipes").glob("*.toml"))}
"""Settings under which results are published, a file each, with what is known of it in its comments."""


def load_recipe(name: str | Path) -> dict[str, Any]:
    """Settings of a recipe by name, or of a TOML file by path: arguments for `TrainConfig`.

    Keys are those of `TrainConfig`; the radius ``"none"`` is ``None``, which TOML lacks.

    Raises
    ------
    ValueError
        If there is no such recipe, it is no TOML, or a key is unknown or has a value of another type.
    """
    path = RECIPES.get(str(name), Path(name))
    if not path.is_file():
        raise ValueError(
            f"no recipe {str(name)!r}: choose one of {', '.join(RECIPES)}, or the path of a TOML file"
        )
    try:
        values = tomllib.loads(path.read_text("utf-8"))
    except ValueError as error:
        raise ValueError(f"recipe {path} is no TOML: {error}") from None
    known = [field.name for field in dataclasses.fields(TrainConfig)]
    unknown = [key for key in values if key not in known]
    if unknown:
        raise ValueError(f"recipe {path}: unknown keys {', '.join(unknown)}; known: {', '.join(known)}")
    if values.get("radius") == "none":
        values["radius"] = None
    try:
        TrainConfig.from_dict(values)
    except ValueError as error:
        raise ValueError(f"recipe {path}: {error}") from None
    return values


DATASET_DEFAULTS: dict[str, dict[str, Any]] = {
    "digits": {"encoder": "resnet-small", "epochs": 30, "batch_size": 128, "knn_every": 5},
    "cifar10": {"encoder": "resnet18", "epochs": 200, "batch_size": 512},
    "cifar100": {"encoder": "resnet18", "epochs": 200, "batch_size": 512},
    "stl10": {"encoder": "resnet18", "epochs": 200, "batch_size": 256},
    "imagenet": {"encoder": "resnet50", "epochs": 100, "batch_size": 256},
    "folder": {"encoder": "resnet18", "epochs": 100, "batch_size": 256},
}
"""What a run on each data set uses where nothing is said."""

ABLATION_AXES = ("likelihood", "df", "unit_radius", "radius", "kl_weight", "shared_variance", "seed")
"""What an ablation always varies (with one value or several), the seed last."""


def is_first_process() -> bool:
    """Whether no launcher has started this process as one of the others; Lightning runs the command again in each."""
    return int(os.environ.get("RANK", os.environ.get("LOCAL_RANK", "0"))) == 0


def machines() -> int:
    """Machines that train together, as torchrun tells its processes; ``devices`` are those of each machine."""
    return int(os.environ.get("GROUP_WORLD_SIZE", "1"))
