import json

import numpy as np
import pytest
import torch
from scipy.spatial.distance import pdist
from scipy.stats import entropy
from sklearn.exceptions import ConvergenceWarning
from sklearn.linear_model import LogisticRegression
from sklearn.neighbors import KNeighborsClassifier
from sklearn.preprocessing import StandardScaler

from pyro_vje import metrics
from pyro_vje.metrics import representation


@pytest.fixture
def rng():
    return np.random.default_rng(0)


def clusters(rng, count, dim=8, classes=5, noise=1.5):
    labels = rng.integers(classes, size=count)
    centres = np.random.default_rng(99).normal(size=(classes, dim))
    return (centres[labels] + noise * rng.normal(size=(count, dim))).astype(np.float32), labels


def naive_knn(train, labels, test, k, temperature):
    """Votes by loops; of equal similarities the first training image, of equal votes the lowest class."""
    train = train / np.linalg.norm(train, axis=1, keepdims=True)
    test = test / np.linalg.norm(test, axis=1, keepdims=True)
    predicted = []
    for image in test:
        similarity = train @ image
        nearest = sorted(range(len(train)), key=lambda i: (-similarity[i], i))[:k]
        votes = np.zeros(labels.max() + 1)
        for i in nearest:
            votes[labels[i]] += np.exp(similarity[i] / temperature)
        predicted.append(int(votes.argmax()))
    return np.array(predicted)


