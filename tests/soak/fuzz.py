"""Files that a command reads, damaged in thousands of ways: each is refused in the documented way, or is whole.

Each case damages one good file and reads it as the commands do, in this process. A failure is any exception but those
that a command turns into one line, a case that takes longer than `LIMIT`, and damage that is accepted although what
was read is not whole. Cases are functions of (seed, number): ``run_case`` repeats one.
"""

from __future__ import annotations

import contextlib
import dataclasses
import io
import json
import logging
import math
import os
import random
import shutil
import signal
import struct
import tempfile
import time
import zlib
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import nn

from pyro_vje import TrainConfig, load_run, train
from pyro_vje.anomaly.table import Rows
from pyro_vje.data import ImageError, decode_image
from pyro_vje.data.decode import FORMATS, image_shape
from pyro_vje.data.splits import load_train_set
from pyro_vje.experiments import ablation, protocols
from pyro_vje.experiments.cells import Cell, Cells
from pyro_vje.model import encoders
from pyro_vje.model.build import build_model
from pyro_vje.runs.folder import CALIBRATION, CHECKPOINTS, CONFIG, METRICS, WEIGHTS, load_posteriors, read_info
from pyro_vje.training import run as training
from pyro_vje.training.checkpoints import check_checkpoint

LIMIT = 30.0
"""Seconds that a case may take; the slowest, an image of the size that is just allowed, takes about two."""
RESUMES = 10
"""Checkpoints changed within their structure and found whole that are trained on with: each takes a second."""


class Hang(BaseException):
    """A case took longer than `LIMIT`; no ``except Exception`` may swallow it."""


class NotWhole(AssertionError):
    """Damage was accepted, and what was read is not what a whole file holds."""


# Mutations: bytes to bytes --------------------------------------------------------------------------------------------

Rng = random.Random
HOSTILE: tuple[Any, ...] = (
    *(None, True, False, 0, 1, -1, 2, 3, 2**31, 2**63, -(2**63), 10**30, 10**400, 0.5, -0.0, 1e308, math.nan, math.inf),
    *("", "x", "inf", "nan", "os:getcwd", "../../etc/passwd", "\udc80", "\n", "ü" * 300, "0" * 5000),
    *([], {}, [[]], [None], {"": None}, [1.0] * 5, list(range(50))),
)  # fmt: skip
DEEP = b"[" * 100_000


def flip(data: bytes, rng: Rng) -> bytes:
    out = bytearray(data)
    for _ in range(rng.choice((1, 1, 2, 8, 64))):
        out[rng.randrange(len(out))] ^= 1 << rng.randrange(8)
    return bytes(out)


def overwrite(data: bytes, rng: Rng) -> bytes:
    start, length = rng.randrange(len(data)), rng.choice((1, 4, 16, 200))
    patch = rng.choice((bytes(length), b"\xff" * length, rng.randbytes(length)))
    return data[:start] + patch + data[start + length :]


def truncate(data: bytes, rng: Rng) -> bytes:
    return data[: rng.choice((rng.randrange(len(data)), len(data) - 1 - rng.randrange(min(len(data), 16))))]


def splice(data: bytes, rng: Rng) -> bytes:
    a, b, c = sorted(rng.randrange(len(data) + 1) for _ in range(3))
    return rng.choice(
        (data[:a] + data[b:], data[:b] + data[a:], data[:a] + data[b:c] + data[a:b] + data[c:], data + data[a:])
    )


