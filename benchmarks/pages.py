"""``python -m benchmarks.pages``: the tables of the pages from the results' JSON, no number typed by hand.

A page says what it wants between two comments, in the words of a function here, of results and of options to it::

    <!-- settings study rows=likelihood columns=kl_weight measures=knn where="df == 5" -->
    <!-- end -->
"""

from __future__ import annotations

import json
import re
import shlex
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pandas as pd
from scipy.stats import betabinom, binomtest

from pyro_vje.experiments.cells import NOT_USED, markdown, spread, text
from pyro_vje.experiments.protocols import compare_scores

FOLDER = Path(__file__).parent
PAGES = (*sorted(FOLDER.glob("*.md")), FOLDER.parent / "README.md")
MARK = re.compile(r"(<!-- (\w+) ([^\n]+?) -->\n).*?(?=<!-- end -->)", re.DOTALL)
METHODS = {"elbo": "VJE", "benchmarks.controls:simsiam": "SimSiam", "benchmarks.controls:vi_simsiam": "VI-SimSiam"}
"""Names of the objectives in tables and pictures, in their order."""
LIKELIHOODS = {"elbo": "polar-student-t", "benchmarks.controls:vi_simsiam": "power-spherical"}
"""What the objectives that have a likelihood were trained with."""
NAMES = {**METHODS, "controls_small": "the control", "simsiam_check": "lightly's heads, loss and settings"}
NAMES |= {"score_parts_ood": "against MNIST", "score_parts_one_class": "one class of ten"}
NAMES |= {"one_class": "CIFAR-10, one class", "one_class_digits": "digits, one class"}
NAMES |= {"one_class_digits_linear": "behind a linear map", "one_class_digits_mlp": "behind an MLP"}
NAMES |= {"ood": "CIFAR-10 against MNIST", "ood_cifar100": "against CIFAR-100"}
NAMES |= {"pretrained_screw": "screws", "pretrained_tile": "tiles", "pretrained_steel": "steel"}
NAMES |= {"pretrained_cifar10": "CIFAR-10, frozen network"}
MEASURES = {
    "knn": ("k-NN", ".3f"),
    "linear": ("linear", ".3f"),
    "auroc": ("AUROC", ".3f"),
    "effective_rank": ("effective rank", ".0f"),
    "posterior_snr": ("‖loc‖ / noise", ".2f"),
    "seconds": ("seconds", ".0f"),
}
HEADINGS = {"kl_weight": "KL", "file": "result", "feature_views": "views", "embedding_dim": "directions"}
BEFORE = {"rotations": 0.0, "holdout": 0.0, "projector": "mlp", "radius_scale": "shared", "fit": "crop"}
"""What results say that are older than these settings."""
Cell = dict[str, Any]
TABLES: dict[str, Callable[..., str]] = {}


def table(function: Callable[..., str]) -> Callable[..., str]:
    """Enter a function of results' names and options in what pages may ask for, under its name."""
    TABLES[function.__name__] = function
    return function


def result(name: str) -> Any:
    """What a command wrote."""
    return json.loads((FOLDER / "results" / f"{name}.json").read_text())


def score_rows(name: str) -> list[dict[str, Any]]:
    """A row for each score of each cell; in results of the first versions normal class and seed are the cell's."""
    return [
        {"normal": cell.get("normal"), "seed": cell.get("seed"), **row}
        for cell in result(name)["cells"]
        for row in cell["scores"]
    ]


def value(found: Any) -> str:
    """A setting as written in the tables."""
    if found in ("inf", float("inf")):
        return "∞ (Gaussian)"
    return text(None) if pd.isna(found) else NAMES.get(found) or text(found)


