import numpy as np
import pytest
import torch
from sklearn.metrics import roc_auc_score

from pyro_vje import metrics


@pytest.fixture
def rng():
    return np.random.default_rng(0)


class TestUncertainty:
    def test_rejection_curve_by_hand(self):
        curve = metrics.rejection_curve(np.array([True, False, True, False]), np.array([0.1, 0.9, 0.2, 0.3]))
        assert curve.rejected == pytest.approx([0, 0.25, 0.5, 0.75])
        assert curve.accuracy == pytest.approx([0.5, 2 / 3, 1, 1])
        assert curve.area == pytest.approx((0.5 + 2 / 3 + 2) / 4)

    def test_ties_are_rejected_in_random_order(self, rng):
        correct, uncertainty = rng.random(30) < 0.6, rng.integers(4, size=30)
        curve = metrics.rejection_curve(correct, uncertainty)
        draws = []
        for _ in range(4000):
            order = np.lexsort((rng.random(30), uncertainty))
            draws.append((correct[order].cumsum() / np.arange(1, 31))[::-1])
        assert curve.accuracy == pytest.approx(np.mean(draws, axis=0), abs=0.04)

    def test_constant_uncertainty_is_flat(self):
        curve = metrics.rejection_curve(torch.tensor([True, False, False, True, True]), torch.zeros(5))
        assert curve.accuracy == pytest.approx([0.6] * 5)
        assert curve.area == pytest.approx(0.6)

    def test_rejection_bad_input(self):
        with pytest.raises(ValueError, match="correct must hold 2 booleans"):
            metrics.rejection_curve(np.array([True]), np.zeros(2))
        with pytest.raises(ValueError, match="uncertainty are NaN"):
            metrics.rejection_curve(np.array([True]), np.array([np.nan]))

    def test_r_auroc(self, rng):
        correct = rng.random(200) < 0.7
        uncertainty = (~correct + rng.normal(size=200)).round(1)  # with ties
        expected = roc_auc_score(~correct, uncertainty)
        assert 0.6 < expected < 0.95
        assert metrics.r_auroc(torch.from_numpy(correct), uncertainty) == pytest.approx(expected)
        assert metrics.r_auroc(correct, np.zeros(200)) == 0.5

    def test_r_auroc_bad_input(self):
        with pytest.raises(ValueError, match="never fails"):
            metrics.r_auroc(np.ones(4, dtype=bool), torch.rand(4))
        with pytest.raises(ValueError, match="always fails"):
            metrics.r_auroc(np.zeros(4, dtype=bool), torch.rand(4))
        with pytest.raises(ValueError, match="4 booleans"):
            metrics.r_auroc(np.array([0, 1, 2, 0]), torch.rand(4))
