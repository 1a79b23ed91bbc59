"""The benchmarks, each a function in the registry; a new one is one more. Quick sizes only try them out."""

from __future__ import annotations

import math
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from statistics import median
from typing import Any

import lightning
import torch
from sklearn.neighbors import KernelDensity
from torch import Tensor, nn
from torch.nn.functional import softplus

from benchmarks.harness import Growth, Result, Row, Settings, Work, benchmark, measure, synchronise, versus
from benchmarks.rivals import (
    LoaderViews,
    SimSiam,
    installed,
    kornia_views,
    lightly_views,
    plain_objective,
    torchvision_views,
)
from pyro_vje import VJE, SymmetricELBO, TrainConfig
from pyro_vje.anomaly.parts import Scorer
from pyro_vje.data import ImageSet, make_loader, views_for
from pyro_vje.model.build import build_model
from pyro_vje.model.encoders import build_encoder, feature_dim
from pyro_vje.model.encoding import Encoded, encode_batches
from pyro_vje.runs.folder import describe_run
from pyro_vje.runs.stopping import StopRequest
from pyro_vje.training import run as training
from pyro_vje.training.checkpoints import LAST, Checkpoints
from pyro_vje.training.features import cache_features
from pyro_vje.training.module import Pretraining, quiet_lightning
from pyro_vje.training.monitor import EpochReport

ROOT = Path(__file__).resolve().parents[1]
SIZE = 32
"""Pixels of the images, those of CIFAR, wherever nothing else is said."""
FLOAT32 = "32-true"
"""Lightning's name for no autocast, as the rows' precision."""


def encoders(settings: Settings) -> list[tuple[str, int]]:
    """Encoder and batch size of whole steps: the one for CPUs, and CIFAR's."""
    return [("resnet-small", 16)] if settings.quick else [("resnet-small", 256), ("resnet18", 256)]


def affordable_encoders(settings: Settings) -> list[tuple[str, int]]:
    """Without CIFAR's on a CPU, where a step of it takes seconds and an epoch of a few many minutes in all."""
    return encoders(settings) if settings.device.type == "cuda" else encoders(settings)[:1]


def few_steps(most: int, encoder: str, settings: Settings) -> int:
    """Steps to time: two where one of them takes many seconds."""
    slow = encoder != "resnet-small" and settings.device.type == "cpu"
    return 2 if settings.quick or slow else most


def random_images(count: int, size: int = SIZE) -> ImageSet:
    """uint8 images of noise: no transform or network here is faster or slower for it."""
    images = torch.randint(0, 256, (count, 3, size, size), dtype=torch.uint8)
    return ImageSet(images, [str(i) for i in range(count)])


def noise_views(batch: int, settings: Settings) -> Tensor:
    """Normalised views (2, B, 3, S, S) on the device."""
    return torch.randn(2, batch, 3, SIZE, SIZE, device=settings.device)


def new_encoder(name: str, settings: Settings) -> nn.Module:
    """A bare encoder, in the memory format that suits convolutions."""
    return build_encoder(name, SIZE).to(memory_format=torch.channels_last).to(settings.device)


def new_model(encoder: str, batch: int, settings: Settings) -> tuple[VJE, TrainConfig]:
    """A fresh default model and its configuration, two epochs long."""
    config = TrainConfig("cifar10", encoder=encoder, batch_size=batch, epochs=2, knn_every=0).resolved()
    return build_model(config, SIZE).to(settings.device), config


class FixedPosterior(nn.Module):
    """Loc and scale as parameters in place of a posterior network: what remains is the objective alone."""

    def __init__(self, count: int, dim: int) -> None:
        super().__init__()
        self.loc, self.raw_scale = (nn.Parameter(torch.randn(count, dim)), nn.Parameter(torch.zeros(count, dim)))

    def forward(self, embeddings: Tensor) -> tuple[Tensor, Tensor]:
        """Loc and scale, whatever the embeddings."""
        return self.loc, softplus(self.raw_scale)