@table
def settings(
    *names: str, rows: str, columns: str = "", measures: str = "knn,linear", where: str = "", by: str = ""
) -> str:
    """Measures of cells, mean ± standard deviation over what differs otherwise: seeds.

    ``rows`` and ``columns`` are settings, or ``file``; ``where`` a condition on them in pandas' words; ``by`` the
    heading of the rows.
    """
    cells = [
        {**BEFORE, **cell["config"], **cell["measures"], "status": cell["status"], "file": name}
        for name in names
        for cell in result(name)["cells"]
    ]
    order = list(METHODS)
    cells.sort(key=lambda cell: order.index(cell["objective"]) if cell.get("objective") in order else -1)
    frame = pd.DataFrame(cells)
    frame = frame.query(where) if where else frame
    down, across = rows.split(","), columns.split(",") if columns else []
    chosen = [name for name in measures.split(",") if name in frame]

    def entry(members: pd.DataFrame, measure: str) -> str:
        lost = members[members["status"] != "finished"]
        if len(lost):
            return f"{len(lost)} of {len(members)} {lost['status'].iloc[0]}"
        return spread(members[measure].astype(float), MEASURES[measure][1]) if len(members) else ""

    def groups(part: pd.DataFrame, keys: list[str]) -> dict[tuple[Any, ...], pd.DataFrame]:
        return dict(iter(part.groupby(keys, sort=False, dropna=False))) if keys else {(): part}

    lines = []
    for key, members in groups(frame, down).items():
        found = groups(members, across)
        line = {by or name: value(part) for name, part in zip(down, key, strict=True)}
        for measure in chosen:
            for over in groups(frame, across):
                titles = [f"{HEADINGS.get(name, name)} {value(part)}" for name, part in zip(across, over, strict=True)]
                cells_of = found.get(over, members[:0])
                line[", ".join([MEASURES[measure][0], *titles])] = entry(cells_of, measure)
        lines.append(line)
    return markdown(pd.DataFrame(lines))


@table
def scores(name: str, where: str = "", classes: str = "yes") -> str:
    """AUROC of each anomaly score, for each class, or the mean over classes alone."""
    rows = pd.DataFrame(score_rows(name))
    rows = rows.query(where) if where else rows
    found = compare_scores(rows.to_dict("records"))
    return markdown(found if classes == "yes" else found[["score", "on", "mean", "95 %"]])


@table
def lengths(*names: str, where: str) -> str:
    """AUROC of scores by epochs, of the classes that were trained for each number of them, and their mean."""
    cells = [cell for name in names for cell in result(name)["cells"]]
    rows = pd.DataFrame([{**row, "epochs": cell["config"]["epochs"]} for cell in cells for row in cell["scores"]])
    found = rows.query(where).pivot_table("auroc", ["score", "on", "epochs"], "normal").dropna(axis=1)
    return markdown(found.assign(mean=found.mean(axis=1)).map("{:.3f}".format).reset_index().astype(str))


@table
def overview(*names: str, where: str = "") -> str:
    """Mean AUROC of each score in several protocols, and the mean of these, the best in bold."""
    found = {}
    for name in names:
        rows = pd.DataFrame(score_rows(name))
        rows["on"] = rows["on"].str.replace("likelihood .*", "its likelihood", regex=True)
        found[value(name)] = rows.groupby(["score", "on"], sort=False)["auroc"].mean()
    frame = pd.DataFrame(found).dropna()
    frame["mean"] = frame.mean(axis=1)
    frame = frame.query(where) if where else frame
    order = frame.sort_values("mean", ascending=False)
    best = order.eq(order.max())
    shown = order.map("{:.3f}".format).where(~best, order.map("**{:.3f}**".format))
    return markdown(shown.reset_index())


@table
def methods(*names: str, where: str = "") -> str:
    """AUROC of scores in one protocol, the mean over classes and seeds, a column for each objective's result."""
    found = {}
    for name in names:
        summary = result(name)
        config = summary["cells"][0].get("config") or summary["settings"]["config"]
        rows = pd.DataFrame(score_rows(name))
        its = f"likelihood {LIKELIHOODS.get(config['objective'])}"
        rows["on"] = rows["on"].replace(its, "its likelihood")
        rows = rows[~rows["on"].str.startswith("likelihood")]
        rows = rows.query(where) if where else rows
        found[METHODS[config["objective"]]] = rows.groupby(["score", "on"], sort=False)["auroc"].mean()
    frame = pd.DataFrame(found).loc[list(dict.fromkeys(key for means in found.values() for key in means.index))]
    shown = frame.map("{:.3f}".format).where(frame.notna(), NOT_USED)
    return markdown(shown.reset_index())


@table
def about(name: str) -> str:
    """How a result was made."""
    found = result(name)
    machine = found["hardware"]["gpu"] or f"{found['hardware']['cpu']}, {found['threads']} threads"
    said = [machine, found["precision"], f"torch {found['versions']['torch']}", found["date"][:10]]
    seconds = [cell.get("seconds") or cell["measures"].get("seconds") for cell in found.get("cells", []) if cell]
    if "data" in found:
        minutes = pd.Series(seconds, dtype=float).mean() / 60
        said.insert(0, f"{found['data']}, {minutes:.0f} minutes a cell" if seconds else found["data"])
    return f"{', '.join(said)}, commit {found['commit']}: `{found['command']}`"


