"""The scripts of examples/ run, on a tiny encoder and with few draws; ``make docs`` runs them as they are."""

import re
import runpy
import tempfile
from pathlib import Path

import matplotlib
import matplotlib.pyplot as plt
import pyro.infer
import pytest
from tiny import tiny_encoder

from pyro_vje.data import DATASETS
from pyro_vje.model import encoders

MCMC = pyro.infer.MCMC
EXAMPLES = sorted((Path(__file__).parents[1] / "examples").glob("[0-9]*.py"))
SHOWN = {
    "01": r"\d+ of 96 called anomalies; AUROC 0\.\d+\n(\d\.\d{6}  (anomaly|normal ) +new/.*\n){20}",
    "02": r"likelihood .*\n[- ]+\n__main__:contaminated .*\npolar-student-t .*\n(.*\n)*",
    "03": r"((trained encoder|untrained encoder|raw pixels) +k-NN [01]\.\d+  linear [01]\.\d+\n){3}",
    "04": r"((projected|power_spherical) +(SVI|NUTS) +-\d\.\d+ nats an hour\n){4}",
    "05": r"rejected: .*\naccuracy on all .*\n",
    "06": r"AUROC of images [01]\.\d+, of pixels [01]\.\d+\n\d+ of 32 images have a mark\n",
}


def few_draws(kernel, *, num_samples, warmup_steps, **options):
    return MCMC(kernel, num_samples=num_samples // 10, warmup_steps=warmup_steps // 10, **options)


@pytest.mark.parametrize("script", EXAMPLES, ids=lambda script: script.stem)
def test_example(script, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    monkeypatch.setitem(encoders.ENCODERS, "resnet-small", tiny_encoder)
    monkeypatch.setattr(pyro.infer, "MCMC", few_draws)
    before, backend = set(DATASETS), matplotlib.get_backend()
    matplotlib.use("agg")
    try:
        runpy.run_path(str(script), run_name="__main__")
    finally:
        plt.close("all")
        matplotlib.use(backend)
        for name in set(DATASETS) - before:
            del DATASETS[name]
    assert re.fullmatch(SHOWN[script.name[:2]], capsys.readouterr().out)


@pytest.mark.parametrize("script", EXAMPLES, ids=lambda script: script.stem)
def test_scripts_are_short(script):
    code = [line for line in script.read_text().splitlines() if line.strip() and not line.startswith("#")]
    assert len(code) < 60
