"""``python -m benchmarks.pages``: the tables of the pages from the results' JSON, no number typed by hand."""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Iterable
from pathlib import Path
from statistics import mean, stdev
from typing import Any

from pyro_vje.experiments import tables

FOLDER = Path(__file__).parent
MAIN = ("conditional", "aggregate", "elbo", "k-NN 50", "Mahalanobis", "KDE")
"""Scores of the short table."""
METHODS = {
    "elbo": "VJE",
    "benchmarks.controls:simsiam": "SimSiam",
    "benchmarks.controls:vi_simsiam": "VI-SimSiam",
}
"""Names of the objectives in tables and pictures."""
LIKELIHOODS = {
    "elbo": "likelihood polar-student-t",
    "benchmarks.controls:vi_simsiam": "likelihood power-spherical",
}
"""What the objectives that have one are scored with."""
Cell = dict[str, Any]
Key = Callable[[Cell], str]


def result(name: str) -> Any:
    """What a command wrote."""
    return json.loads((FOLDER / "results" / f"{name}.json").read_text())


def number(value: Any) -> str:
    """A setting as written in the tables."""
    if value == "inf" or (isinstance(value, float) and math.isinf(value)):
        return "∞ (Gaussian)"
    return f"{value:g}" if isinstance(value, int | float) and not isinstance(value, bool) else str(value)


def entry(cells: list[Cell], measure: str) -> str:
    """Mean ± standard deviation over seeds, or what went wrong."""
    values = [cell["measures"][measure] for cell in cells if cell["status"] == "finished"]
    if not cells:
        return ""
    if len(values) < len(cells):
        return f"{len(cells) - len(values)} of {len(cells)} {next(c['status'] for c in cells if not c['measures'])}"
    style = {"posterior_snr": ".2f", "effective_rank": ".0f"}.get(measure, ".3f")
    spread = f" ± {stdev(values):{style}}" if len(values) > 1 else " (one seed)"
    return f"{mean(values):{style}}{spread}"


def pivot(cells: list[Cell], head: str, rows: Key, columns: Key, measures: dict[str, str]) -> str:
    """Markdown: a row for each value of ``rows``, a column for each measure and value of ``columns``."""
    across = list(dict.fromkeys(columns(cell) for cell in cells))
    titles = [f"{title}, {column}" if column else title for title in measures.values() for column in across]
    lines = [f"| {head} | {' | '.join(titles)} |", "|---|" + "---|" * len(titles)]
    for row in dict.fromkeys(rows(cell) for cell in cells):
        chosen = [cell for cell in cells if rows(cell) == row]
        entries = [
            entry([cell for cell in chosen if columns(cell) == column], measure)
            for measure in measures
            for column in across
        ]
        lines.append(f"| {row} | {' | '.join(entries)} |")
    return "\n".join(lines)


def scores(rows: list[dict[str, Any]], *, classes: bool = True) -> str:
    """Markdown: AUROC of each anomaly score, for each class, or the mean over classes alone."""
    table = tables.compare_scores(rows)
    return tables.markdown(table if classes else table[["score", "on", "mean", "95 %"]])


def setting(name: str) -> Key:
    """Reads a setting of a cell."""
    return lambda cell: number(cell["config"][name])


def variant(cell: Cell) -> str:
    """What a cell of the paper's family changes, apart from df and the KL weight."""
    config = cell["config"]
    changes = {
        "unit radius 1": config["unit_radius"] == "1",
        "no radial factor": config["radius"] is None,
        "Student-t in log-radius": config["radius"] == "log-student-t",
        "separate variance": not config["shared_variance"],
    }
    return next((name for name, changed in changes.items() if changed), "as by default")


def study() -> dict[str, str]:
    """The tables of the ablation, by the names that their places have."""
    cells, slow = result("study")["cells"], result("study_slow")["cells"]
    accuracy = {"knn": "k-NN", "linear": "linear"}
    kl: Key = lambda cell: f"KL {number(cell['config']['kl_weight'])}"  # noqa: E731
    own = [cell for cell in cells if cell["config"]["likelihood"] == "polar-student-t"]
    plain = [cell for cell in own if variant(cell) == "as by default"]
    at: Key = lambda cell: f"df {number(cell['config']['df'])}, KL {number(cell['config']['kl_weight'])}"  # noqa: E731
    changed = {at(cell) for cell in own if variant(cell) != "as by default"}
    variants = sorted((cell for cell in own if at(cell) in changed), key=variant)
    five = [
        cell
        for cell in cells
        if cell["config"]["df"] == 5 or cell["config"]["likelihood"] in ("normal", "laplace")
    ]
    five = [cell for cell in five if variant(cell) == "as by default"]
    rows = result("study_controls")["rows"]
    controls = [f"| {row['representation']} | {row['knn']:.3f} | {row['linear']:.3f} |" for row in rows]
    return {
        "controls": "\n".join(["| representation | k-NN | linear |", "|---|---|---|", *controls]),
        "families": pivot(five, "family (df 5)", setting("likelihood"), kl, accuracy),
        "snr": pivot(five, "family (df 5)", setting("likelihood"), kl, {"posterior_snr": "‖loc‖ / noise"}),
        "df": pivot(plain, "df", setting("df"), kl, accuracy),
        "variants": pivot(variants, "variant", variant, at, accuracy),
        "slow": pivot(slow, "family, lr 0.02", setting("likelihood"), kl, accuracy),
    }