@table
def features(name: str) -> str:
    """k-NN and linear accuracy of trained encoder, untrained encoder, pixels."""
    rows = [
        {"representation": row["representation"], "k-NN": f"{row['knn']:.3f}", "linear": f"{row['linear']:.3f}"}
        for row in result(name)["rows"]
    ]
    return markdown(pd.DataFrame(rows))


@table
def terms(*names: str) -> str:
    """Of each term of a likelihood: its spread over normal images and its AUROC, means over runs."""
    lines: dict[str, dict[str, str]] = {}
    runs = pd.DataFrame([{**row, "of": value(name)} for name in names for row in result(name)["rows"]])
    for (of, images), part in runs.groupby(["of", "train_images"], sort=False):
        for term, measured in pd.DataFrame(part["terms"].tolist()).items():
            numbers = pd.DataFrame(measured.tolist()).mean()
            line = lines.setdefault(str(term), {"term": str(term)})
            line[f"std, {of}, {images:,} images"] = f"{numbers['std_of_normal']:.0f}"
            line[f"AUROC, {of}, {images:,} images"] = f"{numbers['auroc']:.3f}"
    return markdown(pd.DataFrame(lines.values()))


@table
def doubts(name: str) -> str:
    """What measures of doubt know of failing retrieval, and of crops and blur; of a trained and an untrained model."""
    headings = {
        "r_auroc": "R-AUROC",
        "crop_correlation": "crops, rank correlation",
        "crop_above": "a tenth above whole",
    }
    headings |= {"blur_correlation": "blur, rank correlation", "blur_above": "blurred above sharp"}
    rows = pd.DataFrame(result(name)["rows"])
    means = rows.groupby(["of", "doubt"], sort=False)[list(headings)].mean()
    shown = means.map("{:.3f}".format).where(means.notna(), NOT_USED)
    return markdown(shown.rename(columns=headings).reset_index())


@table
def published(kind: str) -> str:
    """What others have published, none of it measured here."""
    rows = pd.DataFrame(json.loads((FOLDER / "published.json").read_text())[kind])
    accuracies = rows.select_dtypes("float").map(lambda x: "" if pd.isna(x) else f"{x:.3f}")
    rows = rows.assign(**accuracies).fillna("").astype(str)
    return markdown(rows.rename(columns={"knn": "k-NN", "mean_auroc": "mean AUROC", "r_auroc": "R-AUROC"}))


@table
def places(*names: str, thinned: str = "no") -> str:
    """Methods at places, a row each: AUROC of images and pixels, seconds, memory; of all references, or thinned."""
    columns = {
        "auroc_largest": ("image AUROC, largest value", "{:.3f}"),
        "auroc_tail": ("upper 3 %", "{:.3f}"),
        "auroc_own_rule": ("PatchCore's rule", "{:.3f}"),
        "pixel_auroc": ("pixel AUROC", "{:.3f}"),
        "aupro_30": ("AUPRO 30 %", "{:.3f}"),
        "pixel_average_precision": ("average precision", "{:.3f}"),
        "fit_seconds": ("fit, s", "{:.1f}"),
        "seconds_an_image": ("ms an image", "{:.1f}"),
        "kept_mb": ("kept, MB", "{:.0f}"),
    }
    rows = pd.DataFrame([row for name in names for row in result(name)["rows"]])
    rows = rows[rows["method"].str.contains("random|coreset") == (thinned == "yes")].assign(
        seconds_an_image=rows["seconds_an_image"] * 1e3
    )
    shown = rows[["set", "method"]].copy()
    for column, (title, form) in columns.items():
        if column in rows and rows[column].notna().any():
            shown[title] = [NOT_USED if pd.isna(x) else form.format(x) for x in rows[column]]
    return markdown(shown)


@table
def rates(*names: str) -> str:
    """Images a second with maps, against the bare pass of the encoder."""
    lines = []
    for name in names:
        found = result(name)
        row = found["speed"]
        lines.append({
            "encoder": f"`{found['encoder']}`, {found['image_size']} pixels",
            "places an image": str(row["places_an_image"]),
            "references": f"{row['reference_places']:,}",
            "images a second": f"{row['images_a_second']:.1f}",
            "bare pass": f"{row['images_a_second_bare']:.1f}",
            "time, times the bare pass": "{ratio:.2f} [{ratio_min:.2f}, {ratio_max:.2f}]".format(**row),
        })  # fmt: skip
    return markdown(pd.DataFrame(lines))


