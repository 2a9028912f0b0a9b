"""Scores that read pixels, each against an implementation of its formula that shares no code with it."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from scipy import integrate, linalg, optimize, stats
from sklearn.covariance import ledoit_wolf
from sklearn.linear_model import Ridge
from sklearn.neighbors import KNeighborsClassifier

from mtl_nnunet.errors import UserError
from mtl_nnunet.scores import SCORES
from mtl_nnunet.scores.ccfv import ccfv, wasserstein
from mtl_nnunet.scores.dice import dice_statistic
from mtl_nnunet.scores.gbc import gbc
from mtl_nnunet.scores.gbc import statistic as gbc_statistic
from mtl_nnunet.scores.hscore import hscore
from mtl_nnunet.scores.hscore import statistic as hscore_statistic
from mtl_nnunet.scores.knn import knn, vote
from mtl_nnunet.scores.logme import logme
from mtl_nnunet.scores.logme import statistic as logme_statistic
from mtl_nnunet.scores.probe import predictions, probe
from mtl_nnunet.scores.rankme import effective_rank
from mtl_nnunet.scores.structure import cluster, separability
from mtl_nnunet.scores.structure import statistic as structure_statistic


def pixels(
    num_patients: int = 8, each: int = 12, d: int = 6, seed: int = 0
) -> tuple[torch.Tensor, np.ndarray, np.ndarray]:
    """Features with a class signal and a patient effect, three classes."""
    rng = np.random.default_rng(seed)
    patients = np.repeat(np.arange(num_patients), each)
    labels = np.tile(np.arange(each) % 3, num_patients)
    features = (
        rng.normal(size=(len(labels), d))
        + rng.normal(size=(3, d))[labels]
        + 0.5 * rng.normal(size=(num_patients, d))[patients]
    )
    return torch.as_tensor(features, dtype=torch.float32), labels, patients


def everyone(num_patients: int) -> np.ndarray:
    return np.ones((1, num_patients))


@pytest.mark.parametrize(("n", "d"), [(60, 5), (40, 40), (30, 80)])
def test_logme_is_the_maximum_of_the_gaussian_evidence(n: int, d: int) -> None:
    rng = np.random.default_rng(n)
    x = rng.normal(size=(n, d))
    labels = (x[:, 0] + 0.5 * rng.normal(size=n) > 0).astype(int)

    def evidence(log_precisions: np.ndarray, y: np.ndarray) -> float:
        a, b = np.exp(log_precisions)
        return stats.multivariate_normal(np.zeros(n), np.eye(n) / b + x @ x.T / a).logpdf(y) / n

    best = []
    for c in (0, 1):
        y = (labels == c).astype(float)
        found = optimize.minimize(
            lambda p, y=y: -evidence(p, y), np.zeros(2), method="Nelder-Mead", options={"xatol": 1e-6, "fatol": 1e-10}
        )
        best.append(-found.fun)
    assert logme(torch.as_tensor(x), labels) == pytest.approx(np.mean(best), abs=2e-4)


def test_logme_with_fewer_samples_than_features_stays_where_evidence_can_be() -> None:
    rng = np.random.default_rng(0)
    x, labels = torch.as_tensor(rng.normal(size=(100, 512))), np.arange(100) % 10
    # features that know nothing: 0.1-rate labels under their own Gaussian give about +0.2 nats, nowhere near 15
    assert abs(logme(x, labels)) < 1


def test_hscore_is_the_trace_with_sklearns_shrinkage() -> None:
    for d in (6, 150):
        x, labels, _ = pixels(d=d)
        covariance, shrinkage = ledoit_wolf(x.double().numpy())
        means = np.stack([x.double().numpy()[labels == c].mean(0) for c in labels])
        between = np.cov(means, rowvar=False, bias=True)
        expected = np.trace(np.linalg.pinv(covariance) @ ((1 - shrinkage) * between))
        assert float(hscore(x, labels)) == pytest.approx(expected, rel=1e-6)


def test_gbc_is_the_integral_of_the_root_of_the_densities() -> None:
    x, labels, _ = pixels(d=1)
    fits = [
        stats.norm(x[labels == c].double().mean().item(), x[labels == c].double().std(unbiased=False).item())
        for c in range(3)
    ]
    overlap = sum(
        integrate.quad(lambda t, p=p, q=q: np.sqrt(p.pdf(t) * q.pdf(t)), -20, 20, epsabs=1e-10)[0]
        for p in fits
        for q in fits
        if p is not q
    )
    for gaussian in ("spherical", "diagonal"):
        assert float(gbc(x, labels, gaussian)) == pytest.approx(-overlap, rel=1e-6)


def test_gbc_of_spheres_counts_every_dimension() -> None:
    x, labels, _ = pixels(d=2)
    labels = np.minimum(labels, 1)
    fits = []
    for c in (0, 1):
        own = x[labels == c].double()
        fits.append(
            stats.multivariate_normal(own.mean(0).numpy(), own.var(0, unbiased=False).mean().item() * np.eye(2))
        )
    overlap, _ = integrate.dblquad(
        lambda u, v: np.sqrt(fits[0].pdf([u, v]) * fits[1].pdf([u, v])), -9, 9, -9, 9, epsabs=1e-7
    )
    assert float(gbc(x, labels)) == pytest.approx(-2 * overlap, rel=1e-4)


def test_ccfv_is_the_papers_formula_with_matrix_square_roots() -> None:
    x, labels, patients = pixels(num_patients=4, each=15, d=3)

    def slow_distance(a: np.ndarray, b: np.ndarray) -> float:
        s, t = np.cov(a.T), np.cov(b.T)
        root = linalg.sqrtm(s @ t).real
        return float(np.sqrt(((a.mean(0) - b.mean(0)) ** 2).sum() + np.trace(s) + np.trace(t) - 2 * np.trace(root)))

    z = x.double().numpy()
    distances, inverse = [], []
    mean_square = np.mean(((z[:, None] - z[None]) ** 2).sum(-1))
    for p in range(4):
        for q in range(p + 1, 4):
            for c in (1, 2):
                a, b = (z[(patients == r) & (labels == c)] for r in (p, q))
                distances.append(slow_distance(a, b))
                assert wasserstein(torch.as_tensor(a), torch.as_tensor(b)).item() == pytest.approx(
                    distances[-1], rel=1e-6
                )
            inverse += [
                1 / np.sqrt(((u - v) ** 2).sum() + 1e-3 * mean_square)
                for u in z[patients == p]
                for v in z[patients == q]
            ]
    expected = -np.log(np.mean(inverse)) - np.log(np.mean(distances))
    assert ccfv(x, labels, patients) == pytest.approx(expected, rel=1e-6)


def test_ccfv_needs_no_more_samples_than_two_a_class_and_is_free_of_scale() -> None:
    x, labels, patients = pixels(each=6, d=200)
    for scale in (1e-6, 1e6):
        assert ccfv(x * scale, labels, patients) == pytest.approx(ccfv(x, labels, patients), abs=1e-6)
    onehot = torch.eye(3)[torch.as_tensor(labels)]
    assert np.isfinite(ccfv(onehot, labels, patients)), "classes that agree perfectly"
    assert ccfv(onehot, labels, patients) > ccfv(x, labels, patients)


def test_vote_is_sklearns_nearest_neighbours_of_the_other_patients() -> None:
    x, labels, patients = pixels()
    ours = vote(x, labels, patients, k=1)
    for p in np.unique(patients):
        model = KNeighborsClassifier(1, metric="cosine").fit(x[patients != p].numpy(), labels[patients != p])
        np.testing.assert_array_equal(ours[patients == p], model.predict(x[patients == p].numpy()))
    fifteen = vote(x, labels, patients, k=15)
    agreement = []
    for p in np.unique(patients):
        model = KNeighborsClassifier(15, metric="cosine").fit(x[patients != p].numpy(), labels[patients != p])
        shares = np.sort(model.predict_proba(x[patients == p].numpy()), 1)
        clear = shares[:, -1] > shares[:, -2]
        agreement.append((fifteen[patients == p] == model.predict(x[patients == p].numpy()))[clear].all())
    assert all(agreement), "where no classes tie"


def test_probe_is_sklearns_ridge_on_the_other_folds() -> None:
    for d in (6, 150):
        x, labels, patients = pixels(d=d)
        ours = predictions(x, labels, patients, ridge=0.1)
        for fold in range(5):
            test = patients % 5 == fold
            train_x = x[~test].double()
            mean, std = train_x.mean(0), train_x.std(0)
            standardised = ((train_x - mean) / std).numpy()
            penalty = 0.1 * (standardised**2).sum() / d
            model = Ridge(penalty).fit(standardised, np.eye(3)[labels[~test]])
            expected = model.predict(((x[test].double() - mean) / std).numpy()).argmax(1)
            assert (ours[test] == expected).mean() > 0.99, "up to float32 where two classes tie"


def test_predictions_of_a_patient_do_not_see_its_labels() -> None:
    x, labels, patients = pixels()
    wrong = labels.copy()
    wrong[patients == 0] = (wrong[patients == 0] + 1) % 3
    for predict in (lambda y: vote(x, y, patients, 5), lambda y: predictions(x, y, patients)):
        np.testing.assert_array_equal(predict(labels)[patients == 0], predict(wrong)[patients == 0])


def test_dice_by_hand() -> None:
    predicted, labels = np.array([1, 1, 0, 2, 1, 2, 0, 0]), np.array([1, 0, 1, 2, 1, 2, 0, 1])
    patients = np.array([0, 0, 0, 0, 1, 1, 1, 1])
    statistic = dice_statistic(predicted, labels, patients)
    # class 1: 2*2/(3+4); class 2: 2*2/(2+2)
    assert statistic(everyone(2))[0] == pytest.approx((4 / 7 + 1) / 2)
    assert statistic(np.array([[2, 0], [0, 2]])) == pytest.approx([(0.5 + 1) / 2, (2 / 3 + 1) / 2])
    # a class of one patient cannot be predicted from others: it does not count
    labels[1] = 3
    assert dice_statistic(predicted, labels, patients)(everyone(2))[0] == pytest.approx((4 / 7 + 1) / 2)
    labels[3] = 0
    # of a draw without the only patients that have a class, that class is left out
    assert dice_statistic(predicted, labels * (labels < 2), patients)(everyone(2))[0] == pytest.approx(4 / 7)
    with pytest.raises(ValueError, match="two patients"):
        dice_statistic(predicted, labels * (patients == 0), patients)


def test_probes_find_what_is_there_and_nothing_where_there_is_nothing() -> None:
    _, labels, patients = pixels(num_patients=20, each=30)
    onehot = torch.eye(3)[torch.as_tensor(labels)]
    assert probe(onehot, labels, patients) == knn(onehot, labels, patients, 5) == 1
    noise = torch.randn(len(labels), 6, generator=torch.Generator().manual_seed(0))
    for score in (probe(noise, labels, patients), knn(noise, labels, patients)):
        assert 0.2 < score < 0.45


def test_separability_is_the_published_measures_with_singular_values() -> None:
    x, labels, _ = pixels()
    z = x.double()
    centres = torch.stack([z[labels == c].mean(0) for c in range(3)])
    distances = torch.cdist(z, centres)
    distances[torch.arange(len(z)), torch.as_tensor(labels)] = torch.inf
    scale = (z - z.mean(0)).norm(dim=1).mean()
    radii = [
        torch.linalg.svdvals(z[labels == c] - centres[c]).sum() / max((labels == c).sum(), 6) ** 0.5 for c in range(3)
    ]
    expected = (distances.min(1).values.mean() - torch.stack(radii).mean()) / scale
    assert separability(x, labels).item() == pytest.approx(expected.item(), rel=1e-9)


def test_clusters_repeat() -> None:
    x, _, _ = pixels()
    np.testing.assert_array_equal(cluster(x, 5), cluster(x.clone(), 5))


def test_effective_rank_of_a_known_spectrum() -> None:
    q, _ = np.linalg.qr(np.random.default_rng(0).normal(size=(20, 3)))
    p = np.array([0.5, 0.3, 0.2])
    assert effective_rank(torch.as_tensor(q * p)) == pytest.approx(np.exp(-(p * np.log(p)).sum()), rel=1e-6)


LINEARISED = {
    "logme": (lambda x, y, p: logme_statistic(x, y, p), lambda x, y: logme(x, y)),
    "hscore": (lambda x, y, p: hscore_statistic(x, y, p), lambda x, y: float(hscore(x, y))),
    "gbc": (
        lambda x, y, p: gbc_statistic(x, y, p, 64, "diagonal"),
        lambda x, y: float(gbc(x - x.mean(0), y, "diagonal")),
    ),
    "separability": (
        lambda x, y, p: structure_statistic(x, y, p, "separability"),
        lambda x, y: separability(x, y).item(),
    ),
}


@pytest.mark.parametrize("name", list(LINEARISED))
def test_linearised_scores_follow_the_score_of_the_resampled_rows(name: str) -> None:
    statistic_of, score_of = LINEARISED[name]
    num_patients = 40
    x, labels, patients = pixels(num_patients, each=30, d=5)
    statistic = statistic_of(x, labels, patients)
    assert statistic(everyone(num_patients))[0] == pytest.approx(score_of(x, labels), rel=1e-6)
    rng = np.random.default_rng(0)
    draws = rng.multinomial(num_patients, np.full(num_patients, 1 / num_patients), size=200)
    rows = [
        np.concatenate([np.flatnonzero(patients == p) for p in np.repeat(np.arange(num_patients), draw)])
        for draw in draws
    ]
    resampled = np.array([score_of(x[r], labels[r]) for r in rows])
    linear = statistic(draws)
    assert np.corrcoef(linear, resampled)[0, 1] > 0.95
    assert linear.std() == pytest.approx(resampled.std(), rel=0.2)


@pytest.mark.parametrize("name", [n for n, s in SCORES.items() if s.reads == "pixels"])
def test_order_of_pixels_and_names_of_patients_do_not_matter(name: str) -> None:
    x, labels, patients = pixels(num_patients=10, each=30)
    parameters = {k: v for k, v in SCORES[name].parameters.items() if k not in ("level", "pooled")}
    if "clusters" in parameters:
        # k-means starts from rows: a few well separated clusters come out the same
        parameters["clusters"], x = 3, x + 30 * torch.eye(3, 6)[torch.as_tensor(labels)]
    there = SCORES[name].prepare(x, labels, patients, **parameters)
    order = np.random.default_rng(0).permutation(len(x))
    back = SCORES[name].prepare(x[torch.as_tensor(order)], labels[order], patients[order], **parameters)
    draws = np.random.default_rng(1).multinomial(10, np.full(10, 0.1), size=5)
    assert there(draws) == pytest.approx(back(draws), rel=1e-5, abs=1e-6)


def test_one_class_is_refused_by_name() -> None:
    x, labels, patients = pixels()
    for name in ("logme", "hscore", "gbc", "dse_labels"):
        parameters = {k: v for k, v in SCORES[name].parameters.items() if k not in ("level", "pooled")}
        with pytest.raises(ValueError, match="two"):
            SCORES[name].prepare(x, labels * 0, patients, **parameters)
    assert issubclass(UserError, ValueError)
