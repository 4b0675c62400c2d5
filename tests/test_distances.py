import itertools

import numpy as np
import pytest
import scipy.linalg

from pipelines.features import distances

RNG = np.random.default_rng(1)
REAL = RNG.normal(size=(60, 4)) @ RNG.normal(size=(4, 4))
MOVE = np.array([0.0, 3.0, 0.0, 4.0])
MADE = RNG.normal(0.3, 1.2, size=(50, 4)) @ RNG.normal(size=(4, 4))


def rng():
    return np.random.default_rng(5)


def test_frechet_is_the_distance_of_the_two_normal_distributions():
    one, other = np.cov(REAL, rowvar=False), np.cov(MADE, rowvar=False)
    root = scipy.linalg.sqrtm(one @ other).real
    expected = np.square(REAL.mean(axis=0) - MADE.mean(axis=0)).sum() + np.trace(one + other - 2 * root)
    assert distances.frechet(REAL, MADE) == pytest.approx(expected, rel=1e-9)
    assert distances._to(REAL)(MADE) == pytest.approx(expected, rel=1e-9)


def test_a_set_has_no_distance_to_itself_and_one_that_is_moved_has_the_square_of_the_way():
    assert distances.frechet(REAL, REAL) == pytest.approx(0, abs=1e-9)
    assert distances.frechet(REAL, REAL + MOVE) == pytest.approx(25, rel=1e-9)
    assert distances._to(REAL)(REAL + MOVE) == pytest.approx(25, rel=1e-9)


def test_frechet_of_fewer_pictures_than_features_is_that_of_the_formula():
    real, made = RNG.normal(size=(9, 20)), RNG.normal(size=(7, 20))
    assert distances._to(real)(made) == pytest.approx(distances.frechet(real, made), rel=1e-6)


def test_the_interval_of_frechet_holds_the_distance_of_the_distributions():
    """Of 40 pairs of samples of two known distributions, most intervals hold the distance of large samples."""
    source = rng()
    real = source.normal(size=(20_000, 3))
    truth = distances.frechet(real, source.normal([1, 0, 0], [1, 2, 1], size=(20_000, 3)))
    assert truth == pytest.approx(2, abs=0.1)  # 1² for the means, (2 - 1)² for the spreads
    held = 0
    for _ in range(40):
        found = distances.frechet_figure(real, source.normal([1, 0, 0], [1, 2, 1], size=(300, 3)), 60, source)
        assert found["low"] < found["value"] < found["high"]
        held += found["low"] <= truth <= found["high"]
    assert 33 <= held <= 40


def test_the_kernel_distance_is_the_unbiased_estimate_over_all_pairs():
    def kernel(a, b):
        return (a @ b / 4 + 1) ** 3

    n = 50
    real = REAL[:n]
    own = sum(kernel(a, b) for a, b in itertools.permutations(real, 2)) / (n * (n - 1))
    theirs = sum(kernel(a, b) for a, b in itertools.permutations(MADE, 2)) / (n * (n - 1))
    cross = sum(kernel(a, b) for a, b in itertools.product(real, MADE)) / n**2
    found = distances.kernel_figure(real, MADE, 20, rng())
    assert found["value"] == pytest.approx(own + theirs - 2 * cross, rel=1e-9)
    assert found["low"] < found["value"] < found["high"]


def test_kernel_replicas_are_those_of_resampled_sets():
    drawn = np.random.default_rng(9).multinomial(len(MADE), np.full(len(MADE), 1 / len(MADE)), size=1)[0]
    (replica,) = distances._kernel_replicas(REAL, MADE, 1, np.random.default_rng(9))
    again = np.repeat(MADE, drawn, axis=0)
    n, m = len(REAL), len(again)
    own, cross, theirs = (distances._cubic(a, b) for a, b in ((REAL, REAL), (REAL, again), (again, again)))
    expected = (own.sum() - np.trace(own)) / (n * (n - 1)) + (theirs.sum() - np.trace(theirs)) / (m * (m - 1))
    assert replica == pytest.approx(expected - 2 * cross.mean(), rel=1e-9)


def test_precision_recall_density_and_coverage_by_counting():
    lie = distances.manifolds(REAL, MADE)

    def radius(points, at, k):
        return sorted(np.linalg.norm(points - points[at], axis=1))[k]

    def among(points, other, k):
        return [[np.linalg.norm(p - q) <= radius(points, i, k) for i, p in enumerate(points)] for q in other]

    real_balls, made_balls = np.array(among(REAL, MADE, 3)), np.array(among(MADE, REAL, 3))
    assert np.array_equal(lie.precision, real_balls.any(axis=1))
    assert np.array_equal(lie.recall, made_balls.any(axis=1))
    dense = np.array(among(REAL, MADE, 5))
    assert np.allclose(lie.density, dense.sum(axis=1) / 5)
    assert np.array_equal(lie.coverage, dense.any(axis=0))


def test_the_same_set_is_covered_and_a_far_one_is_not():
    same, far = distances.manifolds(REAL, REAL), distances.manifolds(REAL, REAL + 1000)
    assert same.precision.all()
    assert same.recall.all()
    assert same.coverage.all()
    assert not far.precision.any()
    assert not far.recall.any()
    assert not far.coverage.any()
    assert (far.density == 0).all()


def test_nearest_are_those_of_a_full_sort_also_in_parts(monkeypatch):
    apart = np.linalg.norm(MADE[:, None] - REAL[None], axis=2)
    values, numbers = distances.nearest(MADE, REAL, 3)
    assert np.array_equal(numbers, np.argsort(apart, axis=1)[:, :3])
    assert np.allclose(values, np.sort(apart, axis=1)[:, :3])
    monkeypatch.setattr(distances, "_AT_ONCE", 500)
    assert np.array_equal(distances.nearest(MADE, REAL, 3)[1], numbers)


def test_copies_are_nearer_than_held_out_pictures_and_independent_ones_are_not():
    source = rng()
    train, heldout, made = (source.normal(size=(200, 5)) for _ in range(3))
    theirs = distances.nearest(heldout, train, 1)[0][:, 0]
    assert abs(distances.data_copying(distances.nearest(made, train, 1)[0][:, 0], theirs)) < 3
    copies = train + source.normal(0, 0.01, train.shape)
    assert distances.data_copying(distances.nearest(copies, train, 1)[0][:, 0], theirs) < -15


def test_a_share_has_its_wilson_interval():
    told = distances.share(np.arange(100) < 90)
    assert told["value"] == 0.9
    assert told["low"] == pytest.approx(0.8256, abs=1e-3)
    assert told["high"] == pytest.approx(0.9448, abs=1e-3)
    assert distances.share(np.ones(100, dtype=bool))["high"] == pytest.approx(1)
    assert distances.share(np.zeros(100, dtype=bool))["low"] == 0.0


def test_a_mean_has_the_interval_of_its_standard_error():
    values = rng().normal(3, 2, 400)
    told = distances.mean(values, 2000, rng())
    assert told["value"] == pytest.approx(values.mean())
    assert told["high"] - told["low"] == pytest.approx(2 * 1.96 * values.std() / 20, rel=0.1)