class TestKnn:
    def test_naive_reference(self, rng):
        train, labels = clusters(rng, 60)
        test, _ = clusters(rng, 40)
        train, test = train.astype(np.float64), test.astype(np.float64)
        for k, temperature in [(1, 1.0), (7, 0.05), (60, 0.05), (60, 1.0)]:
            predicted = metrics.knn_predict(train, labels, test, k=k, temperature=temperature)
            assert predicted.tolist() == naive_knn(train, labels, test, k, temperature).tolist()

    def test_scikit_learn(self, rng):
        train, labels = clusters(rng, 500)
        test, truth = clusters(rng, 300)
        reference = KNeighborsClassifier(
            20, metric="cosine", algorithm="brute", weights=lambda d: np.exp((1 - d) / 0.1)
        ).fit(train, labels)
        expected = reference.predict(test)
        assert metrics.knn_predict(train, labels, test, k=20).tolist() == expected.tolist()
        (result,) = metrics.knn_sweep(train, labels, test, truth, ks=[20], temperatures=[0.1])
        assert result["accuracy"] == pytest.approx((expected == truth).mean())
        assert 0.4 < result["accuracy"] < 0.95, "the problem must be neither trivial nor impossible"

    def test_blocks_do_not_matter(self, rng, monkeypatch):
        train, labels = clusters(rng, 50)
        test, _ = clusters(rng, 33)
        whole = metrics.knn_predict(train, labels, test, k=5)
        monkeypatch.setattr(representation, "BLOCK_ENTRIES", 4 * 50)
        assert torch.equal(metrics.knn_predict(train, labels, test, k=5), whole)

    def test_k_larger_than_training_set_is_reported(self, rng):
        train, labels = clusters(rng, 30)
        (result,) = metrics.knn_sweep(train, labels, train, labels, ks=[200], temperatures=[0.1])
        assert result["k"] == 30
        assert (result["train_images"], result["test_images"], result["temperature"]) == (30, 30, 0.1)
        assert json.loads(json.dumps(result)) == result

    def test_ties_go_to_first_images_and_lowest_class(self):
        # All similarities are equal: the first three images decide, two of them of class 2.
        train = torch.ones(1000, 4)
        labels = torch.full((1000,), 1)
        labels[:3] = torch.tensor([2, 0, 2])
        test = torch.ones(5, 4)
        assert metrics.knn_predict(train, labels, test, k=3).tolist() == [2] * 5
        assert metrics.knn_predict(train, labels, test, k=2).tolist() == [0] * 5

    def test_ties_behind_nearer_images(self):
        train = torch.tensor([[1.0, 1], [1, 1], [1, 0], [1, 1], [1, 1]])
        labels = torch.tensor([3, 1, 0, 2, 2])
        index = representation._top_k(torch.tensor([[0.5, 0.5, 1.0, 0.5, 0.5]]), 3)
        assert index.tolist() == [[2, 0, 1]]
        # Class 0 is nearest but outvoted at a high temperature only if both images of class 2 were taken.
        assert metrics.knn_predict(train, labels, torch.tensor([[1.0, 0]]), k=3, temperature=100.0).tolist() == [0]

    def test_sweep_is_separate_calls(self, rng):
        # Coarse features, so that many similarities are equal, also at the smaller k.
        train, labels = (values[:90] for values in clusters(rng, 120, dim=2))
        test, truth = clusters(rng, 70, dim=2)
        data = train.round(), labels, test.round(), truth
        swept = metrics.knn_sweep(*data, ks=[40, 1, 500, 6], temperatures=[0.1, 5.0])
        separate = [
            (metrics.knn_predict(*data[:3], k, t).numpy() == truth).mean() for k in (40, 1, 500, 6) for t in (0.1, 5.0)
        ]
        assert [result["accuracy"] for result in swept] == separate
        assert [result["temperature"] for result in swept] == [0.1, 5.0] * 4
        assert [result["k"] for result in swept[::2]] == [40, 1, 90, 6]
        assert len({result["accuracy"] for result in swept}) > 3
        with pytest.raises(ValueError, match="at least one k and one temperature"):
            metrics.knn_sweep(*data, ks=[5], temperatures=[])

    def test_small_temperature_overflows_nothing(self, rng):
        train, labels = clusters(rng, 60)
        nearest = metrics.knn_predict(train, labels, train, k=60, temperature=1e-6)
        assert nearest.tolist() == labels.tolist()

    def test_read_only_and_half_precision(self, rng):
        train, labels = clusters(rng, 40, noise=0.3)
        train.flags.writeable = False
        expected = metrics.knn_predict(train, labels, train[::-1], k=3)
        half = torch.tensor(train.tolist(), dtype=torch.bfloat16)
        assert torch.equal(metrics.knn_predict(half, labels, half.flip(0), k=3), expected)

    def test_bad_input(self):
        cases = [
            ({"k": 0}, "k must be at least 1, got 0"),
            ({"temperature": 0.0}, "temperature must be positive, got 0.0"),
            ({"train_features": torch.full((4, 2), torch.nan)}, "train_features has NaN"),
            (
                {"test_features": torch.zeros(3, 5)},
                r"train_features has shape \(4, 2\), test_features has shape \(3, 5\)",
            ),
            ({"test_features": torch.zeros(0, 2)}, "test_features has 0 rows"),
            ({"train_features": torch.zeros(4)}, r"must be a matrix \(N, D\)"),
            ({"train_labels": torch.tensor([0, 1, -1, -1])}, "train_labels holds 2 negative labels"),
            ({"train_labels": torch.tensor([0, 1])}, "train_labels must be 4 integers"),
            ({"train_labels": torch.tensor([0.0, 1, 1, 0])}, "train_labels must be 4 integers"),
            ({"test_labels": torch.tensor([0, -1, 1])}, "test_labels holds 1 negative"),
        ]
        for change, message in cases:
            good = {
                "train_features": torch.eye(4)[:, :2] + 1,
                "train_labels": torch.tensor([0, 1, 0, 1]),
                "test_features": torch.ones(3, 2),
                "test_labels": torch.tensor([0, 1, 0]),
            }
            settings = {"ks": [change.pop("k", 3)], "temperatures": [change.pop("temperature", 0.1)]}
            assert metrics.knn_sweep(*good.values(), ks=[9], temperatures=[1.0])[0]["k"] == 4
            with pytest.raises(ValueError, match=message):
                metrics.knn_sweep(*(good | change).values(), **settings)


