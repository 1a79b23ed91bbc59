"""Scores against their definitions: loops over log-probabilities, scikit-learn, closed forms."""

import dataclasses
import math
import subprocess
import sys

import numpy as np
import pytest
import torch
from scipy.stats import spearmanr
from sklearn.covariance import LedoitWolf
from sklearn.neighbors import KernelDensity, NearestNeighbors

from pyro_vje import VJE, load_run, train
from pyro_vje.anomaly import detectors
from pyro_vje.anomaly.judge import make_scorer
from pyro_vje.anomaly.parts import LikelihoodParts, Scorer
from pyro_vje.anomaly.scores import SCORES, Score, get_score
from pyro_vje.config import ScoreConfig
from pyro_vje.data import ImageSet, decode_image
from pyro_vje.model import encoding
from pyro_vje.model.encoding import Encoded, encode
from pyro_vje.model.likelihoods import get_family
from pyro_vje.runs.folder import REFERENCE, load_posteriors, load_split


@pytest.fixture(scope="module")
def run(trained_run):
    return load_run(trained_run)


@pytest.fixture(scope="module")
def encoded(run):
    return encode(run.vje, load_split(run, "test", None, None), run.info.view)


@pytest.fixture(scope="module")
def reference(run):
    return load_posteriors(run, REFERENCE)


def test_parts_are_the_expectation_they_claim_to_be(run, encoded):
    many = Scorer(run.vje, num_particles=2_000, seed=1).parts(encoded)
    few = Scorer(run.vje, num_particles=64, seed=0).parts(encoded)
    with torch.no_grad():
        z = encoded.loc + encoded.scale * torch.randn(2_000, *encoded.loc.shape)
        samples = run.vje.likelihood(z, encoded.scale.expand_as(z)).log_prob(encoded.embeddings).double()
    error = samples.std(0) / math.sqrt(2_000)
    assert ((many.log_likelihood - samples.mean(0)).abs() < 6 * error).all()
    assert torch.corrcoef(torch.stack([few.log_likelihood, many.log_likelihood]))[0, 1] > 0.95
    # the likelihood is its two factors and the Jacobian
    jacobian = (run.vje.embedding_dim - 1) * encoded.embeddings.norm(dim=-1).log()
    torch.testing.assert_close(
        many.log_likelihood, many.log_direction + many.log_radius - jacobian.double(), rtol=1e-5, atol=1e-4
    )


def test_the_elbo_has_the_trained_weight(run, encoded):
    assert run.info.config.kl_weight not in (0, 1)
    scorer = make_scorer(run, ScoreConfig())
    posterior = torch.distributions.Normal(encoded.loc, encoded.scale)
    kl = torch.distributions.kl_divergence(posterior, torch.distributions.Normal(0.0, 1.0)).sum(-1)
    expected = run.info.config.kl_weight * kl - scorer.parts(encoded).log_likelihood
    torch.testing.assert_close(scorer.scores("elbo", encoded), expected.double(), rtol=1e-5, atol=1e-4)


def test_the_pivot_is_what_the_directional_factor_is_a_function_of(run, encoded):
    found = Scorer(run.vje).scores("pivot", encoded)
    radius = math.sqrt(8)  # of the sphere of directions, √D
    for i, (t, loc, scale) in enumerate(zip(*(x.double() for x in encoded[:3]), strict=True)):
        u, m = radius * t / t.norm(), radius * loc / loc.norm()
        assert found[i].item() == pytest.approx((((u - m) / scale) ** 2).sum().item(), rel=1e-5)
        likelihood = run.vje.likelihood(encoded.loc[i], encoded.scale[i])
        n, df = (8 + run.vje.settings.df) / 2, run.vje.settings.df
        at_mode = likelihood.log_prob_direction(encoded.loc[i]).item()
        direction = at_mode - n * math.log1p(found[i].item() / df)
        assert likelihood.log_prob_direction(encoded.embeddings[i]).item() == pytest.approx(direction, abs=1e-3)