def objective_alone(dim: int, batch: int, settings: Settings) -> tuple[VJE, Tensor]:
    """A model without networks, and the embeddings (2, B, D) that stand in for its views."""
    vje = VJE(nn.Identity(), dim, embedding_dim=dim, projector=nn.Identity())
    vje.posterior_network = FixedPosterior(2 * batch, dim)  # type: ignore[assignment]
    return vje.to(settings.device), torch.randn(2, batch, dim, device=settings.device)


@benchmark("elbo", lambda settings: [(dim,) for dim in (128, 512, 2048)])
def elbo(settings: Settings, dim: int) -> Iterator[Result]:
    """The objective on embeddings alone, forward and backward: what Pyro costs."""
    batch = 8 if settings.quick else 256
    vje, embeddings = objective_alone(dim, batch, settings)
    objective = SymmetricELBO()(vje.model, vje.guide)
    what = f"symmetric ELBO alone, D {dim}, batch {batch}"
    ours, rival = (lambda: objective(embeddings).backward(), lambda: plain_objective(vje, embeddings).backward())
    yield versus(settings, what, "plain torch", ours, rival, precision=FLOAT32)


def train_step(module: nn.Module, loss: Callable[[Tensor], Tensor], settings: Settings) -> Callable[[Tensor], None]:
    """Forward, backward and an SGD step as in training, at a rate that leaves the weights what they are."""
    optimiser = torch.optim.SGD(module.parameters(), lr=1e-9, momentum=0.9, fused=True)

    def step(views: Tensor) -> None:
        with settings.autocast():
            value = loss(views)
        value.backward()
        optimiser.step()
        optimiser.zero_grad()

    return step


@benchmark("step", encoders)
def step(settings: Settings, encoder: str, batch: int) -> Iterator[Result]:
    """The objective in a whole step, networks and optimiser included, on resident views."""
    vje, _ = new_model(encoder, batch, settings)
    views = noise_views(batch, settings)
    ours = train_step(vje, SymmetricELBO()(vje.model, vje.guide), settings)
    rival = train_step(vje, lambda views: plain_objective(vje, views), settings)
    what = f"whole step, {encoder}, batch {batch}"
    yield versus(settings, what, "plain torch", lambda: ours(views), lambda: rival(views), 1.03, batch)


@benchmark("precision", affordable_encoders)
def precision(settings: Settings, encoder: str, batch: int) -> Iterator[Result]:
    """Whether bfloat16 is faster here; wanted where ``--precision auto`` chooses it."""
    vje, _ = new_model(encoder, batch, settings)
    views = noise_views(batch, settings)
    ours, rival = (
        train_step(vje, SymmetricELBO()(vje.model, vje.guide), replace(settings, precision=name))
        for name in ("bf16-mixed", FLOAT32)
    )
    wanted = 1.0 if settings.precision == "bf16-mixed" else None
    what, works = f"whole step in bf16, {encoder}, batch {batch}", (lambda: ours(views), lambda: rival(views))
    yield versus(settings, what, "in float32", *works, wanted, batch, precision="bf16-mixed")


@benchmark("views", lambda settings: [("cifar10", 32), ("stl10", 96)])
def views(settings: Settings, recipe: str, size: int) -> Iterator[Result]:
    """Pairs of views of resident images."""
    batch = 32 if settings.quick else 256
    count = 2 * batch if settings.quick else 2048 if size == 32 else 1024
    images = random_images(count, size).images
    assert isinstance(images, Tensor)
    two_views, _ = views_for(recipe, size)
    generator = torch.Generator(settings.device).manual_seed(0)
    resident = make_loader(images, batch, "memory", device=settings.device)
    what = f"two views, recipe {recipe}, {size} px"
    ours = drain(resident, lambda batch: two_views(batch[0], generator))

    def kornia() -> Work:
        rival = kornia_views(two_views)
        return drain(resident, lambda batch: rival(batch[0]))

    # Of those that are installed: their start is part of no row.
    rivals: dict[str, tuple[str, Callable[[], Work]]] = {
        "torchvision": (
            f"torchvision v2, DataLoader of {settings.threads}",
            lambda: drain(LoaderViews(images, batch, torchvision_views(two_views), settings)),
        ),
        "kornia": ("kornia", kornia),
        "lightly": (
            f"lightly's SimSiamTransform, DataLoader of {settings.threads}",
            lambda: drain(LoaderViews(images, batch, lightly_views(two_views), settings)),
        ),
    }
    for module, (rival, work) in rivals.items():
        if installed(module):
            yield versus(settings, what, rival, ours, work(), 0.1, count, precision=FLOAT32)
        else:
            yield missing(what, rival, module)


