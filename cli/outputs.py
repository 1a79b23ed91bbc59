"""Commands that make something of a finished run: its features, an evaluation, a file for deployment."""

import logging
from pathlib import Path
from typing import Any

import click

from pyro_vje.cli import options

log = logging.getLogger("pyro_vje")

FORMATS = "onnx, for ONNX Runtime (needs pip install 'pyro-vje[export]'); torch, for torch.export.load."
KINDS = click.Choice(["onnx", "torch"])


@options.command("embed")
@options.ckpt
@options.scoring("data", required=True, help="A folder of images.")
@options.scoring("out", required=True, metavar="FILE.npz", help="The file to write.")
@options.scoring("batch_size", "trust_plugins")
def embed(ckpt: Path, data: Path, out: Path, **settings: Any) -> None:
    """Features, embeddings and posterior loc and scale of each image, as a NumPy .npz."""
    from pyro_vje import embed
    from pyro_vje.data import counted

    path, written, failed = embed(ckpt, data, out, **settings)
    click.echo(f"{counted(written)} embedded: {path}")
    log.info("to read it: numpy.load(%r), with the arrays features, embeddings, loc, scale and paths", str(path))
    if failed:
        click.echo(f"{counted(failed)} could not be read and left out", err=True)
        raise SystemExit(1)


@options.command("eval")
@options.ckpt
@options.scoring("dataset", help="Another data set than the run's own.")
@options.scoring("data_dir", "download")
@options.evaluation()
@options.scoring("batch_size")
@options.scoring("out", help="The JSON. [default: eval.json in the run folder]")
@options.scoring("trust_plugins")
def eval(ckpt: Path, **settings: Any) -> None:
    """Probes of the representation: the trained encoder, the same untrained, and raw pixels.

    Weighted k-NN and linear probe: logistic regression on clean features, or SGD on augmented images with steps of
    --batch-size. Of the encoders also effective rank, alignment, uniformity, and whether the posterior's variance says
    where retrieval fails (R-AUROC, accuracy against rejected share, a picture of it).
    """
    from pyro_vje import evaluate
    from pyro_vje.representation import format_table

    result = evaluate(ckpt, **settings)
    click.echo(format_table(result))
    trained, untrained, *_ = result["rows"]
    found = f"k-NN {trained['knn']:.3f}, and {untrained['knn']:.3f} of the {untrained['representation']}"
    gain, noise = trained["knn"] - untrained["knn"], 2 * (0.5 / result["test_images"]) ** 0.5
    said = "helped" if gain > noise else "not helped yet (more --epochs may)" if gain <= 0 else "not clearly helped"
    log.info(f"training has {said}: {found}, of {result['test_images']} test images")


@options.command("export")
@options.ckpt
@click.option("--format", type=KINDS, default="onnx", show_default=True, help=FORMATS)
@options.scoring("out", help="The file. [default: model.onnx or model.pt2 in the run folder]")
@options.scoring("score", "score_likelihood", "num_particles", "seed", "trust_plugins")
def export(ckpt: Path, **settings: Any) -> None:
    """Write a model as one file that runs without this package, with a model card beside it.

    It maps uint8 RGB images (N, 3, S, S) to embedding, posterior loc and scale, the score that `score` writes, and
    its p-value.
    """
    from pyro_vje import export

    result = export(ckpt, **settings)
    differences = ", ".join(f"{name} {value:.1e}" for name, value in result.differences.items())
    click.echo(f"{result.path}\nlargest differences from the model, on random images: {differences}")
    click.echo(f"model card: {result.card}")
