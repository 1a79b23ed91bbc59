"""Published protocols of anomaly detection: one class against the others, and one data set against others.

All scores stand beside cheap detectors on features and pixels, with the same normal images, the run's reference.
Inspection images are a case of the first: normal in ``train/good`` and ``test/good``, others elsewhere in ``test/``.
"""

import dataclasses
import os
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import pandas as pd
import torch
from sklearn.svm import OneClassSVM
from torch import Tensor
from torch.nn.functional import normalize

from pyro_vje import metrics
from pyro_vje.anomaly.detectors import Fitted, kernel_density, mahalanobis, nearest_neighbour
from pyro_vje.anomaly.parts import Scorer
from pyro_vje.anomaly.scores import SCORES
from pyro_vje.config import TrainConfig
from pyro_vje.data import ImageSet, load_dataset
from pyro_vje.data.splits import reference_images
from pyro_vje.experiments.cells import Cell, Cells, Comparison, Table
from pyro_vje.model.build import build_model
from pyro_vje.model.encoding import Encoded, encode, encode_features
from pyro_vje.representation.evaluation import pixels
from pyro_vje.runs import folder as runs

NOTE = "AUROC, anomalies positive, best in bold: mean ± standard deviation over seeds; 95 %: of the mean, over images"
Names = Sequence[str]
Seeds = Sequence[int]
Sources = Mapping[str, tuple[str, str | None]]
Scores = dict[tuple[str, str], Tensor]  # (N,) by (score, what it looks at)


def one_class_svm(normal: Tensor) -> Fitted:
    """Negative decision function of a one-class SVM, RBF kernel, ν 0.1, on normalised vectors."""
    fitted = OneClassSVM(nu=0.1, gamma="scale").fit(normalize(normal).cpu().numpy())
    return lambda vectors: torch.from_numpy(-fitted.decision_function(normalize(vectors).cpu().numpy()))


def feature_norm(normal: Tensor) -> Fitted:
    """Negative norm of the vectors: what an encoder has not seen excites it less."""
    return lambda vectors: -torch.linalg.vector_norm(vectors.double(), dim=-1)


KNN: dict[str, Callable[[Tensor], Fitted]] = {f"k-NN {k}": partial(nearest_neighbour, k=k) for k in (1, 50)}
DETECTORS = KNN | {"Mahalanobis": mahalanobis, "KDE": kernel_density, "one-class SVM": one_class_svm}
DETECTORS |= {"feature norm": feature_norm}
"""What a likelihood has to beat: cheap detectors on features, as in `pyro_vje.anomaly.detectors`."""


def all_scores(
    run: runs.LoadedRun,
    sets: Sequence[ImageSet],
    *,
    likelihoods: Names = (),
    known: dict[tuple[int, str], Encoded] | None = None,
) -> list[Scores]:
    """Every score, by the trained and the named likelihoods, and every detector, fitted on the run's reference.

    ``known`` keeps what a frozen encoder made of the sets, for the next run with it; controls without any training are
    measured where weights are not pretrained.
    """
    view, config = run.info.view, run.info.config
    known = {} if known is None else known
    look_at = partial(encode, view=view)

    def look(images: ImageSet) -> Encoded:
        key = config.seed, images.fingerprint()
        if key not in known:
            known[key] = look_at(run.vje, images, turns=True)
        seen = known[key] if config.frozen else known.pop(key)
        return encode_features(run.vje, seen.features) if config.frozen else seen

    normal_images = reference_images(
        runs.training_images(run, "detectors are fitted on the training images")[0], config.seed
    )
    encoded = [look_at(run.vje, normal_images), *map(look, sets)]
    features = {"trained features": [images.features for images in encoded]}
    if config.weights == "none":
        untrained = build_model(config, run.info.view_size).to(run.vje.device).eval()
        every = [normal_images, *sets]
        features["untrained features"] = [look_at(untrained, x).features for x in every]
        features["raw pixels"] = [pixels(images, view)[1] for images in every]
    found: list[Scores] = [{} for _ in sets]
    reference = runs.load_posteriors(run, runs.REFERENCE)
    for family in (config.likelihood, *likelihoods):
        scorer = Scorer(run.vje, reference=reference, likelihood=family, kl_weight=config.kl_weight)
        for scores, images in zip(found, encoded[1:], strict=True):
            parts = [scorer.parts(part) for part in images.split(256)]
            for name, score in SCORES.items():
                if score.of == "rotations" and not run.vje.rotations:
                    continue
                values = torch.cat([score(part) for part in parts]).cpu()
                if values.isfinite().all():  # not every family splits direction and radius
                    on = f"likelihood {family}" if score.of == "likelihood" else score.of
                    scores.setdefault((name, on), values)
    for on, (normal, *tests) in features.items():
        for name, detector in (DETECTORS if on == "trained features" else KNN).items():
            fitted = detector(normal)
            for scores, test in zip(found, tests, strict=True):
                scores[name, on] = torch.cat([fitted(part) for part in test.split(256)])
    return found


