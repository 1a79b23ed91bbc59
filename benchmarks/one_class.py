"""``python -m benchmarks.one_class --ckpt RUN``: every score of a one-class run beside k-NN on the same encoder.

The rivals are the distance to the k-th nearest neighbour (scikit-learn, cosine) among the normal training images,
on the trained encoder's features, on the same encoder untrained, and on raw pixels. One forward pass an image each.
"""

from __future__ import annotations

import argparse
import shlex
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from numpy.typing import NDArray
from sklearn.neighbors import NearestNeighbors
from torch import Tensor

from benchmarks.__main__ import describe
from benchmarks.harness import Settings
from pyro_vje import metrics
from pyro_vje.encoding import encode
from pyro_vje.evaluation import load_split, pixels
from pyro_vje.files import write_json
from pyro_vje.runs import build_model, load_run
from pyro_vje.scoring import SCORES, anomaly_labels, latent_noise, likelihood_parts

PARTICLES, SEED = 16, 0
NEIGHBOURS = (1, 50)


def neighbour_distance(train: Tensor, test: Tensor, k: int) -> NDArray[Any]:
    """Cosine distance ``(N,)`` of each test feature to its k-th nearest training feature."""
    neighbours = NearestNeighbors(n_neighbors=k, metric="cosine").fit(train.numpy())
    return neighbours.kneighbors(test.numpy())[0][:, -1]


def main(arguments: Sequence[str] | None = None) -> None:
    """Print the table and write the JSON."""
    arguments = sys.argv[1:] if arguments is None else list(arguments)
    parser = argparse.ArgumentParser(prog="python -m benchmarks.one_class", description=__doc__)
    parser.add_argument("--ckpt", type=Path, required=True, help="a run trained with --normal-class")
    parser.add_argument("--out", type=Path, default=Path("benchmarks/results/one_class.json"))
    options = parser.parse_args(arguments)
    run = load_run(options.ckpt)
    if run.info.config.normal_class is None:
        parser.error(f"{options.ckpt} was not trained on one class (train --normal-class K)")
    view = run.info.view
    test = load_split(run, "test", None, None)
    normal = load_split(run, "train", None, None).of_class(run.info.config.normal_class)
    is_anomaly = anomaly_labels(test, run.info.config.normal_class)
    if is_anomaly is None:
        parser.error("the test images have no labels")

    encoded = encode(run.vje, test, view)
    noise = latent_noise(PARTICLES, run.vje.embedding_dim, SEED)
    parts = likelihood_parts(run.vje, encoded.embeddings, encoded.loc, encoded.scale, noise)
    rows = {f"{name} (likelihood)": score(parts) for name, score in SCORES.items()}
    untrained = build_model(run.info.config, run.info.image_size).eval()
    features = {
        "trained encoder": (encode(run.vje, normal, view).features, encoded.features),
        "untrained encoder": (
            encode(untrained, normal, view).features,
            encode(untrained, test, view).features,
        ),
        "raw pixels": (pixels(normal, view)[1], pixels(test, view)[1]),
    }
    for name, (train_features, test_features) in features.items():
        for k in NEIGHBOURS:
            rows[f"k-NN {k}, {name}"] = neighbour_distance(train_features, test_features, k)

    known = is_anomaly[encoded.indices]
    results = {}
    for name, scores in rows.items():
        low, high = metrics.auroc_interval(scores, known, seed=SEED)
        results[name] = {"auroc": metrics.auroc(scores, known), "interval_95": [low, high]}
        print(f"{name:<28}{results[name]['auroc']:.4f}   [{low:.4f}, {high:.4f}]")
    command = shlex.join(["python", "-m", "benchmarks.one_class", *arguments])
    about = describe(command, Settings(quick=False, threads=1, precision="32-true"))
    options.out.parent.mkdir(parents=True, exist_ok=True)
    write_json(
        options.out,
        {
            **about,
            "run": run.info.to_dict(),
            "normal_images": int((~known).sum()),
            "anomalies": int(known.sum()),
            "particles": PARTICLES,
            "rows": results,
        },
    )


if __name__ == "__main__":
    main()