def length_field(data: bytes, rng: Rng) -> bytes:
    """Write a number where a length may stand, often near the start, where most formats have them."""
    form = rng.choice(("<H", ">H", "<I", ">I", "<Q", ">Q"))
    top = 2 ** (8 * struct.calcsize(form)) - 1
    value = rng.choice((0, 1, 2, 255, 65535, top, top // 2, top // 2 + 1, len(data), len(data) - 1, len(data) * 2))
    start = rng.choice((rng.randrange(len(data)), rng.randrange(min(len(data), 64)), 0))
    return data[:start] + struct.pack(form, value & top) + data[start + struct.calcsize(form) :]


BYTEWISE = (flip, overwrite, truncate, splice, length_field)


def change_tree(value: Any, rng: Rng) -> Any:
    """Replace, remove, add, rename or exchange a node of nested lists and dicts."""
    places: list[tuple[Any, Any]] = []

    def visit(node: Any) -> None:
        items = node.items() if isinstance(node, dict) else enumerate(node) if isinstance(node, list) else ()
        for key, child in list(items):
            places.append((node, key))
            visit(child)

    visit(value)
    if not places or rng.random() < 0.03:
        return rng.choice(HOSTILE)
    for _ in range(rng.choice((1, 1, 1, 3))):
        node, key = rng.choice(places)
        other, there = rng.choice(places)
        with contextlib.suppress(LookupError, TypeError):  # a place that an earlier change took away
            match rng.randrange(6):
                case 0 | 1 | 2:
                    node[key] = rng.choice(HOSTILE)
                case 3:
                    del node[key]
                case 4:
                    node[key] = other[there]
                case 5 if isinstance(node, dict):
                    node[f"{key}x"] = node.pop(key)
                case 5:
                    node.insert(key, rng.choice(HOSTILE))
    return value


def change_json(data: bytes, rng: Rng) -> bytes:
    if rng.random() < 0.01:
        return DEEP
    try:
        return json.dumps(change_tree(json.loads(data), rng)).encode()
    except RecursionError:  # a node was put into itself
        return DEEP
    except ValueError:
        return b"{}"


def change_lines(data: bytes, rng: Rng) -> bytes:
    """Change, double, drop or exchange lines, of JSON or of cells."""
    lines = data.splitlines(keepends=True)
    i, j = rng.randrange(len(lines)), rng.randrange(len(lines))
    match rng.randrange(5):
        case 0:
            lines[i] = change_json(lines[i], rng) + b"\n"
        case 1:
            cells = lines[i].split(b",")
            cells[rng.randrange(len(cells))] = str(rng.choice(HOSTILE)).encode("utf-8", "surrogateescape")
            lines[i] = b",".join(cells)
        case 2:
            lines.insert(i, lines[j])
        case 3:
            del lines[i]
        case 4:
            lines[i], lines[j] = lines[j], lines[i]
    return b"".join(lines)


def change_safetensors(data: bytes, rng: Rng) -> bytes:
    """Change the header, or the description within it, and keep its length right."""
    size = int.from_bytes(data[:8], "little")
    header = json.loads(data[8 : 8 + size])
    own = header.get("__metadata__", {})
    if "pyro_vje" in own and rng.random() < 0.6:
        own["pyro_vje"] = change_json(own["pyro_vje"].encode(), rng).decode()
        text = json.dumps(header).encode()
    else:
        text = change_json(data[8 : 8 + size], rng)
    return len(text).to_bytes(8, "little") + text + data[8 + size :]


def change_numbers(data: bytes, rng: Rng) -> bytes:
    """Put a float that is not finite, or a random one, among the numbers of a safetensors file."""
    size = 8 + int.from_bytes(data[:8], "little")
    start = size + 4 * rng.randrange((len(data) - size) // 4)
    number = struct.pack("<f", rng.choice((math.nan, math.inf, -math.inf, -1.0, 0.0, 3e38)))
    return data[:start] + number + data[start + 4 :]


def change_png(data: bytes, rng: Rng) -> bytes:
    """Change the content of a chunk and make its checksum right again."""
    chunks, at = [], 8
    while at + 12 <= len(data):
        length = int.from_bytes(data[at : at + 4], "big")
        chunks.append((data[at + 4 : at + 8], data[at + 8 : at + 8 + length]))
        at += 12 + length
    i = rng.randrange(len(chunks))
    kind, content = chunks[i]
    chunks[i] = (kind, rng.choice((flip, overwrite, length_field))(content, rng) if content else b"\x00")
    if rng.random() < 0.2:
        chunks.insert(rng.randrange(len(chunks)), rng.choice(chunks))
    parts = (struct.pack(">I", len(c)) + k + c + struct.pack(">I", zlib.crc32(k + c)) for k, c in chunks)
    return data[:8] + b"".join(parts)


def change_checkpoint(data: bytes, rng: Rng) -> bytes:
    """Change a node of what is saved: a whole archive, with right checksums, of something else."""
    saved = torch.load(io.BytesIO(data), weights_only=True)
    stream = io.BytesIO()
    with contextlib.suppress(RecursionError):
        torch.save(change_tree(saved, rng), stream)
    return stream.getvalue() or b"\x80"


# Targets: a good file, and how the commands read it -------------------------------------------------------------------


@dataclasses.dataclass(frozen=True)
class Target:
    """A kind of file.

    Attributes
    ----------
    share : int
        Of 100 cases.
    good : list of bytes
        Undamaged content.
    path : Path
        Where the damaged content is put.
    mutations : tuple
        What may be done to it.
    read : callable
        Gets the content before and after; reads ``path``; raises `NotWhole` where what it accepts is not whole.
    errors : tuple
        What may be raised.
    """

    share: int
    good: list[bytes]
    path: Path
    mutations: tuple[Callable[[bytes, Rng], bytes], ...]
    read: Callable[[bytes, bytes], None]
    errors: tuple[type[Exception], ...] = (ValueError, OSError)


def whole(condition: bool, what: str) -> None:
    if not condition:
        raise NotWhole(what)


def fuzz_encoder(image_size: int) -> nn.Module:
    return nn.Sequential(
        nn.Conv2d(3, 4, 3, stride=2), nn.BatchNorm2d(4), nn.ReLU(), nn.AdaptiveAvgPool2d(1), nn.Flatten()
    )


def good_images() -> list[bytes]:
    rng = np.random.default_rng(0)
    pixels = Image.fromarray(rng.integers(0, 256, (20, 24, 3), dtype=np.uint8))
    kinds: list[tuple[Image.Image, str, dict[str, Any]]] = [(pixels, kind, {}) for kind in FORMATS]
    exif = Image.Exif()
    exif[0x0112] = 6
    frames = [pixels.rotate(90 * i).quantize(32) for i in range(3)]
    kinds += [
        (pixels, "JPEG", {"exif": exif, "progressive": True}),
        (pixels.convert("CMYK"), "JPEG", {}),
        (pixels.convert("CMYK"), "TIFF", {"compression": "tiff_lzw"}),
        (pixels, "TIFF", {"compression": "jpeg"}),
        (frames[0], "GIF", {"save_all": True, "append_images": frames[1:]}),
        (frames[0], "PNG", {"transparency": 3}),
        (pixels.convert("RGBA"), "PNG", {"save_all": True, "append_images": [pixels.convert("RGBA").rotate(9)]}),
        (pixels.convert("RGBA"), "WEBP", {"lossless": True}),
        (pixels.convert("I;16"), "PNG", {}),
        (pixels.convert("F"), "TIFF", {}),
        (pixels.convert("1"), "PPM", {}),
    ]
    found = []
    for image, kind, options in kinds:
        stream = io.BytesIO()
        image.save(stream, kind, **options)
        found.append(stream.getvalue())
    return found


def targets(folder: Path) -> dict[str, Target]:
    """Train a small run in ``folder`` and say how each of its files is read."""
    encoders.ENCODERS["fuzz"] = fuzz_encoder
    images = folder / "images"
    for split, count in (("train", 12), ("test", 4)):
        for kind in ("a", "b"):
            (images / split / kind).mkdir(parents=True)
            for i in range(count):
                pixels = np.random.default_rng(i).integers(0, 256, (16, 16, 3), dtype=np.uint8)
                Image.fromarray(pixels).save(images / split / kind / f"{i}.png")
    small = {"encoder": "fuzz", "embedding_dim": 4, "hidden_dim": 8, "epochs": 2, "batch_size": 8, "image_size": 16}
    config = TrainConfig(dataset="folder", data_dir=str(images), precision="32", knn_every=0, holdout=0.2, **small)  # type: ignore[arg-type]
    good = train(config, folder / "good")
    run = shutil.copytree(good, folder / "run")
    loaded, info = load_run(good), read_info(good)
    checkpoint = (good / CHECKPOINTS / "last.ckpt").read_bytes()
    train_set, _ = load_train_set(info.config)
    resumed = 0

    def read_image(before: bytes, after: bytes) -> None:
        path = folder / "x.img"
        try:
            decoded = decode_image(path, 32)
        finally:
            image_shape(path)
        whole(decoded.shape == (3, 32, 32) and decoded.dtype == torch.uint8, f"decoded to {decoded.shape}")
        if before.startswith(after):  # cut off: only what comes after the pixels may be missing
            whole(torch.equal(decoded, decode_image(before, 32)), "a part of an image was taken for the whole")

    def read_config(before: bytes, after: bytes) -> None:
        found = read_info(run)
        whole(not before.startswith(after) or before.strip() == after.strip(), "a part of the configuration was taken")
        whole(type(found).from_dict(json.loads(json.dumps(found.to_dict()))) == found, "it cannot be written again")
        build_model(dataclasses.replace(found.config, encoder="fuzz", hidden_dim=8, embedding_dim=4), 16)

    def read_weights(before: bytes, after: bytes) -> None:
        found = load_run(run / WEIGHTS)
        whole(not before.startswith(after), "a part of the weights was taken")
        whole(all(t.isfinite().all() for t in found.vje.state_dict().values()), "weights are not finite")
        found.vje.features(torch.zeros(2, 3, 16, 16))

    def read_posteriors(before: bytes, after: bytes) -> None:
        found = load_posteriors(dataclasses.replace(loaded, folder=run), CALIBRATION)
        assert found is not None
        whole(not before.startswith(after), "a part of the posteriors was taken")
        whole(all(t.isfinite().all() for t in found[:3]) and bool((found.scale > 0).all()), "posteriors are unusable")

    def read_checkpoint(before: bytes, after: bytes) -> None:
        nonlocal resumed
        module = training.Pretraining(build_model(info.config, 16), info.config, train_set)
        check_checkpoint(run / CHECKPOINTS / "last.ckpt", module)
        whole(not before.startswith(after), "a part of the checkpoint was taken")
        try:
            same = torch.load(io.BytesIO(after), weights_only=True)["state_dict"]
        except Exception as error:
            raise NotWhole("a checkpoint was accepted that cannot be loaded") from error
        whole(all(t.isfinite().all() for t in same.values()), "weights are not finite")
        if resumed < RESUMES and after != before:
            resumed += 1
            signal.setitimer(signal.ITIMER_REAL, 10 * LIMIT)  # it trains
            train(TrainConfig(), run, resume=True)

    fingerprint = {"score": "conditional", "seed": 0, "likelihood": None}
    path = folder / "x.part"
    begun = Rows(path, fingerprint, (12, 3), resume=False)
    begun.add({i: [0.5 * i, -float(i), math.nan] for i in range(10)})
    part = path.read_bytes()

    def read_journal(before: bytes, after: bytes) -> None:
        found = Rows(path, fingerprint, (12, 3), resume=True).numbers
        whole(all(len(numbers) == 3 for numbers in found.values()), "rows differ in length")
        if before.startswith(after):
            lines = before[: before.rindex(b"\n", 0, len(after)) + 1].count(b"\n") if b"\n" in after else 1
            whole(len(found) == lines - 1, "a half row was taken, or a whole one was not")

    score = {"normal": "a", "seed": 0, "score": "elbo", "on": "likelihood normal", "auroc": 0.5, "auroc_95": [0.4, 0.6]}
    measures = {"loss": 1.0, "seconds": 2.0, "knn": 0.5}
    cell = Cell("a", config.resolved(), "finished", None, measures, {"knn": {"k": 5}}, [score, score])
    cell_json = json.dumps({**cell.to_dict(), "versions": {}}).encode()
    axes = ("likelihood", "seed")
    summary_json = json.dumps({"settings": {"epochs": 2}, "axes": axes, "cells": []}).encode()
    (folder / "grid" / "cells").mkdir(parents=True)

    def read_cell(before: bytes, after: bytes) -> None:
        cells = Cells(folder / "grid", "ablation", {"epochs": 2}, axes).read()
        whole(not before.startswith(after), "a part of a cell was taken")
        ablation.compare(ablation.rows_of(cells, axes), axes)
        if rows := [row for cell in cells for row in cell.scores]:
            protocols.compare_scores(rows)

    def read_summary(before: bytes, after: bytes) -> None:
        Cells(folder / "grid", "ablation", {"epochs": 2}, axes)
        whole(not before.startswith(after), "a part of a summary was taken")

    def read_metrics(before: bytes, after: bytes) -> None:
        measures = ablation.read_measures(run / METRICS)
        whole(all(isinstance(value, float) for value in measures.values()), "a measure is no number")

    tensors = (*BYTEWISE, change_safetensors, change_safetensors, change_numbers)
    text = (*BYTEWISE, change_json, change_json, change_json)
    return {
        "image": Target(50, good_images(), folder / "x.img", (*BYTEWISE, change_png), read_image, (ImageError,)),
        "config": Target(10, [(good / CONFIG).read_bytes()], run / CONFIG, text, read_config),
        "weights": Target(10, [(good / WEIGHTS).read_bytes()], run / WEIGHTS, tensors, read_weights),
        "calibration": Target(6, [(good / CALIBRATION).read_bytes()], run / CALIBRATION, tensors, read_posteriors),
        "checkpoint": Target(
            8, [checkpoint], run / CHECKPOINTS / "last.ckpt", (*BYTEWISE, change_checkpoint), read_checkpoint
        ),
        "journal": Target(6, [part], path, (*BYTEWISE, change_lines, change_lines), read_journal),
        "cell": Target(6, [cell_json], folder / "grid" / "cells" / "a.json", text, read_cell),
        "summary of cells": Target(2, [summary_json], folder / "grid" / "ablation.json", text, read_summary),
        "metrics": Target(2, [(good / METRICS).read_bytes()], run / METRICS, (*BYTEWISE, change_lines), read_metrics),
    }  # fmt: skip


# Running --------------------------------------------------------------------------------------------------------------


@contextlib.contextmanager
def quiet() -> Iterator[None]:
    """Nothing logged, one thread, and a signal where a case takes too long.

    Nothing on standard error either, where the libraries beneath Pillow print what is wrong with a TIFF.
    """

    def hang(*_: Any) -> None:
        raise Hang

    threads, before = torch.get_num_threads(), signal.signal(signal.SIGALRM, hang)
    torch.set_num_threads(1)
    logging.disable(logging.CRITICAL)
    stderr, nowhere = os.dup(2), os.open(os.devnull, os.O_WRONLY)
    os.dup2(nowhere, 2)
    try:
        yield
    finally:
        os.dup2(stderr, 2)
        os.close(stderr)
        os.close(nowhere)
        logging.disable(logging.NOTSET)
        torch.set_num_threads(threads)
        signal.signal(signal.SIGALRM, before)


def run_case(kinds: dict[str, Target], seed: int, number: int) -> tuple[str, str, str | None, float]:
    """Damage and read one file: its kind, ``accepted`` or ``refused``, what failed if anything, and the seconds."""
    rng = random.Random(f"{seed}/{number}")
    (name,) = rng.choices(list(kinds), [target.share for target in kinds.values()])
    target = kinds[name]
    before = rng.choice(target.good)
    mutation = rng.choice(target.mutations)
    if mutation is change_png and not before.startswith(b"\x89PNG"):
        mutation = flip
    after = mutation(before, rng)
    if mutation is not truncate and rng.random() < 0.1 and after:
        after = rng.choice(BYTEWISE)(after, rng)
    target.path.write_bytes(after)
    outcome, failure = "accepted", None
    began = time.perf_counter()
    signal.setitimer(signal.ITIMER_REAL, LIMIT)
    try:
        if after != before:
            target.read(before, after)
    except target.errors:
        outcome = "refused"
    except Hang:
        failure = f"took more than {LIMIT:g} s"
    except Exception as error:
        failure = f"{type(error).__name__}: {error}"[:300]
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        target.path.write_bytes(target.good[0])  # other cases read the folder too
    seconds = time.perf_counter() - began
    return name, outcome, failure and f"case {number} ({name}, {mutation.__name__}): {failure}", seconds


def main(count: int = 20_000, seed: int = 0) -> dict[str, Any]:
    """Run ``count`` cases, print the figures, and return them."""
    began = time.monotonic()
    figures: dict[str, dict[str, Any]] = {}
    failures: list[str] = []
    with tempfile.TemporaryDirectory() as folder, quiet():
        kinds = targets(Path(folder))
        for number in range(count):
            name, outcome, failure, seconds = run_case(kinds, seed, number)
            row = figures.setdefault(name, {"cases": 0, "accepted": 0, "refused": 0, "failed": 0, "slowest_s": 0.0})
            row["cases"] += 1
            row["failed" if failure else outcome] += 1
            row["slowest_s"] = round(max(row["slowest_s"], seconds), 3)
            if failure:
                failures.append(failure)
    print(f"{'file':<18}{'cases':>8}{'refused':>8}{'whole':>8}{'failed':>8}{'slowest':>10}")
    for name, row in sorted(figures.items()):
        numbers = "".join(f"{row[key]:>8}" for key in ("cases", "refused", "accepted", "failed"))
        print(f"{name:<18}{numbers}{row['slowest_s']:>8.2f} s")
    for failure in failures[:20]:
        print(failure)
    seconds = round(time.monotonic() - began, 1)
    print(f"{count} damaged files (seed {seed}): {len(failures)} failures, {seconds:g} s")
    return {"count": count, "seed": seed, "seconds": seconds, "files": figures, "failures": failures}


def run(quick: bool = False, seed: int = 0) -> dict[str, Any]:
    """The figures of `main`, in its short form 300 cases; AssertionError where there is a failure."""
    figures = main(300 if quick else 20_000, seed)
    assert not figures["failures"], "; ".join(figures["failures"][:5])
    return figures
