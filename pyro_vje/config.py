"""Settings, a line each: name, type, default, help, range. Imports nothing heavy: ``--help`` answers at once."""

from __future__ import annotations

import dataclasses
import functools
import logging
import math
import tomllib
from pathlib import Path
from typing import Annotated, Any, Literal, TypeVar, dataclass_transform, get_args, get_origin

from pydantic import BeforeValidator, ConfigDict, Field, ValidationError
from pydantic.dataclasses import dataclass
from pydantic.fields import FieldInfo

S = TypeVar("S", bound=type)
Text = Annotated[str, BeforeValidator(lambda path: str(path) if isinstance(path, Path) else path)]
Place = Annotated[Path, BeforeValidator(lambda path: Path(path) if isinstance(path, str) else path)]
Loggers = Literal["auto", "csv", "tensorboard", "wandb", "mlflow"]
BOUNDS = {"ge": "at least", "gt": "above", "le": "at most", "lt": "below"}


def say(default: Any, help: str, *, off: str | None = None, **limits: Any) -> Any:
    """A setting: default, help, range as in `pydantic.Field`; ``off`` is what the flag of its opposite is called."""
    limits |= {"allow_inf_nan": False} if isinstance(default, float) else {}
    return Field(default, description=help, json_schema_extra={"off": off}, **limits)


def fields_of(cls: type) -> dict[str, FieldInfo]:
    """The settings of a class by name, each with ``annotation``, ``default``, ``description`` and ``metadata``."""
    return cls.__pydantic_fields__  # type: ignore[attr-defined]


def choices_of(field: FieldInfo) -> list[str | None]:
    """The values of a setting that takes a few named ones, else nothing."""
    parts = get_args(field.annotation)
    named = next((part for part in parts if get_origin(part) is Literal), field.annotation)
    return [*get_args(named), *[None] * (type(None) in parts)] if get_origin(named) is Literal else []


def range_of(field: FieldInfo) -> str:
    """The range of a setting of many values in words, else an empty string."""
    rules = [(word, getattr(rule, sign, None)) for rule in field.metadata for sign, word in BOUNDS.items()]
    found = " and ".join(f"{word} {bound}" for word, bound in rules if bound is not None)
    return "positive" if found == "above 0" else found


@dataclass_transform(frozen_default=True)
def settings(cls: S) -> S:
    """Make a frozen dataclass that checks its values when it is made, and says in one line what is wrong."""
    made: Any = dataclass(frozen=True, config=ConfigDict(strict=True, extra="forbid"))(cls)
    check, fields = made.__init__, fields_of(made)

    @functools.wraps(check)
    def __init__(self: Any, *values: Any, **named: Any) -> None:
        try:
            return check(self, *values, **named)
        except ValidationError as error:
            first = error.errors(include_url=False)[0]
        kind, value, name = first["type"], first["input"], first["loc"][0] if first["loc"] else None
        if kind == "value_error":
            raise ValueError(str(first["ctx"]["error"]))
        if isinstance(name, int) and name < len(fields):  # it was given by position
            name = list(fields)[name]
        if name not in fields:
            raise TypeError(f"{cls.__name__} has no setting {name!r}: choose among {', '.join(fields)}")
        choices = ", ".join(map(str, choices_of(fields[name])))
        may_be = f"one of {choices}" if choices else range_of(fields[name])
        if not may_be or kind.endswith("_type"):
            raise ValueError(f"setting {name} must be {made.__dataclass_fields__[name].type}, not {value!r}")
        raise ValueError(f"{name} must be {may_be}{' and finite' * (kind == 'finite_number')}, not {value!r}")

    made.__init__ = __init__
    lines = [f"{name} :\n    {field.description}" for name, field in fields.items()]
    made.__doc__ = "\n".join([cls.__doc__ or "", "", "Attributes", "----------", *lines])
    return made


