"""``python -m benchmarks.score_parts RUN...``: which term of the likelihood decides the score `conditional`.

A polar log-density has three terms: direction, radius, and the volume element -(D - 1) log ‖t‖. Of each, as a score by
itself: AUROC, and its standard deviation over normal images in nats, which says how much it weighs in the sum.
"""

from __future__ import annotations

import argparse
import shlex
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch

from benchmarks.__main__ import describe
from benchmarks.harness import Settings
from pyro_vje.anomaly.parts import Scorer
from pyro_vje.data import ImageSet, load_dataset
from pyro_vje.metrics import auroc
from pyro_vje.model.encoding import encode
from pyro_vje.runs.files import write_json
from pyro_vje.runs.folder import LoadedRun, load_run, load_split


def main(arguments: Sequence[str] | None = None) -> None:
    """Measure the runs that the command line names."""
    arguments = sys.argv[1:] if arguments is None else list(arguments)
    parser = argparse.ArgumentParser(prog="python -m benchmarks.score_parts", description=__doc__)
    parser.add_argument("runs", type=Path, nargs="+", help="run folders")
    parser.add_argument("--outside", help="folder of anomalies (of a one-class run: the other classes)")
    parser.add_argument("--data", required=True, help="what the normal images are, in words")
    parser.add_argument("--out", type=Path, required=True)
    options = parser.parse_args(arguments)
    command = shlex.join(["python", "-m", "benchmarks.score_parts", *arguments])
    about = describe(command, Settings(False, torch.get_num_threads(), "32-true"))
    rows = [row(load_run(path, trust_plugins=True), options.outside) for path in options.runs]
    write_json(options.out, {**about, "rows": rows, "data": options.data})


def row(run: LoadedRun, outside: str | None) -> dict[str, Any]:
    """The terms of one run, normal test images against the anomalies."""
    config = run.info.config
    test = load_split(run, "test", None, None).labelled()
    if config.normal_class is not None:
        is_anomaly = test.labels_at(torch.arange(len(test))) != test.class_index(config.normal_class)
        found = terms(run, test)
    else:
        others = load_dataset("folder", outside, "all", image_size=run.info.image_size)
        is_anomaly = torch.arange(len(test) + len(others)) >= len(test)
        inside, far = terms(run, test), terms(run, others)
        found = {name: np.concatenate([inside[name], far[name]]) for name in inside}
    truth = is_anomaly.numpy()
    parts = {
        name: {"auroc": auroc(values, truth), "std_of_normal": float(values[~truth].std())}
        for name, values in found.items()
    }
    return {"config": config.to_dict(), "train_images": run.info.train_images, "terms": parts}


def terms(run: LoadedRun, images: ImageSet) -> dict[str, np.ndarray]:
    """What is summed up to `conditional`, in nats, higher for stranger images ``(N,)``."""
    parts = Scorer(run.vje).parts(encode(run.vje, images, run.info.view))
    both = parts.log_direction + parts.log_radius
    found = {
        "conditional": -parts.log_likelihood,
        "direction": -parts.log_direction,
        "radius": -parts.log_radius,
        "volume element": both - parts.log_likelihood,
        "direction + radius": -both,
    }
    return {name: values.numpy() for name, values in found.items()}


if __name__ == "__main__":
    main()