def controls() -> dict[str, str]:
    """VJE beside SimSiam and VI-SimSiam of the same networks and budget, and beside what others have published."""
    published = json.loads((FOLDER / "published.json").read_text())["cifar10"]
    others = [
        "| published elsewhere | encoder | epochs | k-NN | linear | source |",
        "|---|---|---|---|---|---|",
    ]
    for row in published:
        accuracies = " | ".join("" if row[name] is None else f"{row[name]:.3f}" for name in ("knn", "linear"))
        others.append(
            f"| {row['method']} | {row['encoder']} | {row['epochs']} | {accuracies} | {row['source']} |"
        )
    own = {
        "published": "\n".join(others),
        "methods-ood": by_method("ood", METHODS),
        "methods-one-class": by_method("one_class", LIKELIHOODS),
        "simsiam-check": simsiam_check(),
    }
    return {
        **methods("controls", ""),
        **methods("controls_small", "-small"),
        **own,
        **made("one_class_vi_simsiam", "methods-one-class"),
    }


def by_method(protocol: str, objectives: Iterable[str]) -> str:
    """AUROC of the main scores, the mean over classes, in a protocol that was run for each objective."""
    auroc: dict[tuple[str, str], dict[str, list[float]]] = {}
    names = {objective: METHODS[objective] for objective in objectives}
    for objective, method in names.items():
        name = f"{protocol}_{objective.partition(':')[2] or objective}"
        for row in tables.rows_of_scores(result(name)["cells"]):
            on = "its likelihood" if row["on"] == LIKELIHOODS.get(objective) else row["on"]
            if row["score"] in MAIN and not on.startswith(("likelihood", "untrained")):
                auroc.setdefault((row["score"], on), {}).setdefault(method, []).append(row["auroc"])
    lines = [f"| score | on | {' | '.join(names.values())} |", "|---|---|" + "---|" * len(names)]
    for key, found in auroc.items():
        means = (f"{mean(found[method]):.3f}" if method in found else "" for method in names.values())
        lines.append(f"| {' | '.join(key)} | {' | '.join(means)} |")
    return "\n".join(lines)


def simsiam_check() -> str:
    """Our SimSiam control beside lightly's SimSiam."""
    control = "benchmarks.controls:simsiam"
    ours = [cell for cell in result("controls_small")["cells"] if cell["config"]["objective"] == control]
    # lightly's runs have no objective of ours
    side: Key = lambda cell: (  # noqa: E731
        "the control" if "objective" in cell["config"] else "lightly's heads, loss and settings"
    )
    accuracy = {"knn": "k-NN", "linear": "linear"}
    return pivot([*ours, *result("simsiam_check")["cells"]], "SimSiam", side, lambda cell: "", accuracy)


def methods(name: str, suffix: str) -> dict[str, str]:
    """A comparison of objectives, and how it was made."""
    found = result(name)
    cells = [cell for name in METHODS for cell in found["cells"] if cell["config"]["objective"] == name]
    method: Key = lambda cell: METHODS[cell["config"]["objective"]]  # noqa: E731
    measures = {"knn": "k-NN", "linear": "linear", "effective_rank": "effective rank of 256 features"}
    config, seconds = cells[0]["config"], mean(c["measures"]["seconds"] for c in cells if c["measures"])
    about = (
        f"{found['data']}, {config['encoder']}, {config['epochs']} epochs, "
        f"{seconds / 60:.0f} minutes a run; {machine(found)}: `{found['command']}`"
    )
    table = pivot(cells, "objective", method, lambda cell: "", measures)
    return {f"methods{suffix}": table, f"methods{suffix}-about": about}


def machine(found: dict[str, Any]) -> str:
    """What a result was measured with and when."""
    name = found["hardware"]["gpu"] or f"{found['hardware']['cpu']}, {found['threads']} threads"
    how = f"{name}, {found['precision']}, torch {found['versions']['torch']}"
    return f"{how}, {found['date'][:10]}, commit {found['commit']}"


def anomalies() -> dict[str, str]:
    """AUROC of every score, one class against the others and against another data set; and the main ones."""
    files = {"one-class": "one_class_elbo", "ood": "ood"}
    rows = {name: tables.rows_of_scores(result(file)["cells"]) for name, file in files.items()}
    main = [
        row for row in rows["one-class"] if row["score"] in MAIN and not row["on"].startswith("untrained")
    ]
    return {
        **{name: scores(table) for name, table in rows.items()},
        "main": scores(main, classes=False),
        "score-parts": score_parts(),
        **made("one_class_elbo", "one-class"),
    }