@settings
class TrainConfig:
    """Every setting of a pretraining run; ``None`` leaves it to the data set (`DATASET_DEFAULTS`) or the model."""

    # fmt: off
    dataset: str = say("digits", "What to pretrain on, or your own as module:function.")
    data_dir: Text | None = say(None, "Where the data set lies or is downloaded to.")
    download: bool = say(True, "Fetch a missing data set.", off="no-download")
    normal_class: str | None = say(None, "Pretrain on this class alone, by name or index. [default: all]")
    image_size: int | None = say(None, "Side of the square images in pixels. [default: the data set's]", ge=8)
    fit: Literal["crop", "pad", "squeeze"] | None = say(None, "Not square: part or all. [default: crop; inspect: pad]")
    holdout: float | None = say(None, "Share of images kept for p-values. [default: 0.05; with folds 0]", ge=0, le=0.5)
    encoder: str | None = say(None, "resnet18, ..., timm:NAME, torchvision:NAME, module:factory. [default: by data]")
    weights: Text = say("none", "Of the encoder: none, default (pretrained, of timm or torchvision), or a FILE.")
    encoder_lr_scale: float | None = say(None, "0 freezes the encoder. [default: 0 if pretrained, else 1]", ge=0, le=1)
    views: int = say(2, "Views of an image in a step, each a context for every other.", ge=2, le=64)
    local_views: int = say(0, "Small crops beside them: contexts for every view, targets of none.", ge=0, le=64)
    local_size: int | None = say(None, "Side of those in pixels. [default: half of a view's]", ge=4)
    crop_scale: float | None = say(None, "Least share of the area in a view. [default: the data set's]", gt=0, le=1)
    targets: Literal["each", "mean"] = say("each", "Of more than two views: each other one, or the others' mean.")
    rotations: float = say(0.0, "Above 0, images lie at random quarter turns, which are a target of this weight.", ge=0)
    feature_views: int = say(2, "Augmented views of an image that a frozen encoder sees, each once.", ge=2)
    folds: int = say(5, "Of a frozen run, for p-values from all images; 0: none.", ge=0)
    projector: Literal["auto", "none", "linear", "mlp", "whiten"] = say("auto", "auto: whiten if frozen, else none.")
    embedding_dim: int | None = say(None, "D of a projector. [default: encoder's; whiten: by data]", ge=2, le=2**20)
    hidden_dim: int = say(512, "Hidden width of projector and posterior network.", ge=1, le=2**20)
    likelihood: str = say("polar-student-t", "A likelihood family, or your own as module:function.")
    df: float | None = say(None, "Degrees of freedom; inf is the Gaussian limit. [default: D - 2]", gt=0)
    unit_radius: Literal["1", "sqrt-d"] = say("sqrt-d", "Radius of the sphere of directions: 1 or √D.")
    radius: Literal["student-t", "log-student-t"] | None = say("student-t", "Radial factor of polar families.")
    radius_scale: Literal["learned", "shared"] = say("learned", "Scale of the radius: its own, or the posterior's.")
    kl_weight: float = say(0.03, "Weight of the KL divergence; 1 is the ELBO.", ge=0)
    analytic_kl: bool = say(False, "KL in closed form, or by the samples of the latent.", off="sampled-kl")
    shared_variance: bool = say(True, "Scale of the likelihood: the posterior's, or own.", off="separate-variance")
    objective: str = say("elbo", "elbo, or your own as module:function on the same networks (a control).")
    epochs: int | None = say(None, "Passes over the data. [default: the data set's]", ge=1)
    batch_size: int | None = say(None, "Images in a step, over all devices. [default: the data set's]", ge=2)
    optimizer: Literal["sgd", "adamw", "lars"] | None = say(None, "[default: sgd; for a frozen encoder adamw]")
    lr: float | None = say(None, "For 256 images. [default: 0.2; adamw 0.001, lars 0.3]", ge=0, allow_inf_nan=False)
    predictor_lr: Literal["schedule", "constant"] = say("schedule", "Of the posterior network, SimSiam's predictor.")
    clip_norm: float | None = say(None, "Largest norm of a step's gradient, in nats a dimension. [default: any]", gt=0)
    ema: float | None = say(None, "Decay of averaged weights that make the targets. [default: none do]", ge=0, lt=1)
    weight_decay: float = say(5e-4, "Decay of kernels and matrices, not biases.", ge=0)
    warmup_epochs: float | None = say(None, "Linear warm-up. [default: a tenth, at most 10]", ge=0, lt=math.inf)
    num_particles: int = say(1, "Samples of the latent an image and direction.", ge=1)
    devices: int = say(1, "GPUs, or processes on the CPU.", ge=1)
    precision: Literal["auto", "32", "bf16"] = say("auto", "auto is bf16 where the hardware has it.")
    compile: bool = say(False, "Compile the encoder.", off="no-compile")
    deterministic: bool = say(False, "The same bits every time, on a GPU too; may be slower.", off="fastest")
    residency: Literal["auto", "memory", "stream"] = say("auto", "Images in memory or decoded as they come.")
    workers: int = say(2, "Decoding processes of a streamed data set.", ge=0)
    knn_every: int | None = say(None, "Epochs between k-NN evaluations, 0: never. [default: ten a run]", ge=0)
    logger: Loggers = say("auto", "Of metrics, which metrics.csv has too; auto: tensorboard if installed, else csv.")
    seed: int = say(0, "Seed of every random draw.", ge=0, le=2**31 - 1)
    # fmt: on

    def resolved(self) -> TrainConfig:
        """A copy in which the data set's defaults stand in for ``None``, but for what `fitted` says.

        Raises ``ValueError`` if the data set is a folder that nobody named, or a setting does nothing beside another.
        """
        if self.dataset in ("folder", "images") and self.data_dir is None:
            what = f"the data set {self.dataset!r} needs to know which folder"
            raise ValueError(f"{what}: name it (--data-dir DIR)")
        scale = float(self.weights == "none") if self.encoder_lr_scale is None else self.encoder_lr_scale
        self._refuse_idle(frozen=scale == 0)
        defaults = {"fit": "crop", **self._defaults()}
        epochs = self.epochs or defaults["epochs"]
        optimizer = self.optimizer or ("adamw" if scale == 0 else "sgd")
        values = {
            "optimizer": optimizer,
            "lr": LR[optimizer],
            "warmup_epochs": 0.1 * min(100, epochs),
            "knn_every": max(1, epochs // 10),
            **defaults,
        }
        if scale == 0:
            values |= {"warmup_epochs": 0.0, "knn_every": 0, "epochs": None}
        values |= {"holdout": 0.0 if scale == 0 and self.folds else 0.05, "batch_size": None}
        missing = {name: value for name, value in values.items() if getattr(self, name) is None}
        if self.projector == "auto":
            missing["projector"] = "whiten" if scale == 0 else "none"
        return dataclasses.replace(self, encoder_lr_scale=scale, **missing)

    def _refuse_idle(self, *, frozen: bool) -> None:
        head = "the head of a frozen encoder"
        for name in ENCODERS_ALONE if frozen else ():
            if getattr(self, name) not in (fields_of(TrainConfig)[name].default, "adamw"):
                raise ValueError(f"{name} does nothing for {head}")
        if frozen and self.devices > 1:
            raise ValueError(f"{head} trains on one device, not {self.devices} (--devices)")
        if frozen and self.views > 1 + self.feature_views:
            seen = f"{self.feature_views} feature_views and the image"
            raise ValueError(f"{head} has {seen}, but views are {self.views}")
        if self.targets == "mean" and self.views + self.local_views == 2:
            raise ValueError("the mean of one target is that target: views must be 3 or more for it")
        if self.rotations and self.objective != "elbo":
            raise ValueError(f"rotations are a target of the elbo, not of the objective {self.objective}")
        if self.local_size and not self.local_views:
            raise ValueError("local_size does nothing without local_views")

    def _defaults(self) -> dict[str, Any]:
        return DATASET_DEFAULTS["folder"] | DATASET_DEFAULTS.get(self.dataset, {})

    @property
    def frozen(self) -> bool:
        """Whether nothing of the encoder changes."""
        return self.encoder_lr_scale == 0

    def fitted(self, images: int, processes: int = 1) -> TrainConfig:
        """Resolved settings fitted to the number of images: at least `STEPS` steps an epoch, or else a smaller batch.

        A batch size that was asked for stays. A frozen encoder's head gets `HEAD_STEPS` steps unless epochs are said.
        Raises ``ValueError`` if there are too few images for any batch.
        """
        most, default = self.batch_size, self._defaults()["batch_size"]
        if most is None:
            most = min(default, max(images // STEPS, min(SMALLEST_BATCH, images)))
            most -= most % processes
        if most < 2:  # batch norm needs two
            raise ValueError(f"training needs at least two images, and one a process, but has {images}")
        epochs = self.epochs or math.ceil(HEAD_STEPS / max(1, images // most))
        if self.batch_size is None and most != default:
            logging.getLogger("pyro_vje").info("%d images at a time (batch_size), to fit %d", most, images)
        return dataclasses.replace(self, batch_size=most, epochs=epochs)

    def to_dict(self) -> dict[str, Any]:
        """The settings as JSON-ready values (an infinite df becomes the string ``"inf"``)."""
        infinite = {"df": "inf"} if self.df == math.inf else {}  # which JSON lacks
        return dataclasses.asdict(self) | infinite

    @classmethod
    def from_dict(cls, values: dict[str, Any]) -> TrainConfig:
        """Settings from `to_dict`'s form; raises ``ValueError`` if one is unknown, out of range, or of another type."""
        known = fields_of(cls)
        if unknown := ", ".join(name for name in values if name not in known):
            raise ValueError(f"unknown settings {unknown} (of a newer version?); known: {', '.join(known)}")
        return cls(**values | {"df": math.inf} if values.get("df") == "inf" else values)


@settings
class ScoreConfig:
    """Every setting of scoring: which images, by what, what is decided, and what is written."""

    data: Place | None = say(None, "A folder of images, all of which are scored.")
    dataset: str | None = say(None, "Score a data set's test split instead. [default: the run's own]")
    data_dir: Text | None = say(None, "Where the data set lies or is downloaded to. [default: the run's own]")
    download: bool = say(True, "Fetch a missing data set.", off="no-download")
    normal_class: str | None = say(None, "The class that counts as normal in metrics. [default: the run's]")
    score: str | None = say(
        None,
        "A score by name (an unknown one lists them), or module:function. "
        "[default: aggregate, or rotation-joint after --rotations; conditional without reference images]",
    )
    score_likelihood: str | None = say(None, "Score with this likelihood family. [default: the trained one]")
    calibration: str | None = say(None, "p-values by this calibration of the run. [default: its own]")
    num_particles: int = say(16, "Samples of the latent, which cost no pass; 0: a formula, no noise.", ge=0)
    seed: int = say(0, "Seed of every draw.", ge=0, le=2**31 - 1)
    alpha: float | None = say(None, "Call an image an anomaly if its p-value is at most this.", gt=0, lt=1)
    fdr: float | None = say(None, "Most false ones among anomalies (Benjamini-Hochberg).", gt=0, lt=1)
    batch_size: int = say(256, "Images at once; on a CPU raised until passes of the encoder are full.", ge=1)
    out: Place | None = say(None, "The CSV. [default: scores.csv in the run folder]")
    report: bool = say(False, "Write one self-contained HTML page beside the CSV.")
    maps: bool = say(False, "Show where: a map of each image as a 16-bit PNG (what a run learned by `maps`).")
    maps_npz: bool = say(False, "Write all maps as one maps.npz too.")
    masks: Place | None = say(None, "A folder of masks, white where images are defective: pixel metrics of the maps.")
    parquet: bool = say(False, "Write the table as Parquet too (needs pyarrow).")
    resume: bool = say(False, "Go on from an interrupted call with the same options, if there was one.")
    trust_plugins: bool = say(False, "Import code that the run's configuration names (module:attribute).")
    deterministic: bool = say(False, "Kernels that give the same bits every time, on a GPU too.")

    def __post_init__(self) -> None:
        if self.alpha is not None and self.fdr is not None:
            raise ValueError("alpha and fdr are two rules for one decision: give one of them")
        if self.data is not None and self.dataset is not None:
            raise ValueError("give either a folder of images (data) or a data set (dataset), not both")
        if not self.maps and (self.maps_npz or self.masks is not None):
            raise ValueError("masks are compared with maps, and maps_npz holds them: add maps (--maps)")


@settings
class MapConfig:
    """How a run learns to show where an image is strange."""

    places: tuple[str, ...] = say((), "Modules of the encoder that describe places. [default: its middle stages]")


@settings
class EvalConfig:
    """How features are evaluated; each of those that may be several is evaluated with each of the others."""

    k: tuple[int, ...] = say((200,), "Neighbours of the k-NN, the first in the table.")
    temperature: tuple[float, ...] = say((0.1,), "Temperature of the k-NN weights, as --k.")
    linear: tuple[Literal["logistic", "sgd"], ...] = say(("logistic",), "Probe of clean or augmented images.")
    probe_epochs: int = say(90, "Epochs of --linear sgd, in which both encoders see every image.", ge=1)


RECIPES = {path.stem: path for path in sorted((Path(__file__).parent / "recipes").glob("*.toml"))}
"""Settings under which results are published, a file each, with what is known of it in its comments."""


def load_recipe(name: str | Path) -> dict[str, Any]:
    """Settings of a recipe by name, or of a TOML file by path: arguments for `TrainConfig`.

    The radius ``"none"`` is ``None``, which TOML lacks. Raises ``ValueError`` if there is no such recipe, it is no
    TOML, or a key is unknown or has a value of another type.
    """
    path = RECIPES.get(str(name), Path(name))
    if not path.is_file():
        known = f"choose one of {', '.join(RECIPES)}"
        raise ValueError(f"no recipe {str(name)!r}: {known}, or the path of a TOML file")
    try:
        values = tomllib.loads(path.read_text("utf-8"))
        if values.get("radius") == "none":
            values["radius"] = None
        TrainConfig.from_dict(values)
    except ValueError as error:
        what = " is no TOML" if isinstance(error, tomllib.TOMLDecodeError) else ""
        raise ValueError(f"recipe {path}{what}: {error}") from None
    return values


DATASET_DEFAULTS: dict[str, dict[str, Any]] = {
    "digits": {"encoder": "resnet-small", "epochs": 30, "batch_size": 128, "knn_every": 5},
    "cifar10": {"encoder": "resnet18", "epochs": 200, "batch_size": 512},
    "cifar100": {"encoder": "resnet18", "epochs": 200, "batch_size": 512},
    "stl10": {"encoder": "resnet18", "epochs": 200, "batch_size": 256},
    "imagenet": {"encoder": "resnet50", "epochs": 100, "batch_size": 256},
    "folder": {"encoder": "resnet18", "epochs": 100, "batch_size": 128},
    "images": {"encoder": "resnet-small", "epochs": 100, "batch_size": 128},
}

LR = {"sgd": 0.2, "adamw": 1e-3, "lars": 0.3}
# Steps that an epoch should have; the batch size below which none is made smaller for it; steps of a frozen run.
STEPS, SMALLEST_BATCH, HEAD_STEPS = 20, 16, 500
ENCODERS_ALONE = ("optimizer", "local_views", "rotations", "predictor_lr", "clip_norm", "ema")
"""Settings of training that do nothing for a frozen encoder's head, which takes AdamW."""
INSPECTION = ("encoder", "weights", "image_size", "fit")
"""Settings of training that `inspect` takes."""
ABLATION_AXES = ("likelihood", "df", "unit_radius", "radius", "kl_weight", "shared_variance", "seed")
"""What an ablation always varies (with one value or several), the seed last."""