def missing(what: str, rival: str, module: str) -> Row:
    """The row that stands for a comparison with what is not there."""
    return Row(what, rival, note=f"{module} is not installed: pip install {module}")


def drain(batches: Iterable[Any], function: Callable[[Any], object] = id) -> Callable[[], None]:
    """One pass, the function applied to each batch."""

    def epoch() -> None:
        for batch in batches:
            function(batch)

    return epoch


class EpochClock(lightning.pytorch.Callback):
    """Times the first of two epochs with the checkpoint at its end, then stops: the last also measures health."""

    def on_train_epoch_start(self, *_: Any) -> None:
        """Start the clock."""
        synchronise()
        self.start = time.perf_counter()

    def on_train_epoch_end(self, trainer: lightning.Trainer, *_: Any) -> None:
        """Do without the second epoch."""
        trainer.should_stop = True

    def on_train_end(self, *_: Any) -> None:
        """Stop the clock."""
        synchronise()
        self.seconds = time.perf_counter() - self.start


def vje_epoch(encoder: str, train_set: ImageSet, batch: int, settings: Settings) -> Callable[[], float]:
    """An epoch of pretraining as `pyro_vje.train` runs it; gives its seconds, without the trainer's start."""
    vje, config = new_model(encoder, batch, settings)
    views, view = views_for("cifar10", SIZE)

    def epoch() -> float:
        clock = EpochClock()
        with tempfile.TemporaryDirectory() as folder, quiet_lightning():
            report = EpochReport(Path(folder), train_set, None, view)
            checkpoints = Checkpoints(Path(folder) / LAST, StopRequest())
            trainer = training._trainer(config, [report, checkpoints, clock], settings.precision, None)
            trainer.fit(Pretraining(vje, config, train_set, views))
        return clock.seconds

    return epoch


@benchmark("simsiam", affordable_encoders)
def simsiam(settings: Settings, encoder: str, batch: int) -> Iterator[Result]:
    """A step and an epoch against lightly's SimSiam, each with its own heads and objective on the same encoder.

    The step is on resident views; to the epoch each brings its own, lightly's from a `DataLoader`.
    """
    steps = 2 if settings.quick else 5
    whats = (f"whole step, {encoder}, batch {batch}", f"epoch of {steps} steps, {encoder}, batch {batch}")
    if not installed("lightly"):
        yield from (missing(what, "lightly's SimSiam", "lightly") for what in whats)
        return
    wanted = 1 / 3 if settings.device.type == "cuda" else 1.0
    network = new_encoder(encoder, settings)
    model = SimSiam(network, feature_dim(network, SIZE)).to(settings.device)
    rival = train_step(model, model, settings)
    vje, _ = new_model(encoder, batch, settings)
    ours = train_step(vje, SymmetricELBO()(vje.model, vje.guide), settings)
    views = noise_views(batch, settings)
    name = "lightly's SimSiam, heads of 2048"
    yield versus(settings, whats[0], name, lambda: ours(views), lambda: rival(views), wanted, batch)
    train_set = random_images(batch * steps)
    assert isinstance(train_set.images, Tensor)
    transform = lightly_views(views_for("cifar10", SIZE)[0])
    theirs = drain(LoaderViews(train_set.images, batch, transform, settings), rival)
    epoch = vje_epoch(encoder, train_set, batch, settings)
    name += f", SimSiamTransform in a DataLoader of {settings.threads}"
    yield versus(settings, whats[1], name, epoch, theirs, wanted, len(train_set))