@pytest.mark.parametrize("family", ["polar-student-t", "polar-student-t-exact", "normal", "laplace"])
def test_aggregate_is_the_log_mean_over_kernels_at_the_reference_embeddings(run, encoded, reference, family):
    with torch.no_grad():
        each = [
            run.vje.likelihood(e, scale, family=get_family(family)).log_prob(encoded.embeddings)
            for e, scale in zip(reference.embeddings, reference.scale, strict=True)
        ]
    expected = torch.stack(each).double().logsumexp(0) - math.log(46)
    scorer = Scorer(run.vje, reference=reference, likelihood=family)
    torch.testing.assert_close(-scorer.scores("aggregate", encoded), expected, rtol=1e-5, atol=1e-4)
    torch.testing.assert_close(scorer.log_aggregate(encoded.embeddings, chunk=7), expected, rtol=1e-5, atol=1e-4)


def test_aggregate_of_equal_gaussian_kernels_is_scikit_learns_kernel_density(run, encoded, reference):
    equal = reference._replace(scale=torch.full_like(reference.scale, 0.7))
    found = Scorer(run.vje, reference=equal, likelihood="normal").log_aggregate(encoded.embeddings)
    kde = KernelDensity(bandwidth=0.7).fit(reference.embeddings.numpy())
    np.testing.assert_allclose(found, kde.score_samples(encoded.embeddings.numpy()), rtol=1e-5)


def test_classical_scores_are_scikit_learns(run, encoded, reference):
    scorer = Scorer(run.vje, reference=reference)
    normal, test = reference.embeddings.double().numpy(), encoded.embeddings.double().numpy()
    expected = LedoitWolf().fit(normal).mahalanobis(test)
    np.testing.assert_allclose(scorer.scores("mahalanobis", encoded), expected, rtol=1e-6)
    nearest = NearestNeighbors(n_neighbors=5, metric="cosine").fit(normal).kneighbors(test)[0][:, -1]
    np.testing.assert_allclose(scorer.scores("knn", encoded), nearest, atol=1e-9)
    normal, test = (x / np.linalg.norm(x, axis=1, keepdims=True) for x in (normal, test))
    bandwidth = np.median(NearestNeighbors(n_neighbors=2).fit(normal).kneighbors(normal)[0][:, 1])
    expected = -KernelDensity(bandwidth=bandwidth).fit(normal).score_samples(test)
    np.testing.assert_allclose(scorer.scores("kde", encoded), expected, rtol=1e-6)
    alone = detectors.nearest_neighbour(reference.embeddings[:2])(encoded.embeddings)  # fewer than k
    both = 1 - torch.from_numpy(test @ normal[:2].T)
    torch.testing.assert_close(alone, both.max(1).values, atol=1e-6, rtol=0)
    assert detectors.kernel_density(reference.embeddings[:1])(encoded.embeddings).isfinite().all()


def test_typicality_is_the_distance_from_the_median_of_the_reference(run, encoded, reference):
    median = Scorer(run.vje).parts(reference).log_likelihood.median()
    found = Scorer(run.vje, reference=reference).scores("typicality", encoded)
    torch.testing.assert_close(found, (Scorer(run.vje).parts(encoded).log_likelihood - median).abs())


