"""Exported files: they compute what the package computes, without the package; the card says what was measured."""

import csv
import dataclasses
import json
import re
import shutil
import subprocess
import sys
from importlib.util import find_spec

import numpy as np
import pyro
import pytest
import torch
from click.testing import CliRunner
from PIL import Image
from torch import nn

from pyro_vje import embed, evaluate, export, load_run, score, train
from pyro_vje.anomaly.judge import make_scorer, prepare
from pyro_vje.anomaly.parts import LikelihoodParts
from pyro_vje.anomaly.scores import SCORES
from pyro_vje.cli import main
from pyro_vje.config import ScoreConfig
from pyro_vje.data import decode_image, load_dataset
from pyro_vje.export import deploy as exporting
from pyro_vje.model import encoders
from pyro_vje.model.encoding import Encoded

OUTPUTS = ["embedding", "loc", "scale", "score", "p_value"]

ROTATIONS = {name for name, score in SCORES.items() if score.of == "rotations"}  # of runs that have them


@pytest.fixture(scope="module")
def images(image_folder):
    """The 18 test images, in the order in which `score` writes them."""
    return load_dataset("folder", image_folder, "test", image_size=16).images


@pytest.fixture
def run_copy(trained_run, tmp_path):
    return shutil.copytree(trained_run, tmp_path / "run")


def columns(path):
    with open(path, newline="") as file:
        rows = list(csv.DictReader(file))
    return {name: np.array([float(row[name]) for row in rows]) for name in ("anomaly_score", "p_value")}


def run_alone(code, *arguments):
    """Run code in a process that cannot import this package, Pyro, or what else is named last."""
    *arguments, absent = arguments
    block = f"import sys; sys.modules.update(dict.fromkeys({['pyro_vje', 'pyro', *absent]}))\n"
    done = subprocess.run(
        [sys.executable, "-c", block + code, *map(str, arguments)], capture_output=True, text=True, cwd="/"
    )
    assert done.returncode == 0, done.stderr


RUN_CARD = """
import os, re
card, out, *files = sys.argv[1:]
os.chdir(os.path.dirname(card))
preprocessing, use = re.findall("```python\\n(.*?)```", open(card).read(), re.DOTALL)
exec(preprocessing)
images = np.stack([preprocess(file) for file in files])
exec(use)
np.savez(out, **outputs)
"""


