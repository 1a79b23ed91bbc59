import numpy as np
import pytest
import torch
from sklearn.metrics import average_precision_score, roc_auc_score

from pyro_vje import metrics


@pytest.fixture
def rng():
    return np.random.default_rng(0)


def scored(rng, normals=80, anomalies=30, ties=False):
    scores = np.concatenate([rng.normal(size=normals), rng.normal(1.0, size=anomalies)])
    labels = np.arange(normals + anomalies) >= normals
    return (scores.round(0) if ties else scores), labels


def brute_auroc(scores, labels):
    pairs = scores[labels][:, None] - scores[~labels][None]
    return ((pairs > 0) + 0.5 * (pairs == 0)).mean()


class TestScores:
    @pytest.mark.parametrize("ties", [False, True])
    def test_auroc(self, rng, ties):
        scores, labels = scored(rng, ties=ties)
        assert metrics.auroc(scores, labels) == pytest.approx(brute_auroc(scores, labels), abs=1e-12)
        # Log-likelihoods lie far outside [0, 1]; only their order counts.
        assert metrics.auroc(torch.from_numpy(5 * scores - 700), torch.from_numpy(labels)) == pytest.approx(
            roc_auc_score(labels, scores), abs=1e-12
        )
        assert metrics.auroc(-scores, labels) == pytest.approx(1 - metrics.auroc(scores, labels))

    @pytest.mark.parametrize("ties", [False, True])
    def test_aupr(self, rng, ties):
        scores, labels = scored(rng, ties=ties)
        assert metrics.aupr(scores, labels, positive="anomaly") == average_precision_score(labels, scores)
        assert metrics.aupr(scores, labels, positive="normal") == average_precision_score(~labels, -scores)
        assert metrics.aupr(scores, labels, positive="normal") > metrics.aupr(scores, labels, positive="anomaly")

    @pytest.mark.parametrize(("ties", "tpr"), [(False, 0.95), (True, 0.5), (True, 1.0)])
    def test_fpr_at_tpr(self, rng, ties, tpr):
        scores, labels = scored(rng, ties=ties)
        flagged = [scores >= threshold for threshold in scores]
        expected = min(flag[~labels].mean() for flag in flagged if flag[labels].mean() >= tpr)
        assert metrics.fpr_at_tpr(scores, labels, positive="anomaly", tpr=tpr) == pytest.approx(expected)
        accepted = [scores <= threshold for threshold in scores]
        expected = min(accept[labels].mean() for accept in accepted if accept[~labels].mean() >= tpr)
        assert metrics.fpr_at_tpr(scores, labels, positive="normal", tpr=tpr) == pytest.approx(expected)

    def test_conventions_differ(self):
        # One normal image is stranger than all anomalies: harmless to one convention, not to the other.
        scores, labels = np.array([0.0, 0, 0, 9, 1, 1, 1, 1]), np.arange(8) >= 4
        assert metrics.fpr_at_tpr(scores, labels, positive="anomaly") == 0.25
        assert metrics.fpr_at_tpr(scores, labels, positive="normal") == 1.0

    def test_perfect_and_constant(self):
        labels = np.array([False, False, True])
        assert metrics.auroc(np.array([1.0, 2, 3]), labels) == 1
        assert metrics.fpr_at_tpr(np.array([1.0, 2, 3]), labels, positive="normal") == 0
        constant = np.full(3, -512.0)
        assert metrics.auroc(constant, labels) == 0.5
        assert metrics.auroc_interval(np.zeros(4), np.arange(4) >= 2) == (0.5, 0.5)
        assert metrics.aupr(constant, labels, positive="anomaly") == pytest.approx(1 / 3)
        assert metrics.fpr_at_tpr(constant, labels, positive="anomaly") == 1

    def test_bad_input(self):
        cases = [
            ([], [], "scores is empty"),
            ([1.0, 2.0], [True], r"is_anomaly must hold 2 booleans .* got shape \(1,\)"),
            ([1.0, np.nan], [True, False], "1 of the 2 values of scores are NaN"),
            ([1.0, np.inf], [True, False], "NaN or infinite"),
            ([1.0, 2.0], [True, True], "all 2 images are anomalies"),
            ([1.0, 2.0], [False, False], "all 2 images are normal"),
            ([1.0, 2.0], [-1, 3], "2 booleans"),
            ([[1.0], [2.0]], [True, False], r"must be a vector \(N,\), got shape \(2, 1\)"),
        ]
        for scores, labels, message in cases:
            scores, labels = np.array(scores), np.array(labels)
            for metric in (
                metrics.auroc,
                metrics.auroc_interval,
                lambda s, a: metrics.aupr(s, a, positive="anomaly"),
                lambda s, a: metrics.fpr_at_tpr(s, a, positive="normal"),
            ):
                with pytest.raises(ValueError, match=message):
                    metric(scores, labels)

    def test_bad_settings(self, rng):
        scores, labels = scored(rng)
        with pytest.raises(ValueError, match="positive must be 'anomaly' or 'normal', got 'ood'"):
            metrics.aupr(scores, labels, positive="ood")
        with pytest.raises(ValueError, match="tpr must lie"):
            metrics.fpr_at_tpr(scores, labels, positive="normal", tpr=0.0)