@benchmark("epoch", encoders)
def epoch(settings: Settings, encoder: str, batch: int) -> Iterator[Result]:
    """A whole epoch against the encoder alone, forward and backward, on resident noise: the physical limit."""
    steps = few_steps(10, encoder, settings)
    train_set = random_images(batch * steps)
    network = new_encoder(encoder, settings)
    noise = noise_views(batch, settings).flatten(0, 1).contiguous(memory_format=torch.channels_last)

    def bare() -> None:
        for _ in range(steps):
            network.zero_grad()
            with settings.autocast():
                features = network(noise)
            features.float().square().mean().backward()

    what = f"epoch of {steps} steps, {encoder}, batch {batch}"
    ours = vje_epoch(encoder, train_set, batch, settings)
    yield versus(settings, what, "bare encoder", ours, bare, 1 / 0.9, len(train_set))


@benchmark("scoring", encoders)
def scoring(settings: Settings, encoder: str, batch: int) -> Iterator[Result]:
    """Encoding and likelihood, as `score` has the model from `load_run`, against the forward pass in float32."""
    steps = few_steps(8, encoder, settings)
    images = random_images(batch * steps)
    vje, _ = new_model(encoder, batch, settings)
    network = new_encoder(encoder, settings).eval()
    noise = noise_views(batch, settings)[0].contiguous(memory_format=torch.channels_last)

    @torch.inference_mode()
    def bare() -> None:
        for _ in range(steps):
            network(noise)

    ours = score_images(vje, images, batch, settings)
    what = f"scoring, {encoder}, batch {batch}, 16 particles"
    yield versus(settings, what, "bare forward pass", ours, bare, 1 / 0.95, len(images), precision=FLOAT32)


FROZEN, FROZEN_SIZE = "timm:tf_efficientnet_lite0", 224


