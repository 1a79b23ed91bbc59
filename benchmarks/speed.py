"""The benchmarks, each a function in the registry; a new one is one more. Quick sizes only try them out."""

from __future__ import annotations

import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from statistics import median
from typing import Any

import lightning
import torch
from torch import Tensor, nn
from torch.nn.functional import softplus

from benchmarks.harness import Growth, Result, Row, Settings, Work, benchmark, measure, synchronise, versus
from benchmarks.rivals import SimSiam, TorchvisionViews, installed, kornia_views, plain_objective
from pyro_vje import VJE, SymmetricELBO, TrainConfig, training
from pyro_vje.data import ImageSet, ResidentLoader, views_for
from pyro_vje.encoders import build_encoder, feature_dim
from pyro_vje.encoding import encode_batches
from pyro_vje.runs import build_model
from pyro_vje.scoring import latent_noise, likelihood_parts

SIZE = 32
"""Pixels of the images, those of CIFAR, wherever nothing else is said."""


def encoders(settings: Settings) -> list[tuple[str, int]]:
    """Encoder and batch size of whole steps: the one for CPUs, and CIFAR's."""
    return [("resnet-small", 16)] if settings.quick else [("resnet-small", 256), ("resnet18", 256)]


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
        self.loc, self.raw_scale = (
            nn.Parameter(torch.randn(count, dim)),
            nn.Parameter(torch.zeros(count, dim)),
        )

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
    ours, rival = (
        lambda: objective(embeddings).backward(),
        lambda: plain_objective(vje, embeddings).backward(),
    )
    yield versus(settings, what, "plain torch", ours, rival)


def train_step(
    module: nn.Module, loss: Callable[[Tensor], Tensor], settings: Settings
) -> Callable[[Tensor], None]:
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
    what = f"whole step, {encoder}, batch {batch}, {settings.precision}"
    yield versus(settings, what, "plain torch", lambda: ours(views), lambda: rival(views), 1.03, batch)


@benchmark("views", lambda settings: [("cifar10", 32), ("stl10", 96)])
def views(settings: Settings, recipe: str, size: int) -> Iterator[Result]:
    """Pairs of views of resident images."""
    batch = 32 if settings.quick else 256
    count = 2 * batch if settings.quick else 2048
    images = random_images(count, size).images
    two_views, _ = views_for(recipe, size)
    generator = torch.Generator(settings.device).manual_seed(0)
    resident = ResidentLoader(images, batch, device=settings.device)  # type: ignore[arg-type]
    torchvision = TorchvisionViews(images, batch, two_views, settings)  # type: ignore[arg-type]
    what = f"two views, recipe {recipe}, {size} px"
    ours = drain(resident, lambda images: two_views(images, generator))
    rival = f"torchvision v2, DataLoader of {settings.threads}"
    yield versus(settings, what, rival, ours, drain(torchvision), 0.1 if size == 32 else None, count)
    if installed("kornia"):
        yield versus(settings, what, "kornia", ours, drain(resident, kornia_views(two_views)), None, count)
    else:
        yield Row(what, "kornia", note="kornia is not installed")


def drain(batches: Iterable[Tensor], function: Callable[[Tensor], object] = id) -> Callable[[], None]:
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
    vje.encoder.to(memory_format=torch.channels_last)
    _, view = views_for("cifar10", SIZE)

    def epoch() -> float:
        clock = EpochClock()
        with tempfile.TemporaryDirectory() as folder, training._quiet_lightning():
            report = training.EpochReport(Path(folder), train_set, None, view)
            trainer = training._trainer(Path(folder), config, report, settings.precision)
            trainer.callbacks.append(clock)  # type: ignore[attr-defined]
            trainer.fit(training.Pretraining(vje, config, train_set))
        return clock.seconds

    return epoch


@benchmark("simsiam", encoders)
def simsiam(settings: Settings, encoder: str, batch: int) -> Iterator[Result]:
    """An epoch against SimSiam's, each with its own views, heads and objective on the same encoder."""
    steps = 2 if settings.quick else 5
    train_set = random_images(batch * steps)
    network = new_encoder(encoder, settings)
    model = SimSiam(network, feature_dim(network, SIZE)).to(settings.device)
    loader = TorchvisionViews(train_set.images, batch, views_for("cifar10", SIZE)[0], settings)  # type: ignore[arg-type]
    rival = "lightly's SimSiam" if installed("lightly") else "SimSiam by hand (lightly is not installed)"
    yield versus(
        settings,
        f"epoch of {steps} steps, {encoder}, batch {batch}, {settings.precision}",
        f"{rival}, torchvision v2 views",
        vje_epoch(encoder, train_set, batch, settings),
        drain(loader, train_step(model, model, settings)),
        1.0,
        len(train_set),
    )


@benchmark("epoch", encoders)
def epoch(settings: Settings, encoder: str, batch: int) -> Iterator[Result]:
    """A whole epoch against the encoder alone, forward and backward, on resident noise: the physical limit."""
    steps = 2 if settings.quick else 10 if encoder == "resnet-small" else 5
    train_set = random_images(batch * steps)
    network = new_encoder(encoder, settings)
    noise = noise_views(batch, settings).flatten(0, 1).contiguous(memory_format=torch.channels_last)

    def bare() -> None:
        for _ in range(steps):
            network.zero_grad()
            with settings.autocast():
                features = network(noise)
            features.float().square().mean().backward()

    what = f"epoch of {steps} steps, {encoder}, batch {batch}, {settings.precision}"
    ours = vje_epoch(encoder, train_set, batch, settings)
    yield versus(settings, what, "bare encoder", ours, bare, 1 / 0.9, len(train_set))