def score_parts() -> str:
    """Of each term of `conditional`: its spread over normal images and its AUROC, means over runs."""
    far = result("score_parts_ood")["rows"]
    settings = {
        "MNIST, a fifth of CIFAR-10": [row for row in far if row["train_images"] < 20_000],
        "MNIST, all of it": [row for row in far if row["train_images"] > 20_000],
        "one class of ten": result("score_parts_one_class")["rows"],
    }
    lines = [
        f"| term | {' | '.join(f'std, {name} | AUROC, {name}' for name in settings)} |",
        "|---|" + "---|---|" * len(settings),
    ]
    for term in far[0]["terms"]:
        numbers = (
            f"{mean(row['terms'][term]['std_of_normal'] for row in rows):.0f} | "
            f"{mean(row['terms'][term]['auroc'] for row in rows):.3f}"
            for rows in settings.values()
        )
        lines.append(f"| {term} | {' | '.join(numbers)} |")
    return "\n".join(lines)


def made(name: str, mark: str) -> dict[str, str]:
    """How a protocol's result was made."""
    found = result(name)
    minutes = mean(cell.get("seconds") or cell["measures"]["seconds"] for cell in found["cells"]) / 60
    about = f"{found['data']}, {minutes:.0f} minutes a cell; {machine(found)}: `{found['command']}`"
    return {f"{mark}-about": about}


def on_gpu() -> dict[str, str]:
    """What ``benchmarks/gpu.sh`` has measured so far."""
    measured: dict[str, Callable[[], dict[str, str]]] = {
        "gpu_controls": lambda: methods("gpu_controls", ""),
        "gpu_one-class": lambda: {
            "one-class": scores(tables.rows_of_scores(result("gpu_one-class")["cells"])),
            **made("gpu_one-class", "one-class"),
        },
        "gpu_speed": lambda: ratios("gpu_speed"),
    }
    found = {
        name: "\n\n".join(make().values())
        for name, make in measured.items()
        if (FOLDER / "results" / f"{name}.json").is_file()
    }
    return {name: found.get(name, "Not measured yet.") for name in measured}


def speed() -> dict[str, str]:
    """The rows against rivals, and how costs grow."""
    found = result("speed")
    growth = ["| cost | of | grows as | from, to |", "|---|---|---|---|"]
    for row in found["growth"]:
        (x, low), (y, high) = row["points"][0], row["points"][-1]
        kind = "time" if row["unit"] == "s" else f"peak memory, {row['unit']}"
        times = f"{high / low:.1f}-fold from {x:,} to {y:,}"
        if row["unit"] != "s":
            times = f"{low:,.0f} at {x:,}, {high:,.0f} at {y:,}"
        growth.append(f"| {kind} | {row['what']} | {row['variable']}^{row['slope']:.2f} | {times} |")
    return {**ratios("speed"), "growth": "\n".join(growth)}


def ratios(name: str) -> dict[str, str]:
    """A result's rows against rivals, and how they were made."""
    found = result(name)
    lines = ["| what | rival | ratio of times [min, max] | wanted |", "|---|---|---|---|"]
    for row in found["rows"]:
        numbers = row["note"]
        if row["ratio"] is not None:
            numbers = f"{row['ratio']:.3f} [{row['ratio_min']:.3f}, {row['ratio_max']:.3f}]"
        wanted = "" if row["wanted"] is None else f"≤ {row['wanted']:.3g}"
        lines.append(f"| {row['what']} | {row['rival']} | {numbers} | {wanted} |")
    return {name: "\n".join(lines), f"{name}-about": f"{machine(found)}: `{found['command']}`"}


def soak() -> dict[str, str]:
    """How often commands were killed and gone on with, and how many damaged files were read."""
    found = result("soak")
    kills = {name: part["kills"] for name, part in found["kills"].items() if isinstance(part, dict)}
    fuzz = found["fuzz"]
    failed = sum(part["failed"] for part in fuzz["files"].values())
    counts = ", ".join(f"`{name}` {count} times" for name, count in kills.items())
    about = f"`make soak` ({found['date'][:10]}, {found['cores']} cores): killed {counts}, "
    about += "each ended with the files of a run left alone"
    read = f"{fuzz['count']:,} damaged images, configurations, checkpoints and tables read, {failed} failures"
    return {"soak": f"{about}; {read}."}


PAGES = {
    FOLDER / "study.md": study,
    FOLDER / "one_class.md": anomalies,
    FOLDER / "speed.md": speed,
    FOLDER / "controls.md": controls,
    FOLDER / "README.md": on_gpu,
    FOLDER.parent / "README.md": lambda: {**anomalies(), **controls(), **soak()},
}


def render(page: Path) -> str:
    """The page with its tables between their marks."""
    text = page.read_text()
    for name, table in PAGES[page]().items():
        before, begin, rest = text.partition(f"<!-- {name} -->\n")
        if begin:
            text = before + begin + table + "\n" + rest[rest.index("<!-- end -->") :]
    return text


def main() -> None:
    """Bring all pages up to date."""
    for page in PAGES:
        page.write_text(render(page))


if __name__ == "__main__":
    main()
