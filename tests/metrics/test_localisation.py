"""Pixel metrics: against scikit-learn, and against a slow AUPRO that thresholds every map at every level."""

import numpy as np
import pytest
from scipy.ndimage import label
from sklearn.metrics import auc, average_precision_score, roc_auc_score

from pyro_vje.metrics.localisation import PixelCounts


def counted(maps, masks):
    counts = PixelCounts()
    for levels, mask in zip(maps, masks, strict=True):
        counts.add(levels, mask)
    return counts.metrics()


def slow_aupro(maps, masks, limit):
    """Bergmann et al. 2019 word by word: at each threshold the mean over regions of the share that is marked."""
    points = [(0.0, 0.0)]
    for threshold in sorted({int(x) for x in np.unique(maps)}, reverse=True):
        marked = maps >= threshold
        shares = []
        for found, mask in zip(marked, masks, strict=True):
            regions, count = label(mask, np.ones((3, 3)))
            shares += [found[regions == k].mean() for k in range(1, count + 1)]
        points.append((marked[~masks].mean(), np.mean(shares)))
    x, y = np.array(points).T
    fine = np.linspace(0, limit, 20_001)
    # the last of equal false-positive rates, as the curve rises straight up there
    return auc(fine, np.interp(fine, x, y)) / limit


@pytest.fixture
def pictures():
    rng = np.random.default_rng(0)
    masks = np.zeros((6, 16, 20), bool)
    masks[0, 2:5, 3:9] = masks[0, 5, 9] = masks[1, 0, 0] = masks[1, 8:16, 10:] = masks[2, 15, 3:6] = True
    maps = (rng.gamma(2.0, 40.0, masks.shape) + 60 * masks * rng.random(masks.shape)).astype(np.uint16)
    return maps, masks


def test_the_metrics_are_those_of_scikit_learn_and_of_the_slow_reference(pictures):
    maps, masks = pictures
    found = counted(maps, masks)
    truth, values = masks.ravel(), maps.ravel()
    assert found["pixel_auroc"] == pytest.approx(roc_auc_score(truth, values), abs=1e-12)
    assert found["pixel_average_precision"] == pytest.approx(average_precision_score(truth, values), abs=1e-12)
    assert found["aupro_30"] == pytest.approx(slow_aupro(maps, masks, 0.3), abs=1e-5)
    assert (found["pictures"], found["regions"]) == (6, 4)  # corners that touch are one region
    assert found["defective_pixels"] == masks.mean()


def test_perfect_and_blind_maps(pictures):
    _, masks = pictures
    perfect = counted(masks.astype(np.uint16) * 65535, masks)
    assert [perfect[x] for x in ("pixel_auroc", "aupro_30", "pixel_average_precision")] == pytest.approx([1] * 3)
    blind = counted(np.full(masks.shape, 7, np.uint16), masks)
    assert (blind["pixel_auroc"], blind["aupro_30"]) == (0.5, pytest.approx(0.15))


def test_what_cannot_be_counted(pictures):
    maps, masks = pictures
    assert counted(maps, np.zeros_like(masks)) is None
    for levels, mask in ((maps[0].astype(float), masks[0]), (maps[0, :8], masks[0]), (maps, masks)):
        with pytest.raises(ValueError, match=r"must be uint16 and of its mask's size"):
            PixelCounts().add(levels, mask)