class TestLinearProbe:
    def test_scikit_learn(self, rng):
        train, labels = clusters(rng, 400)
        test, truth = clusters(rng, 300)
        scaler = StandardScaler().fit(train)
        reference = LogisticRegression(C=1 / (0.01 * 400), max_iter=1000).fit(scaler.transform(train), labels)
        result = metrics.linear_probe(torch.from_numpy(train), labels, test, truth)
        assert result["accuracy"] == pytest.approx(reference.score(scaler.transform(test), truth), abs=0.004)
        assert result["converged"]
        assert (result["l2"], result["standardised"], result["train_images"]) == (0.01, True, 400)
        assert json.loads(json.dumps(result)) == result

    def test_objective_is_stationary(self, rng, monkeypatch):
        # The penalty is what the docstring says: the gradient of mean cross-entropy + 0.005 ‖W‖² vanishes.
        features, labels = clusters(rng, 300)
        features = features.astype(np.float64)
        features = StandardScaler().fit_transform(features)
        fitted = []
        fit = LogisticRegression.fit
        monkeypatch.setattr(LogisticRegression, "fit", lambda self, *data: fitted.append(fit(self, *data)) or self)
        converged = metrics.linear_probe(features, labels, features, labels)["converged"]
        (probe,) = fitted
        weight = torch.tensor(probe.coef_, requires_grad=True)
        logits = torch.from_numpy(features) @ weight.T + torch.tensor(probe.intercept_)
        loss = torch.nn.functional.cross_entropy(logits, torch.from_numpy(labels)) + 0.005 * weight.square().sum()
        loss.backward()
        assert converged
        assert weight.grad.abs().max() < 1e-3 < weight.detach().abs().max()

    def test_scale_of_features_does_not_matter(self, rng):
        train, labels = clusters(rng, 300)
        test, truth = clusters(rng, 300)
        scale = np.float32(10.0) ** np.arange(-4, 4, dtype=np.float32)
        plain = metrics.linear_probe(train, labels, test, truth)
        assert metrics.linear_probe(train * scale + 3, labels, test * scale + 3, truth)["accuracy"] == pytest.approx(
            plain["accuracy"], abs=0.01
        )

    def test_constant_feature(self, rng):
        train, labels = clusters(rng, 100)
        train[:, 0] = 7
        assert metrics.linear_probe(train, labels, train, labels)["accuracy"] > 0.5

    def test_unconverged_is_reported(self, rng, monkeypatch):
        train, labels = clusters(rng, 200)
        monkeypatch.setattr(representation, "MAX_ITER", 2)
        with pytest.warns(ConvergenceWarning, match="failed to converge after 2 iteration"):
            result = metrics.linear_probe(train, labels, train, labels)
        assert not result["converged"]

    def test_bad_input(self, rng):
        train, labels = clusters(rng, 20)
        with pytest.raises(ValueError, match="needs two classes, but all training labels are 3"):
            metrics.linear_probe(train, np.full(20, 3), train, labels)
        with pytest.raises(ValueError, match="test_labels holds 20 negative"):
            metrics.linear_probe(train, labels, train, np.full(20, -1))