@pytest.fixture(scope="module")
def files(tmp_path_factory):
    """Image files of every mode and of many sizes."""
    folder = tmp_path_factory.mktemp("files")
    rng = np.random.default_rng(0)
    for i, (mode, size) in enumerate(
        (
            *[("RGB", (16, 16)), ("L", (40, 23)), ("RGBA", (23, 41)), ("LA", (8, 5)), ("I;16", (31, 57))],
            *[("F", (20, 20)), ("P", (33, 64)), ("1", (50, 49)), ("clear", (19, 30)), ("CMYK", (64, 90))],
        )
    ):
        noise = rng.random((size[1] // 3 + 1, size[0] // 3 + 1, 4)).repeat(3, 0).repeat(3, 1)[: size[1], : size[0]]
        image = Image.fromarray((255 * noise).astype(np.uint8), "RGBA")
        if mode == "I;16":
            image = Image.fromarray((65535 * noise[..., 0]).astype(np.uint16))
        elif mode == "F":
            image = Image.fromarray(noise[..., 0].astype(np.float32))
        elif mode == "clear":
            image.putalpha(0)
        elif mode == "P":
            image = image.quantize(8)
        else:
            image = image.convert(mode)
        image.save(folder / f"{i}.{'tif' if mode in ('F', 'CMYK') else 'png'}")
    large = Image.fromarray(rng.integers(0, 255, (30, 70, 3), dtype=np.uint8)).resize((700, 300))
    for name, mode in (("large", "RGB"), ("grey", "L")):
        large.convert(mode).save(folder / f"{name}.jpg")
    exif = Image.Exif()
    exif[0x0112] = 6  # lies on its side
    large.save(folder / "turned.jpg", exif=exif)
    return sorted(folder.iterdir())


@pytest.mark.parametrize(
    ("format", "name", "kind"), [("onnx", "model.onnx", "aggregate"), ("torch", "model.pt2", "conditional")]
)
def test_without_the_package_a_file_computes_what_score_and_embed_write(run_copy, files, tmp_path, format, name, kind):
    """From image files, by the code of the model card."""
    if format == "onnx":
        pytest.importorskip("onnxscript")
    result = export(run_copy, format=format, score=kind, num_particles=6, seed=3)
    assert result.path == run_copy / name
    absent = ["torch"] if format == "onnx" else ["onnxruntime", "torchvision"]
    run_alone(RUN_CARD, result.card, tmp_path / "found.npz", *files, absent)
    found = dict(np.load(tmp_path / "found.npz"))
    assert list(found) == OUTPUTS

    how = {"score": kind, "num_particles": 6, "seed": 3, "data": files[0].parent}
    wanted = columns(score(run_copy, out=tmp_path / "s.csv", **how).csv)
    np.testing.assert_allclose(found["score"], wanted["anomaly_score"], rtol=1e-5, atol=1e-5)
    np.testing.assert_allclose(found["p_value"], wanted["p_value"], atol=1e-6)  # of six digits in the CSV
    assert len(set(found["p_value"])) > 1
    embed(run_copy, files[0].parent, tmp_path / "embedded.npz")
    embedded = np.load(tmp_path / "embedded.npz")
    for ours, theirs in (("embedding", "embeddings"), ("loc", "loc"), ("scale", "scale")):
        np.testing.assert_allclose(found[ours], embedded[theirs], rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize(("fit", "interpolation"), [("crop", "bilinear"), ("pad", "bicubic"), ("squeeze", "bilinear")])
def test_the_cards_preprocessing_reads_files_as_the_package_does(trained_run, files, fit, interpolation):
    run = load_run(trained_run)
    config = dataclasses.replace(run.info.config, fit=fit)
    for size in (16, 37):
        info = dataclasses.replace(
            run.info, image_size=size, view_size=size, interpolation=interpolation, config=config
        )
        judge = prepare(dataclasses.replace(run, info=info), ScoreConfig())
        card = exporting.model_card(judge, {}, file="model.onnx", format="onnx")
        names = {}
        exec(re.search("```python\n(.*?)```", card, re.DOTALL)[1], names)
        for file in files:
            wanted = decode_image(file, size, interpolation, fit).numpy()
            np.testing.assert_array_equal(names["preprocess"](file), wanted, err_msg=file.name)


def test_p_values_by_folds_have_their_heads_in_the_file(tiny_config, images, tmp_path):
    config = dataclasses.replace(
        tiny_config, encoder_lr_scale=0.0, embedding_dim=None, feature_views=2, folds=2, holdout=None
    )
    run = train(config, tmp_path / "run")
    result = export(run, format="torch")
    assert "training images, each by one of 2 heads" in result.card.read_text()
    wanted = columns(score(run).csv)
    found = torch.export.load(result.path).module()(images)
    np.testing.assert_allclose(found["score"], wanted["anomaly_score"], rtol=1e-4, atol=1e-5)
    np.testing.assert_allclose(found["p_value"], wanted["p_value"], atol=1.01 / 49)  # a score may move past one
    assert np.mean(np.abs(found["p_value"].numpy() - wanted["p_value"]) < 1e-6) > 0.8
    assert len(set(wanted["p_value"])) > 5


class Everything(nn.Module):
    """All scores in one graph, each as `Deployed` has one."""

    def __init__(self, scorer):
        super().__init__()
        self.scorer, self.posterior = scorer, scorer.vje.posterior_network

    def forward(self, images):
        encoded = Encoded(images, *self.posterior(images))
        parts = LikelihoodParts(self.scorer, encoded, at_once=True)
        return {name: score(parts) for name, score in SCORES.items() if name not in ROTATIONS}


def test_every_score_can_be_exported(trained_run):
    run = load_run(trained_run)
    scorer = make_scorer(run, ScoreConfig())
    embeddings = scorer.reference.embeddings[:7] + 0.3
    everything = Everything(scorer).eval()
    with torch.no_grad(), pyro.validation_enabled(False):
        everything(embeddings)  # what is computed once is there before tracing
        shapes = ({0: torch.export.Dim("batch")},)
        program = torch.export.export(everything, (embeddings[:2],), dynamic_shapes=shapes, strict=False)
        found = {"torch": program.module()(embeddings)}
        if find_spec("onnxscript"):
            found["onnx"] = exporting._write_onnx(program, list(found["torch"]), "{}")[1](embeddings)
    encoded = Encoded(embeddings, *run.vje.posterior(embeddings))
    for name in SCORES.keys() - ROTATIONS:
        for values in found.values():
            value = torch.as_tensor(values[name])
            torch.testing.assert_close(value, scorer.scores(name, encoded), rtol=1e-5, atol=1e-4)


# Operations that ONNX lacks or computes too coarsely are in the first three; the other families are arithmetic alone.
@pytest.mark.parametrize(
    ("family", "format"),
    [
        ("polar-student-t-exact", "onnx"),
        ("polar-normal", "onnx"),
        ("student-t-independent", "onnx"),
        ("spherical-cauchy", "torch"),
    ],
)
def test_other_families_than_the_one_trained_with_export(trained_run, images, tmp_path, family, format):
    path = tmp_path / "model"
    if format == "onnx":
        pytest.importorskip("onnxscript")
        onnxruntime = pytest.importorskip("onnxruntime")
    export(trained_run, format=format, out=path, score_likelihood=family)
    wanted = columns(score(trained_run, score_likelihood=family, out=tmp_path / "s.csv").csv)
    for part in (slice(1), slice(None)):
        if format == "onnx":
            session = onnxruntime.InferenceSession(path)
            found = session.run(["score"], {"images": images[part].numpy()})[0]
        else:
            with open(path, "rb") as file:
                found = torch.export.load(file).module()(images[part])["score"].numpy()
        np.testing.assert_allclose(found, wanted["anomaly_score"][part], rtol=1e-5, atol=1e-4)


def test_what_onnx_lacks_is_made_to_rounding():
    x = torch.cat([torch.logspace(-6, 6, 200, dtype=torch.float64), torch.tensor([1.0, 2.0]).double()])
    torch.testing.assert_close(exporting._lgamma(x), torch.lgamma(x), rtol=1e-13, atol=1e-13)
    for sign in (1, -1):
        small = sign * torch.logspace(-30, -0.01, 500, dtype=torch.float32)
        torch.testing.assert_close(exporting._log1p(small), small.log1p(), rtol=1e-6, atol=0)
    assert exporting._lgamma(x.float()).dtype == torch.float32
    angle = torch.linspace(-3.14159265, 3.14159265, 1001, dtype=torch.float64)
    for radius in (1e-30, 1.0, 1e30):
        found = exporting._atan2(radius * angle.sin(), radius * angle.cos())
        torch.testing.assert_close(found, angle, rtol=1e-14, atol=1e-14)
    sine = torch.linspace(-0.999999, 0.999999, 1001, dtype=torch.float64)
    asin = exporting._DECOMPOSITIONS[torch.ops.aten.asin.default]
    torch.testing.assert_close(asin(sine), sine.asin(), rtol=1e-14, atol=1e-14)


def test_a_weights_file_exports_without_p_values(trained_run, tmp_path):
    result = export(trained_run / "weights.safetensors", format="torch", out=tmp_path / "model.pt2")
    assert list(result.differences) == OUTPUTS[:-1]
    card = result.card.read_text()
    assert "no p-values" in card
    assert "output `p_value`" not in card


@pytest.mark.parametrize(("output", "factor"), [("scale", 1.001), ("score", float("nan"))])
def test_a_file_that_would_compute_something_else_is_not_written(run_copy, monkeypatch, output, factor):
    write = exporting._WRITERS["torch"]

    def wrong(*arguments):
        content, compute = write(*arguments)
        return content, lambda images: {**compute(images), output: factor * compute(images)[output]}

    monkeypatch.setitem(exporting._WRITERS, "torch", wrong)
    with pytest.raises(ValueError, match=rf"model\.pt2 is not written: its {output} would differ by"):
        export(run_copy, format="torch")
    assert not list(run_copy.glob("model*"))
    assert not (run_copy / "MODEL_CARD.md").exists()


class Branching(nn.Sequential):
    def forward(self, images):
        features = super().forward(images)
        return features if features.sum() > 0 else -features


def test_what_cannot_be_exported_is_said(run_copy, monkeypatch, tmp_path):
    tiny = encoders.ENCODERS["tiny"]
    monkeypatch.setitem(encoders.ENCODERS, "tiny", lambda size: Branching(*tiny(size)))
    with pytest.raises(
        ValueError, match=r"encoder 'tiny' .*'polar-student-t' and score .* cannot be exported as torch: \w+"
    ):
        export(run_copy, format="torch")
    with pytest.raises(ValueError, match="format must be one of onnx, torch, not 'tflite'"):
        export(run_copy, format="tflite")
    with pytest.raises(FileNotFoundError, match="there is no folder"):
        export(run_copy, format="torch", out=tmp_path / "no" / "model.pt2")
    monkeypatch.setitem(sys.modules, "onnxruntime", None)
    with pytest.raises(ValueError, match=r"ONNX needs onnxruntime: pip install 'pyro-vje\[export\]'"):
        export(run_copy)


def test_the_card_tells_what_was_measured_and_what_was_not(run_copy, image_folder):
    arguments = ["export", "--ckpt", str(run_copy), "--format", "torch"]
    result = CliRunner().invoke(main, arguments, catch_exceptions=False)
    assert result.exit_code == 0, result.output
    assert result.stdout.splitlines()[0] == str(run_copy / "model.pt2")
    card = (run_copy / "MODEL_CARD.md").read_text()
    assert card.count("**not measured**") == 2
    assert "**subdensity**" in card
    assert "46 images of 16×16 pixels" in card
    assert str(image_folder) not in card
    extra = {"pyro_vje": ""}
    torch.export.load(run_copy / "model.pt2", extra_files=extra)
    assert json.loads(extra["pyro_vje"])["score"]["num_particles"] == 16
    assert str(image_folder) not in extra["pyro_vje"]

    found = evaluate(run_copy, k=5)
    auroc = score(run_copy).auroc
    export(run_copy, format="torch", score_likelihood="polar-student-t-exact")
    card = (run_copy / "MODEL_CARD.md").read_text()
    assert f"{found['rows'][0]['knn']:.4f}" in card
    assert "k 5, temperature 0.1" in card
    assert f"- auroc: {auroc}\n" in card
    assert "6 normal images and 12 anomalies" in card
    assert "**not measured**" not in card
    assert "**subdensity**" not in card
    # what was scored with other weights is not this model's
    summary = json.loads((run_copy / "scores_summary.json").read_text())
    (run_copy / "scores_summary.json").write_text(json.dumps({**summary, "weights_sha256": "0"}))
    judge = prepare(load_run(run_copy), ScoreConfig(score="knn"))
    card = exporting.model_card(judge, {}, file="model", format="onnx")
    assert 'onnxruntime.InferenceSession("model")' in card
    assert "Detection of anomalies: **not measured**" in card