@benchmark("features")
def features(settings: Settings) -> Iterator[Result]:
    """What `inspect` lets a frozen encoder make of an image, clean and in views, against as many passes in float32."""
    count, side = (8, 64) if settings.quick else (128, FROZEN_SIZE)
    if not installed("timm"):
        yield missing(f"features of an image and its views, {side} pixels", "bare forward pass", "timm")
        return
    images = random_images(count, side)
    config = TrainConfig("images", ".", encoder=FROZEN, encoder_lr_scale=0.0, image_size=side).resolved()
    vje, info = build_model(config, side).to(settings.device).eval(), describe_run(config, images)
    views = config.feature_views
    noise = torch.randn(8, 3, side, side, device=settings.device).contiguous(memory_format=torch.channels_last)

    @torch.inference_mode()
    def bare() -> None:
        for _ in range(count // 8 * (1 + views)):
            vje.encoder(noise)

    def ours(bf16: bool) -> None:
        with tempfile.TemporaryDirectory() as folder:
            cache_features(vje, images, info, Path(folder), settings.device.type, bf16=bf16)

    for name in dict.fromkeys((settings.precision, FLOAT32)):
        works = (partial(ours, name != FLOAT32), bare)
        what = f"features of an image and its views, {side} pixels, views in {name}"
        rival = f"bare forward pass of {FROZEN}, float32"
        yield versus(settings, what, rival, *works, 1.1, count * (1 + views), precision=name)


def score_images(vje: VJE, images: ImageSet, batch: int, settings: Settings) -> Work:
    """What `pyro_vje.score` computes of images, without its files."""
    _, view = views_for("cifar10", SIZE)
    scorer = Scorer(vje)

    def run() -> None:
        for encoded in encode_batches(vje, images, view, batch_size=batch):
            scorer.scores("conditional", encoded).cpu()

    return run


REFERENCE, KERNEL_DIM = 10_000, 512
"""Kernels of the aggregate density, and their dimension."""


def kernels(settings: Settings, likelihood: str, *, width: float | None = None) -> tuple[Scorer, Tensor]:
    """A scorer with random reference images, and embeddings to score; all kernels of one width, if there is one."""
    count, dim = (50, 8) if settings.quick else (REFERENCE, KERNEL_DIM)
    vje = VJE(nn.Identity(), dim, embedding_dim=dim, likelihood=likelihood).eval().requires_grad_(False)
    loc = torch.randn(count, dim)
    scale = torch.full_like(loc, width) if width else torch.rand_like(loc) + 0.5
    embeddings = (loc + torch.randn(count, dim)).to(settings.device)
    return Scorer(vje.to(settings.device), reference=Encoded(loc, loc, scale)), embeddings


@benchmark("aggregate")
def aggregate(settings: Settings) -> Iterator[Result]:
    """The density over reference images by matrix products, against a loop over the images and scikit-learn's KDE."""
    scorer, embeddings = kernels(settings, "polar-student-t")
    some = embeddings[: 5 if settings.quick else 100]
    reference = scorer.reference
    assert reference is not None

    def loop() -> list[Tensor]:
        likelihood = scorer.vje.likelihood(reference.loc, reference.scale)
        return [likelihood.log_prob(embedding).logsumexp(0) for embedding in some]

    size = f"aggregate, {len(reference.loc)} kernels × {len(some)} images × D {some.shape[1]}"
    ours = partial(scorer.log_aggregate, some)
    yield versus(settings, size, "loop over images", ours, loop, 0.1, len(some), FLOAT32)
    scorer, embeddings = kernels(settings, "normal", width=0.7)
    some = embeddings[: 5 * len(some)]
    size = f"aggregate, {len(reference.loc)} kernels × {len(some)} images × D {some.shape[1]}, Gaussian"
    rival = KernelDensity(bandwidth=0.7).fit(reference.loc.cpu().numpy())
    ours, theirs = partial(scorer.log_aggregate, some), partial(rival.score_samples, some.cpu().numpy())
    yield versus(settings, size, "scikit-learn KDE", ours, theirs, 0.1, len(some), FLOAT32)


def aggregate_of(settings: Settings, count: int) -> Work:
    """The aggregate density of a number of images, in batches as `score` takes them."""
    scorer, embeddings = kernels(settings, "polar-student-t")
    batches = embeddings[:count].split(256)
    return lambda: [scorer.log_aggregate(batch) for batch in batches] and None


def step_of(settings: Settings, batch: int) -> Work:
    """A training step on a batch."""
    vje, _ = new_model("resnet-small", batch, settings)
    step, views = (train_step(vje, SymmetricELBO()(vje.model, vje.guide), settings), noise_views(batch, settings))
    return lambda: step(views)


def objective_of(settings: Settings, dim: int) -> Work:
    """The objective of a batch, and its gradients, in D dimensions."""
    vje, embeddings = objective_alone(dim, 8 if settings.quick else 256, settings)
    objective = SymmetricELBO()(vje.model, vje.guide)
    return lambda: objective(embeddings).backward()


def particles_of(settings: Settings, count: int) -> Work:
    """The likelihood of encoded images, with a number of samples of each latent."""
    vje, _ = new_model("resnet-small", 256, settings)
    shape = (3, 16 if settings.quick else 4096, vje.embedding_dim)
    embeddings, loc, scale = torch.randn(shape, device=settings.device)
    scorer, posteriors = Scorer(vje, num_particles=count), Encoded(embeddings, loc, scale.exp())
    return lambda: scorer.parts(posteriors).log_likelihood


def scoring_of(settings: Settings, count: int) -> Work:
    """Scoring a number of images: one image, expanded, so that they take no memory of their own."""
    images = torch.zeros(1, 3, SIZE, SIZE, dtype=torch.uint8).expand(count, -1, -1, -1)
    vje, _ = new_model("resnet-small", 256, settings)
    return score_images(vje, ImageSet(images, [""] * count), 256, settings)


@dataclass(frozen=True)
class Task:
    """Something whose cost grows: ``work(settings, x)`` for each x of ``sizes``; ``quick`` ones to try it out."""

    what: str
    variable: str
    work: Callable[[Settings, int], Work]
    sizes: Sequence[int]
    quick: Sequence[int]
    precision: str = FLOAT32


# An empty precision is that of the settings.
TASKS = {
    "step": Task("training step, resnet-small", "batch", step_of, (32, 64, 128, 256, 512), (4, 8), ""),
    "elbo": Task("ELBO alone, batch 256", "D", objective_of, (128, 256, 512, 1024, 2048, 4096), (8, 16)),
    "particles": Task("likelihood of 4096 images", "particles", particles_of, (1, 4, 16, 64), (1, 2)),
    "scoring": Task("scoring, resnet-small", "images", scoring_of, (1_000, 5_000, 10_000, 50_000), (8, 16)),
    "aggregate": Task(
        f"aggregate, {REFERENCE} kernels, D {KERNEL_DIM}", "images", aggregate_of, (1_000, 3_000, 10_000), (8, 16)
    ),
}


@benchmark("growth", lambda settings: [(task,) for task in TASKS.values()])
def growth(settings: Settings, task: Task) -> Iterator[Result]:
    """How time grows."""
    sizes = task.quick if settings.quick else task.sizes
    works = [task.work(settings, x) for x in sizes]
    works[0]()
    seconds = [measure(work) for work in works]
    if sum(seconds) < 10:  # else they outlast any disturbance, and were no cold start
        calls = [1 if settings.quick else math.ceil(0.1 / each) for each in seconds]
        # Sizes in turns, as rivals are.
        rounds = [[measure(*each) for each in zip(works, calls, strict=True)] for _ in range(3)]
        seconds = [median(each) for each in zip(*rounds, strict=True)]
    yield Growth(task.what, task.variable, "s", list(zip(sizes, seconds, strict=True)), precision=task.precision)


# The kernel's own peak of this address space, where it tells: ru_maxrss starts at the parent's size on Linux.
PEAK = """
import resource, sys, torch
from pathlib import Path
from benchmarks.speed import TASKS, Settings
name, size, quick, threads, precision = sys.argv[1:]
TASKS[name].work(Settings(quick == "True", int(threads), precision), int(size))()
status = Path("/proc/self/status")
if torch.cuda.is_available():
    print(torch.cuda.max_memory_allocated() / 2**20)
elif status.exists():
    print(int(status.read_text().split("VmHWM:")[1].split()[0]) / 2**10)
else:
    print(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**(20 if sys.platform == "darwin" else 10))
"""


@benchmark("memory", lambda settings: list(TASKS.items()))
def memory(settings: Settings, name: str, task: Task) -> Iterator[Result]:
    """How peak memory grows, each size in a fresh process, whose own memory counts on a CPU: the libraries' too."""
    sizes = task.quick if settings.quick else (task.sizes[0], task.sizes[len(task.sizes) // 2], task.sizes[-1])
    how = (str(settings.quick), str(settings.threads), settings.precision)
    points = [(x, float(run_python(PEAK, settings, name, str(x), *how))) for x in sizes]
    what = f"peak memory of {task.what}"
    yield Growth(what, task.variable, "MiB", points, precision=task.precision)


HELP = "from pyro_vje.cli import main; main(['--help'])"
FIRST_STEP = """
import os, sys
from pyro_vje import TrainConfig
from pyro_vje.training import run as training
training.Pretraining.on_train_batch_end = lambda *_: os._exit(0)
training.train(TrainConfig("digits", epochs=1), sys.argv[1], overwrite=True)
"""


@benchmark("startup")
def startup(settings: Settings) -> Iterator[Result]:
    """What a user waits for before anything happens, each time in a fresh process."""
    torch_alone, libraries = "import torch", "import torch, torchvision, pyro, lightning, matplotlib"
    command, rival = (lambda: run_python(HELP, settings), lambda: run_python(torch_alone, settings))
    yield versus(settings, "pyro-vje --help", torch_alone, command, rival)
    with tempfile.TemporaryDirectory() as folder:
        first = lambda: run_python(FIRST_STEP, settings, f"{folder}/run")  # noqa: E731
        imports = lambda: run_python(libraries, settings)  # noqa: E731
        yield versus(settings, "process to first training step, digits", libraries, first, imports)


def run_python(code: str, settings: Settings, *arguments: str) -> str:
    """Run a program in a fresh interpreter and return what it prints."""
    environment = {**os.environ, "OMP_NUM_THREADS": str(settings.threads)}
    command = [sys.executable, "-c", code, *arguments]
    done = subprocess.run(command, env=environment, cwd=ROOT, capture_output=True, text=True)
    if done.returncode:
        raise RuntimeError(f"the benchmark's process failed: {done.stderr.strip()[-2000:]}")
    return done.stdout