class TestHealth:
    def test_effective_rank_reference(self, rng):
        for shape in [(200, 12), (12, 200), (5000, 4)]:
            features = rng.normal(size=shape) * np.geomspace(1, 0.01, shape[1])
            singular = np.linalg.svd(features, compute_uv=False)
            assert metrics.effective_rank(features) == pytest.approx(np.exp(entropy(singular)), rel=1e-6)

    def test_effective_rank_limits(self, rng):
        orthogonal = np.linalg.qr(rng.normal(size=(50, 20)))[0]
        assert metrics.effective_rank(orthogonal) == pytest.approx(20)
        assert metrics.effective_rank(3 * np.ones((100, 20))) == pytest.approx(1, abs=1e-4)
        low_rank = rng.normal(size=(5000, 3)) @ rng.normal(size=(3, 64))
        assert metrics.effective_rank(low_rank.astype(np.float32)) < 3.01
        assert metrics.effective_rank(np.zeros((5, 3))) == 0
        assert metrics.effective_rank(np.ones((1, 3))) == pytest.approx(1)

    def test_spread(self, rng):
        embeddings = rng.normal(size=(4000, 64))
        assert metrics.embedding_spread(embeddings) == pytest.approx(1, abs=0.01)
        assert metrics.embedding_spread(embeddings * rng.uniform(1, 9, size=(4000, 1))) == pytest.approx(1, abs=0.01)
        assert metrics.embedding_spread(np.ones((100, 64)) * 5) == pytest.approx(0, abs=1e-6)
        # A quarter of the features varies; three quarters of the squared length are common (see MIN_SPREAD).
        quarter = np.where(np.arange(64) < 16, embeddings, 0)
        assert metrics.embedding_spread(quarter) == pytest.approx(0.5, abs=0.01)
        common = embeddings + np.sqrt(3)
        assert metrics.embedding_spread(common) == pytest.approx(0.5, abs=0.02)

    def test_alignment(self, rng):
        x, y = rng.normal(size=(50, 8)), rng.normal(size=(50, 8))
        unit_x, unit_y = (v / np.linalg.norm(v, axis=1, keepdims=True) for v in (x, y))
        distance = np.linalg.norm(unit_x - unit_y, axis=1)
        assert metrics.alignment(x, 3 * y) == pytest.approx((distance**2).mean())
        assert metrics.alignment(x, 2 * x) == pytest.approx(0, abs=1e-12)

    def test_uniformity(self, rng, monkeypatch):
        x = rng.normal(size=(60, 8)) + 0.5
        unit = x / np.linalg.norm(x, axis=1, keepdims=True)
        expected = np.log(np.exp(-2 * pdist(unit, "sqeuclidean")).mean())
        assert metrics.uniformity(x) == pytest.approx(expected)
        monkeypatch.setattr(representation, "BLOCK_ENTRIES", 7 * 60)
        assert metrics.uniformity(x) == pytest.approx(expected)
        assert metrics.uniformity(np.ones((10, 4))) == pytest.approx(0, abs=1e-12)

    def test_posterior_snr(self):
        loc = torch.tensor([[3.0, 4], [0, 0]])
        scale = torch.tensor([[0.6, 0.8], [1, 1]])
        # rms over the images, then the median of sqrt(4.5 / 0.68) and sqrt(8 / 0.82): of two the lower one.
        assert metrics.posterior_snr(loc, scale) == pytest.approx((4.5 / 0.68) ** 0.5)

    def test_posterior_snr_is_not_fooled_by_two_features(self, rng):
        loc, scale = rng.normal(size=(200, 128)), np.full((200, 128), 0.4)
        before = metrics.posterior_snr(loc, scale)
        assert before == pytest.approx(2.5, rel=0.05)
        noisy, strong = scale.copy(), loc.copy()
        noisy[:, :2], strong[:, :2] = 8.0, 1e4
        assert metrics.posterior_snr(loc, noisy) == pytest.approx(before, rel=0.01)
        assert metrics.posterior_snr(strong, scale) == pytest.approx(before, rel=0.01)

    def test_bad_input(self):
        cases = [
            (lambda: metrics.effective_rank(np.zeros((0, 3))), "features has 0 rows"),
            (lambda: metrics.effective_rank(np.full((2, 2), np.nan)), "NaN or infinite"),
            (lambda: metrics.embedding_spread(np.ones((1, 3))), "1 rows; at least 2"),
            (lambda: metrics.uniformity(np.ones((1, 3))), "1 rows; at least 2"),
            (lambda: metrics.alignment(np.ones((2, 3)), np.ones((3, 3))), r"first has shape \(2, 3\)"),
            (lambda: metrics.posterior_snr(np.ones((2, 3)), np.zeros((2, 3))), "scale must be positive"),
            (lambda: metrics.posterior_snr(np.ones((2, 3)), np.ones((2, 1))), "loc has shape"),
        ]
        for call, message in cases:
            with pytest.raises(ValueError, match=message):
                call()

    def test_signs_of_ill_health_are_told_apart(self):
        assert metrics.unhealthy(60.0, 0.98, 2.0, 128) == {}
        assert "(spread 0.10, healthy from 0.5)" in metrics.unhealthy(60.0, 0.1, 2.0, 128)["spread"]
        # A noisy posterior is another ailment than a collapsed representation, and has another cure.
        (noisy,) = metrics.unhealthy(60.0, 0.98, 0.5, 128).values()
        assert "0.50, healthy from 0.7)" in noisy
        assert "lower kl_weight" in noisy
        assert "collaps" not in noisy
        assert "lower lr" not in noisy
        (narrow,) = metrics.unhealthy(1.3, 0.98, 2.0, 128).values()
        assert "effective rank 1.3 of 128" in narrow
        assert "kl_weight" not in narrow
        assert set(metrics.unhealthy(1.0, 0.0, 0.0, 128)) == {"effective_rank", "spread", "posterior_snr"}
        assert set(metrics.unhealthy(60.0, float("nan"), 2.0, 128)) == {"spread"}

    def test_collapsed_embeddings_are_found(self, rng):
        collapsed = 1 + 0.01 * rng.normal(size=(500, 128))
        healthy = rng.normal(size=(500, 128))
        for embeddings, warned in [(collapsed, True), (healthy, False)]:
            rank, spread = metrics.effective_rank(embeddings), metrics.embedding_spread(embeddings)
            assert bool(metrics.unhealthy(rank, spread, 3.0, 128)) == warned