def one_class(
    base: TrainConfig, out: str | Path, *, classes: Names = (), seeds: Seeds = (0,), likelihoods: Names = ()
) -> Comparison:
    """Train on one class's training images, score all test images; every class, by default, and every seed.

    ``likelihoods`` are families to score with beside the trained one; cells done in ``out`` stay. ``ValueError`` if
    the data have no labels or no such class, or seeds are none; ``FileExistsError`` if ``out`` holds something else.
    """
    if not seeds:
        raise ValueError("seeds must name at least one, not none")
    how: dict[str, Any] = {"image_size": base.image_size, "download": base.download, "residency": "stream"}
    train, test = (load_dataset(base.dataset, base.data_dir, x, **how).labelled() for x in ("train", "test"))
    present = train.labels_at(torch.arange(len(train))).unique().tolist()
    names = [train.class_name(name) for name in classes or present]
    for name in names:
        train.of_class(name)
        test.class_index(name)
    known: dict[tuple[int, str], Encoded] = {}
    configs = {
        f"{name.replace(os.sep, '-')}_seed-{seed}": dataclasses.replace(base, normal_class=name, seed=seed)
        for seed in seeds
        for name in names
    }

    def measure(config: TrainConfig, folder: Path) -> dict[str, Any]:
        run = runs.load_run(folder, trust_plugins=True, device=runs.default_device())
        images = runs.load_split(run, "test", download=config.download).labelled()
        normal = images.class_index(config.normal_class or "")
        is_anomaly = images.labels_at(torch.arange(len(images))) != normal
        (found,) = all_scores(run, [images], likelihoods=likelihoods, known=known)
        return {"scores": _judge(found, is_anomaly, normal=config.normal_class, seed=config.seed)}

    settings = {"protocol": "one-class", **base.resolved().to_dict()}
    return Cells(Path(out), "table", settings, ("normal_class", "seed")).run(configs, measure, _tabulate)


def ood(
    ckpt: str | Path, outside: Sources, out: str | Path, *, likelihoods: Names = (), trust_plugins: bool = False
) -> Comparison:
    """Score a run's own test images against those of other data sets: (data set, data_dir) by name in the table.

    Of each the test split is taken, of a folder of images all; ``likelihoods`` are as in `one_class`. ``ValueError`` or
    ``FileNotFoundError`` if the run or the data are unusable, ``FileExistsError`` if ``out`` holds something else.
    """
    run = runs.load_run(ckpt, trust_plugins=trust_plugins, device=runs.default_device())
    config = dataclasses.replace(run.info.config, image_size=run.info.image_size)
    cells = Cells(Path(out), "table", {"protocol": "ood", "run": str(ckpt), "config": config.to_dict()}, ())
    done = {cell.name for cell in cells.read()}
    todo = {name: place for name, place in outside.items() if name not in done}
    if todo:
        inside = runs.load_split(run, "test", download=config.download)
        its_own = inside.fingerprint()
        sets = [inside if config.normal_class is None else inside.of_class(config.normal_class)]
        for kind, place in todo.values():
            sets.append(runs.load_split(run, "all" if kind == "folder" else "test", kind, place))
            if sets[-1].fingerprint() == its_own:
                raise ValueError(f"{place or kind} are the run's own test images, which nothing tells from themselves")
        own, *theirs = all_scores(run, sets, likelihoods=likelihoods)
        cells.summarise(_tabulate)  # makes the folder
        for name, scores in zip(todo, theirs, strict=True):
            joined = {key: torch.cat([own[key], scores[key]]) for key in own if key in scores}
            both, normal = (len(found["k-NN 1", "raw pixels"]) for found in (joined, own))
            rows = _judge(joined, torch.arange(both) >= normal, normal=f"against {name}", seed=config.seed)
            cells.write(Cell(name, config, "finished", None, scores=rows))
    return cells.summarise(_tabulate)


def _judge(scores: Scores, is_anomaly: Tensor, **cell: Any) -> list[dict[str, Any]]:
    cell |= {"normal_images": int((~is_anomaly).sum()), "anomalies": int(is_anomaly.sum())}
    found = {key: metrics.detection_metrics(values, is_anomaly) for key, values in scores.items()}
    return [{**cell, "score": name, "on": on, **numbers} for (name, on), numbers in found.items()]


def compare_scores(rows: Sequence[Mapping[str, Any]]) -> pd.DataFrame:
    """AUROC of each score: means over seeds by normal class, and of all, the interval as if no cells shared images."""
    frame, key = pd.DataFrame(rows), ["score", "on"]
    frame["squares"] = frame["auroc_95"].map(lambda ends: (ends[1] - ends[0]) ** 2 / 4)
    by = frame.groupby(key, sort=False)
    numbers = frame.pivot_table("auroc", key, "normal").loc[list(by.groups), frame["normal"].unique()]
    numbers["mean"] = numbers.mean(axis=1)
    deviations = frame.groupby([*key, "seed"])["auroc"].mean().groupby(level=key).std()
    entries = numbers.map(lambda value: f"{value:.3f}" if value == value else "")
    entries["mean"] += deviations.map(lambda value: f" ± {value:.3f}" if value == value else "")
    table = entries.mask(numbers == numbers.max(), "**" + entries + "**")
    table["95 %"] = (by["squares"].sum() ** 0.5 / by.size()).map("± {:.3f}".format)
    return table.reset_index()


def _tabulate(cells: list[Cell]) -> Table:
    rows = [row for cell in cells for row in cell.scores]
    frame = pd.DataFrame(rows)
    if rows:
        frame[["auroc_low", "auroc_high"]] = frame.pop("auroc_95").tolist()
    lost = [f"{cell.name}: {cell.status}: {cell.error}" for cell in cells if cell.status != "finished"]
    return frame, compare_scores(rows) if rows else frame, [NOTE, *lost]
