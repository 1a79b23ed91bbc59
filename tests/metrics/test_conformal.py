import numpy as np
import pytest
import torch
from scipy.stats import binom

from pyro_vje.metrics.detection import benjamini_hochberg, conformal_p_values


@pytest.fixture
def rng():
    return np.random.default_rng(0)


class TestConformalPValues:
    def test_by_hand_with_ties(self):
        # Ties count against the image: 2.0 has three calibration scores at or above it.
        p = conformal_p_values(np.array([0.0, 2.0, 2.5, 9.0]), np.array([3.0, 1.0, 2.0, 2.0]))
        assert p == pytest.approx([1, 4 / 5, 2 / 5, 1 / 5])
        assert p.dtype == np.float64

    def test_naive_reference(self, rng):
        scores, calibration = rng.normal(size=50).round(1), rng.normal(size=37).round(1)
        expected = [(1 + sum(c >= s for c in calibration)) / 38 for s in scores]
        for order in (calibration, calibration[::-1]):
            assert conformal_p_values(torch.from_numpy(scores), order) == pytest.approx(expected, abs=0)

    @pytest.mark.parametrize("ties", [False, True])
    @pytest.mark.parametrize("calibration_images", [19, 200])
    def test_coverage(self, rng, ties, calibration_images):
        # Calibration and test drawn anew each time: each draw gives one independent p-value.
        draws = 10_000
        data = rng.standard_t(3, size=(draws, calibration_images + 1))
        data = data.round(0) if ties else data
        p = np.array([conformal_p_values(row[:1], row[1:])[0] for row in data])
        for alpha in (0.05, 0.1, 0.5):
            most = binom.ppf(0.999, draws, alpha) / draws
            assert (p <= alpha).mean() <= most
            if not ties:
                # Exact without ties, as alpha · (n + 1) is an integer or nearly so: not merely conservative.
                exact = np.floor(alpha * (calibration_images + 1) + 1e-9) / (calibration_images + 1)
                assert (p <= alpha).mean() >= binom.ppf(0.001, draws, exact) / draws

    def test_coverage_fails_without_exchangeability(self, rng):
        # Scores of training images are too low, as of an overfitted model: the guarantee is void, and this shows it.
        p = conformal_p_values(rng.normal(1.0, 1.0, size=5000), rng.normal(0.0, 1.0, size=5000))
        assert (p <= 0.05).mean() > 0.2

    def test_smallest_p_value(self):
        assert conformal_p_values(np.array([1e9]), np.zeros(99))[0] == 0.01

    def test_bad_input(self):
        cases = [
            ([], [1.0], "scores is empty"),
            ([1.0], [], "calibration_scores is empty"),
            ([np.nan], [1.0], "1 of the 1 values of scores are NaN or infinite"),
            ([1.0], [1.0, np.inf], "1 of the 2 values of calibration_scores are NaN or infinite"),
            ([[1.0]], [1.0], r"scores must be a vector \(N,\), got shape \(1, 1\)"),
        ]
        for scores, calibration, message in cases:
            with pytest.raises(ValueError, match=message):
                conformal_p_values(np.array(scores), np.array(calibration))


class TestBenjaminiHochberg:
    @pytest.mark.parametrize("fdr", [0.01, 0.1, 0.3])
    def test_naive_reference(self, rng, fdr):
        for _ in range(50):
            p = np.concatenate([rng.random(40), rng.random(20) ** 6]).round(3)
            limits = [value for k, value in enumerate(sorted(p), 1) if value <= fdr * k / 60 * (1 + 1e-12)]
            assert (benjamini_hochberg(p, fdr) == (p <= max(limits, default=-1))).all()

    def test_step_up(self):
        # 0.04 alone misses its own threshold 0.0333, and is selected because 0.05 makes the last one.
        assert benjamini_hochberg(np.array([0.05, 0.01, 0.04]), 0.05).tolist() == [True, True, True]
        assert benjamini_hochberg(np.array([0.06, 0.01, 0.04]), 0.05).tolist() == [False, True, False]
        assert benjamini_hochberg(np.array([0.5, 0.9]), 0.05).tolist() == [False, False]

    def test_rounding_does_not_decide(self):
        # Every p-value equals its limit fdr · k / N in exact arithmetic; 0.3 · 5 / 50 is above 0.03 in floats or not.
        for count in range(1, 200):
            p = 0.3 * np.arange(1, count + 1)[::-1] / count
            p[0] = 3 * count / (10 * count)
            assert benjamini_hochberg(p, 0.3).all()
            assert not benjamini_hochberg(p + 1e-9, 0.3).any()

    def test_false_discovery_rate_with_conformal_p_values(self, rng):
        # 80 normal images and 20 anomalies share one calibration set in each trial.
        shares, power = [], []
        is_anomaly = np.arange(100) >= 80
        for _ in range(1000):
            scores = rng.normal(size=100) + 4 * is_anomaly
            selected = benjamini_hochberg(conformal_p_values(scores, rng.normal(size=500)), 0.2)
            shares.append((selected & ~is_anomaly).sum() / max(1, selected.sum()))
            power.append((selected & is_anomaly).sum() / 20)
        error = np.std(shares) / np.sqrt(1000)
        # Benjamini & Hochberg's rate is fdr times the share of normal images.
        assert 0.8 * 0.2 - 4 * error < np.mean(shares) < 0.2
        assert np.mean(power) > 0.9

    def test_bad_input(self):
        cases = [
            ([], 0.1, "p_values is empty"),
            ([0.1, np.nan], 0.1, "NaN or infinite"),
            ([0.1, 1.5], 0.1, r"must lie in \[0, 1\], got 0.1 to 1.5"),
            ([0.1], 0.0, "fdr must lie between 0 and 1, got 0.0"),
            ([0.1], 5, "fdr must lie between 0 and 1, got 5"),
        ]
        for p_values, fdr, message in cases:
            with pytest.raises(ValueError, match=message):
                benjamini_hochberg(np.array(p_values), fdr)
