"""p-values: valid by folds as by held-out images, calibrated anew by name, and refused where they decide nothing."""

import copy
import json
import logging
import shutil

import numpy as np
import pytest
import torch
from torch import nn

from pyro_vje import VJE, calibrate, score
from pyro_vje.anomaly.judge import Calibration, cross_calibration, say_level
from pyro_vje.anomaly.parts import Scorer
from pyro_vje.model import encode_features

ALPHA, NEW, SEEDS = 0.1, 100, 25


@pytest.fixture(scope="module")
def head():
    """A function of training features to a head fitted to them, which centres and scales: no training takes place."""
    vje = VJE(nn.Identity(), 4, embedding_dim=4, hidden_dim=8).eval().requires_grad_(False)

    def fit(features):
        fitted = copy.copy(vje)
        fitted.project = lambda x: (x - features.mean(0)) / features.std(0)
        return fitted

    return fit


def false_alarms(head, score, images, folds):
    """Share of new normal images with a p-value of at most α, over draws of the training images and their folds."""
    shares = []
    for seed in range(SEEDS):
        generator = torch.Generator().manual_seed(seed)
        known, new = torch.randn(images + NEW, 4, generator=generator).split([images, NEW])
        fold = torch.randperm(images, generator=generator) % folds
        scorer = Scorer(head(known), num_particles=2)
        if folds == 1:  # half to fit, half to calibrate
            own = head(known[::2])
            scorer = Scorer(own, reference=encode_features(own, known[::2]), num_particles=2)
            own, found = (scorer.scores(score, encode_features(scorer.vje, x)).numpy() for x in (known[1::2], new))
            calibration, scores = Calibration([own]), found
        else:
            heads = [head(known[fold != k]) for k in range(folds)]
            calibration, scores = cross_calibration(score, fold, known, heads, scorer), np.full(NEW, np.nan)
        shares.append((calibration.p_values(scores, new) <= ALPHA).mean())
    return np.mean(shares)


@pytest.mark.parametrize(("score", "least"), [("mahalanobis", 0.07), ("knn", 0.03)])
def test_false_alarms_are_at_most_what_is_promised_and_not_far_below(head, score, least):
    images, folds = 40, 4
    bound = 2 * ALPHA + 2 * (1 - 1 / folds) / (images / folds + 1)
    by_folds = false_alarms(head, score, images, folds)
    assert least < by_folds < 0.13 < bound
    # calibrated on 39: 4 of 40 ranks are at most 0.1; the mean over 25 sets has a standard error of 0.01
    assert false_alarms(head, score, 78, 1) == pytest.approx(ALPHA, abs=0.03)


def test_each_fold_is_compared_by_the_head_that_has_not_seen_it(head):
    known, new = torch.randn(20, 4), torch.randn(3, 4)
    fold = torch.arange(20) % 2
    heads = [head(known[fold != k]) for k in range(2)]
    scorer = Scorer(head(known), num_particles=2)
    found = cross_calibration("mahalanobis", fold, known, heads, scorer).p_values(np.zeros(3), new)
    expected = np.ones(3)
    for k, own in enumerate(heads):
        knower = Scorer(own, reference=encode_features(own, known[fold != k]), num_particles=2)
        normal, strange = (knower.scores("mahalanobis", encode_features(own, x)) for x in (known[fold == k], new))
        expected += (normal >= strange[:, None]).sum(1).numpy()
    np.testing.assert_array_equal(found, expected / 21)


def test_a_calibration_is_called_by_its_name(trained_run, image_folder, tmp_path):
    run, out = shutil.copytree(trained_run, tmp_path / "run"), tmp_path / "s.csv"
    camera = shutil.copytree(image_folder / "train" / "normal", tmp_path / "camera")
    path, images = calibrate(run, camera, "camera 2")
    assert (images, path.parent) == (16, run)
    own, other = (score(run, out=out, calibration=name) for name in (None, "camera 2"))
    assert json.loads(other.summary.read_text())["calibration"]["images"] == 16
    assert other.settings.calibration == "camera 2"
    assert own.settings.calibration is None
    assert score(run, out=out, alpha=0.1, calibration="camera 2").flagged is not None
    with pytest.raises(ValueError, match=r"no calibration 'camera 3'.*one of camera 2"):
        score(run, out=out, calibration="camera 3")
    with pytest.raises(ValueError, match=r"plain name, not '\.\./x'"):
        calibrate(run, camera, "../x")
    with pytest.raises(ValueError, match=r"trained on \d+ of the 16 images .*: give others"):
        calibrate(run, image_folder / "train" / "normal")
    with pytest.raises(ValueError, match="weights file"):
        calibrate(run / "weights.safetensors", image_folder)


def test_a_level_that_no_image_can_meet_is_an_error_that_says_how_many_images_do(trained_run, tmp_path, caplog):
    for rule in ("alpha", "fdr"):
        with pytest.raises(ValueError, match=rf"at {rule} 0\.01: calibrate with 99 or more .*, or raise the level"):
            say_level(98, 10, **{"alpha": None, "fdr": None, rule: 0.01})
        with pytest.raises(ValueError, match=rf"at {rule} 0\.1: calibrate with 9 or more"):
            score(trained_run, out=tmp_path / "s.csv", **{rule: 0.1})  # 2 held-out images
    say_level(99, 10, 0.01, None)
    with caplog.at_level(logging.WARNING, "pyro_vje"):
        say_level(99, 100, None, 0.1)
    assert "fewer than 10 strange ones cannot be called" in caplog.text