def test_without_noise_images_are_ranked_as_by_a_thousand_particles(tiny_config, tmp_path_factory):
    config = dataclasses.replace(tiny_config, projector="linear", embedding_dim=64)
    run = load_run(train(config, tmp_path_factory.mktemp("wide") / "run"))
    encoded = encode(run.vje, load_split(run, "all", None, None), run.info.view)
    for family in ("polar-student-t", "polar-normal", "student-t"):
        exact = Scorer(run.vje, num_particles=0, likelihood=family).parts(encoded)
        many = Scorer(run.vje, num_particles=1024, likelihood=family).parts(encoded)
        assert spearmanr(exact.log_likelihood, many.log_likelihood).statistic > 0.99
        if family != "student-t":
            assert spearmanr(exact.log_direction, many.log_direction).statistic > 0.99
        assert (exact.log_likelihood - many.log_likelihood).abs().max() < 0.1 * many.log_likelihood.std() + 3
    with pytest.raises(ValueError, match=r"closed form for the families polar-student-t.*--num-particles 16"):
        Scorer(run.vje, num_particles=0, likelihood="laplace").scores("conditional", encoded)


def nearness(parts: LikelihoodParts) -> torch.Tensor:
    """Squared length of the embedding.

    More of it.
    """
    return parts.encoded.embeddings.double().square().sum(-1)


def test_scores_of_ones_own(run, encoded, monkeypatch):
    found = get_score(f"{__name__}:nearness")
    assert found.description == "Squared length of the embedding"
    expected = encoded.embeddings.double().square().sum(-1)
    torch.testing.assert_close(Scorer(run.vje).scores(f"{__name__}:nearness", encoded), expected)
    monkeypatch.setattr(sys.modules[__name__], "nearness", Score("near", "nearness", nearness, True), raising=True)
    assert get_score(f"{__name__}:nearness").needs_reference
    with pytest.raises(ValueError, match=r"unknown score 'magic'.*conditional.*module:attribute"):
        get_score("magic")
    with pytest.raises(ValueError, match="must be a function"):
        get_score("math:pi")


def test_names_and_meanings_load_no_torch():
    code = "import sys; from pyro_vje.anomaly.scores import SCORES; assert SCORES and 'torch' not in sys.modules"
    assert subprocess.run([sys.executable, "-c", code]).returncode == 0


@pytest.mark.parametrize("bad", [math.nan, math.inf, -1.0])
def test_damaged_posteriors_are_refused(bad):
    embeddings, loc, scale = torch.ones(3, 5, 8)
    scale[1, 3] = bad
    vje = VJE(torch.nn.Identity(), 8, embedding_dim=8).eval()
    with pytest.raises(ValueError, match="of 1 of 5 images are not finite, or have a scale that is not"):
        Scorer(vje).parts(Encoded(embeddings, loc, scale))
    with pytest.raises(ValueError, match="of 5 of 5 images are not finite"):
        Scorer(vje).parts(Encoded(embeddings * bad * math.inf, loc, torch.ones(5, 8)))


@pytest.mark.parametrize("threads", [1, 3])
def test_scores_are_the_same_bits_in_any_order(wide_run, image_folder, threads, monkeypatch):
    monkeypatch.setattr(encoding, "cpu_rows", lambda side: 32)  # the set would else be a single pass
    before = torch.get_num_threads()
    torch.set_num_threads(threads)
    try:
        run = load_run(wide_run)
        scorer = Scorer(run.vje, reference=load_posteriors(run, REFERENCE), num_particles=2)
        names = sorted(image_folder.rglob("*.png"))
        whole = ImageSet(torch.stack([decode_image(str(p), 16) for p in names]), list(map(str, names)))

        def scores(order):
            found = encode(run.vje, whole.select(order), run.info.view, batch_size=40)
            return [scorer.scores(name, found) for name in ("aggregate", "elbo", "pivot", "mahalanobis", "knn")]

        order = torch.randperm(len(names))
        straight, mixed, alone = scores(torch.arange(len(names))), scores(order), scores(order[:5])
        for all_of_them, shuffled, few in zip(straight, mixed, alone, strict=True):
            assert torch.equal(shuffled, all_of_them[order])
            assert torch.equal(few, all_of_them[order[:5]])
    finally:
        torch.set_num_threads(before)


def test_every_entry_says_what_it_is():
    for name, score in SCORES.items():
        assert (name, bool(score.description)) == (score.name, True)