def brute_delong(scores, labels):
    """Variance of the AUROC by the definition of DeLong et al. 1988: all pairs."""
    pairs = scores[labels][:, None] - scores[~labels][None]
    wins = (pairs > 0) + 0.5 * (pairs == 0)
    return sum(np.var(wins.mean(axis), ddof=1) / wins.shape[1 - axis] for axis in (0, 1))


class TestAurocInterval:
    @pytest.mark.parametrize("ties", [False, True])
    def test_definition_and_bootstrap(self, rng, ties):
        scores, labels = scored(rng, ties=ties)
        low, high = metrics.auroc_interval(scores, labels)
        centre, width = brute_auroc(scores, labels), 1.959964 * brute_delong(scores, labels) ** 0.5
        assert (low, high) == pytest.approx((centre - width, centre + width), abs=1e-6)
        draws = []
        for _ in range(1000):
            normals, anomalies = rng.choice(scores[~labels], size=80), rng.choice(scores[labels], size=30)
            draws.append(brute_auroc(np.concatenate([normals, anomalies]), labels))
        assert (low, high) == pytest.approx(np.quantile(draws, [0.025, 0.975]), abs=0.02)

    def test_coverage(self, rng):
        # Normal(1, 1) against Normal(0, 1): the true AUROC is Φ(1/√2) = 0.7602.
        hits = 0
        for _ in range(400):
            low, high = metrics.auroc_interval(*scored(rng, 100, 100))
            hits += low <= 0.7602 <= high
        assert 0.92 <= hits / 400 <= 0.98

    def test_within_0_and_1_and_one_image_says_nothing(self, rng):
        low, high = metrics.auroc_interval(np.array([0.0, 1, 2, 3, 2.5, 4]), np.arange(6) >= 4)
        assert 0 < low < 1 == high
        low, high = metrics.auroc_interval(np.array([0.0, 1, 2, 3, 0.5, -4]), np.arange(6) >= 4)
        assert low == 0 < high < 1
        assert metrics.auroc_interval(np.arange(6.0), np.arange(6) == 2) == (0, 1)

    def test_large(self, rng):
        scores, labels = scored(rng, 200_000, 200_000)
        low, high = metrics.auroc_interval(scores, labels)
        assert low < 0.7602 < high < low + 0.01

    def test_detection_metrics(self, rng):
        scores, labels = scored(rng)
        found = metrics.detection_metrics(torch.from_numpy(scores), labels)
        assert found["auroc_95"] == list(metrics.auroc_interval(scores, labels))
        assert found["auroc"] == metrics.auroc(scores, labels)
        for name, positive in (("anomalies", "anomaly"), ("normal", "normal")):
            assert found[f"aupr_{name}_positive"] == metrics.aupr(scores, labels, positive=positive)
            assert found[f"fpr_at_95_tpr_{name}_positive"] == metrics.fpr_at_tpr(scores, labels, positive=positive)