@benchmark("scoring", encoders)
def scoring(settings: Settings, encoder: str, batch: int) -> Iterator[Result]:
    """Encoding and likelihood, as `score` has the model from `load_run`, against the forward pass in float32."""
    steps = 2 if settings.quick else 8
    images = random_images(batch * steps)
    vje, _ = new_model(encoder, batch, settings)
    network = new_encoder(encoder, settings).eval()
    noise = noise_views(batch, settings)[0].contiguous(memory_format=torch.channels_last)

    @torch.inference_mode()
    def bare() -> None:
        for _ in range(steps):
            network(noise)

    ours = score_images(vje, images, batch, settings)
    what = f"scoring, {encoder}, batch {batch}, 16 particles, float32"
    yield versus(settings, what, "bare forward pass", ours, bare, 1 / 0.95, len(images))


def score_images(vje: VJE, images: ImageSet, batch: int, settings: Settings) -> Work:
    """What `pyro_vje.score` computes of images, without its files."""
    _, view = views_for("cifar10", SIZE)
    noise = latent_noise(16, vje.embedding_dim, seed=0)

    def run() -> None:
        for encoded in encode_batches(vje, images, view, batch_size=batch, device=settings.device):
            for part in likelihood_parts(vje, encoded.embeddings, encoded.loc, encoded.scale, noise):
                part.cpu()

    return run


@benchmark("growth")
def growth(settings: Settings) -> Iterator[Result]:
    """Time against batch, D, images scored and particles."""
    vje, _ = new_model("resnet-small", 256, settings)
    train = train_step(vje, SymmetricELBO()(vje.model, vje.guide), settings)
    images, dim = 16 if settings.quick else 4096, vje.embedding_dim
    embeddings, loc, scale = torch.randn(3, images, dim, device=settings.device)

    def step_of(batch: int) -> Work:
        views = noise_views(batch, settings)
        return lambda: train(views)

    def objective_of(dim: int) -> Work:
        alone, embeddings = objective_alone(dim, 8 if settings.quick else 256, settings)
        objective = SymmetricELBO()(alone.model, alone.guide)
        return lambda: objective(embeddings).backward()

    def particles(count: int) -> Work:
        noise = latent_noise(count, dim, seed=0)
        return lambda: likelihood_parts(vje, embeddings, loc, scale.exp(), noise)

    def scoring_of(count: int) -> Work:
        return score_images(vje, random_images(count), 256, settings)

    def against(what: str, variable: str, task: Callable[[int], Work], *xs: int) -> Growth:
        works = [task(x) for x in (xs[:2] if settings.quick else xs)]
        [work() for work in works]  # warm-up
        rounds = [
            [measure(work) for work in works] for _ in range(2 if settings.quick else 3)
        ]  # sizes in turns
        return Growth(
            what, variable, "s", list(zip(xs, map(median, zip(*rounds, strict=True)), strict=False))
        )

    yield against("training step, resnet-small", "batch", step_of, 32, 64, 128, 256, 512)
    yield against("ELBO alone", "D", objective_of, 128, 256, 512, 1024, 2048, 4096)
    yield against(f"likelihood of {images} images", "particles", particles, 1, 4, 16, 64)
    if not settings.quick:
        yield against("scoring, resnet-small", "images", scoring_of, 1_000, 5_000, 10_000, 50_000)


# The kernel's own peak of this address space, where it tells: ru_maxrss starts at the parent's size on Linux.
PEAK = """
import resource, sys, torch
from pathlib import Path
from benchmarks.speed import ImageSet, Settings, new_model, score_images
settings = Settings(False, torch.get_num_threads(), "32-true")
images = torch.zeros(1, 3, 32, 32, dtype=torch.uint8).expand(int(sys.argv[1]), -1, -1, -1)
score_images(new_model("resnet-small", 256, settings)[0], ImageSet(images, [""] * len(images)), 256, settings)()
status = Path("/proc/self/status")
if torch.cuda.is_available():
    print(torch.cuda.max_memory_allocated() / 2**20)
elif status.exists():
    print(int(status.read_text().split("VmHWM:")[1].split()[0]) / 2**10)
else:
    print(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**(20 if sys.platform == "darwin" else 10))
"""


@benchmark("memory")
def memory(settings: Settings) -> Iterator[Result]:
    """Peak memory of scoring in a fresh process, the images themselves left out (one, expanded)."""
    counts = [256, 512] if settings.quick else [1_000, 5_000, 10_000, 50_000]
    points = [(count, float(run_python(PEAK, settings, str(count)))) for count in counts]
    yield Growth("peak memory of scoring, resnet-small, batch 256", "images", "MiB", points)


HELP = "from pyro_vje.cli import main; main(['--help'])"
FIRST_STEP = """
import os, sys
from pyro_vje import TrainConfig, training
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
    done = subprocess.run(command, env=environment, capture_output=True, text=True)
    if done.returncode:
        raise RuntimeError(f"the benchmark's process failed: {done.stderr.strip()[-2000:]}")
    return done.stdout