@table
def ratios(name: str) -> str:
    """Rows against rivals."""
    lines = [
        {
            "what": row["what"],
            "rival": row["rival"],
            "ratio of times [min, max]": row["note"]
            or f"{row['ratio']:.3f} [{row['ratio_min']:.3f}, {row['ratio_max']:.3f}]",
            "wanted": "" if row["wanted"] is None else f"≤ {row['wanted']:.3g}",
        }
        for row in result(name)["rows"]
    ]
    return markdown(pd.DataFrame(lines))


@table
def frozen(*names: str, by: str, measures: str = "aggregate,Mahalanobis,k-NN 1,KDE") -> str:
    """What `benchmarks.frozen` found by settings: AUROC, means over classes; false alarms, with their 95 % interval.

    Beside these the share that exact p-values would have in 95 of 100 such experiments, in which the images to compare
    with are as random as those that are judged: Beta-binomial numbers of alarms, here by their mean and variance.
    """
    keys, lines = by.split(","), []
    found = pd.DataFrame([row for name in names for row in result(name)["rows"]])
    for key, part in found.groupby(keys, sort=False):
        line = {HEADINGS.get(name, name): value(of) for name, of in zip(keys, key, strict=True)}
        for name in measures.split(","):
            least, most = part[name].min(), part[name].max()
            counted = str(least) if least == most else f"{least} to {most}"
            line[name] = counted if name == "directions" else f"{part[name].mean():.3f}"
        if "alarms" in part and part["alarms"].notna().all():
            alarms, normal = int(part["alarms"].sum()), int(part["normal"].sum())
            low, high = binomtest(alarms, normal).proportion_ci()
            line["false alarms at 0.05"] = f"{alarms} of {normal}: {alarms / normal:.3f} ({low:.3f} to {high:.3f})"
            rank = (0.05 * (part["images"] + 1)).astype(int)
            exact = betabinom(part["normal"], rank, part["images"] + 1 - rank)
            mean, spread_of = exact.mean().sum(), 1.96 * exact.var().sum() ** 0.5
            low, high = max(0.0, mean - spread_of), mean + spread_of
            line["exact p-values"] = f"{low / normal:.3f} to {high / normal:.3f}"
        lines.append(line)
    return markdown(pd.DataFrame(lines).fillna(""))


@table
def growth(name: str) -> str:
    """How costs grow."""
    lines = []
    for row in result(name)["growth"]:
        (x, low), (y, high) = row["points"][0], row["points"][-1]
        if row["unit"] == "s":
            cost, points = "time", f"{high / low:.1f}-fold from {x:,} to {y:,}"
        else:
            cost, points = f"peak memory, {row['unit']}", f"{low:,.0f} at {x:,}, {high:,.0f} at {y:,}"
        law = f"{row['variable']}^{row['slope']:.2f}"
        lines.append({"cost": cost, "of": row["what"], "grows as": law, "from, to": points})
    return markdown(pd.DataFrame(lines))


@table
def soak(name: str) -> str:
    """How often commands were killed and gone on with, and how many damaged files were read."""
    found = result(name)
    kills = {name: part["kills"] for name, part in found["kills"].items() if isinstance(part, dict)}
    fuzz = found["fuzz"]
    failed = sum(part["failed"] for part in fuzz["files"].values())
    counts = ", ".join(f"`{name}` {count} times" for name, count in kills.items())
    about = f"`make soak` ({found['date'][:10]}, {found['cores']} cores): killed {counts}, "
    about += "each ended with the files of a run left alone; "
    read = f"{fuzz['count']:,} damaged images, configurations, checkpoints and tables read"
    return f"{about}{read}, {failed} failures."


def render(page: Path) -> str:
    """The page with its tables between their marks; what has no result yet shows nothing."""

    def fill(mark: re.Match[str]) -> str:
        if mark[2] not in TABLES:
            return mark[0]
        words = shlex.split(mark[3])
        options = dict(word.split("=", 1) for word in words if re.match(r"\w+=[^=]", word))
        names = [word for word in words if word.partition("=")[0] not in options]
        try:
            return f"{mark[1]}{TABLES[mark[2]](*names, **options)}\n"
        except FileNotFoundError:
            return f"{mark[1]}"

    return MARK.sub(fill, page.read_text())


def main() -> None:
    """Bring all pages up to date."""
    for page in PAGES:
        page.write_text(render(page))


if __name__ == "__main__":
    main()
