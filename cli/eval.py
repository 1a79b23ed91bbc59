from pathlib import Path
from typing import Any

import click

from pyro_vje.cli import options


@options.command("eval")
@options.ckpt
@options.scoring("dataset", help="Another data set than the run's own.")
@options.scoring("data_dir", "download")
@options.evaluation()
@options.scoring("batch_size")
@options.scoring("out", help="The JSON. [default: eval.json in the run folder]")
@options.scoring("trust_plugins")
def command(ckpt: Path, **settings: Any) -> None:
    """Probes of the representation: the trained encoder, the same untrained, and raw pixels.

    Weighted k-NN and linear probe: logistic regression on clean features, or SGD on augmented images with steps of
    --batch-size. Of the encoders also effective rank, alignment, uniformity, and whether the posterior's variance says
    where retrieval fails (R-AUROC, accuracy against rejected share, a picture of it).
    """
    from pyro_vje import evaluate
    from pyro_vje.representation import format_table

    click.echo(format_table(evaluate(ckpt, **settings)))
