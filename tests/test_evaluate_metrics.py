"Metrics equal scikit-learn's, undefined ones never look like numbers, and intervals hold what they promise."
from __future__ import annotations

import math

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from sklearn import metrics as sk

from pipeline.core.errors import InputError
from pipeline.core.intervals import bootstrap, combine_seeds, draw_metric, interval, over_seeds, paired, student
from pipeline.core.metrics import BETTER, LABELS, TASKS, metric, metric_or_none
from pipeline.core.run import judge

COSTS = {"false_alarm": 40, "miss": 100, "hit": 5}


def precision_at(y: np.ndarray, p: np.ndarray, recall: float) -> float:
    precision, reached, _ = sk.precision_recall_curve(y, p)
    return precision[reached >= recall].max()


BINARY = {
    "roc_auc": sk.roc_auc_score, "average_precision": sk.average_precision_score, "log_loss": sk.log_loss,
    "brier": sk.brier_score_loss, "accuracy": lambda y, p: sk.accuracy_score(y, p >= 0.4),
    "balanced_accuracy": lambda y, p: sk.balanced_accuracy_score(y, p >= 0.4),
    "f1": lambda y, p: sk.f1_score(y, p >= 0.4, zero_division=0),
    "precision_at_recall": lambda y, p: precision_at(y, p, 0.7),
    "value_per_1000": lambda y, p: 1000 / len(y) * sum((105 if t else -40) for t, s in zip(y, p) if s >= 0.4),
}


@settings(max_examples=60, deadline=None)
@given(st.integers(2, 300), st.integers(0, 10_000), st.sampled_from([3, 50, 10**9]))
def test_binary_metrics_equal_sklearn_also_with_ties(n: int, seed: int, grid: int) -> None:
    rng = np.random.default_rng(seed)
    p = np.round(rng.random(n) * grid) / grid
    y = (rng.random(n) < p).astype(int)
    y[0], y[-1] = 0, 1
    for name, reference in BINARY.items():
        found = metric(name, y, p, threshold=0.4, recall=0.7, costs=COSTS)
        assert found == pytest.approx(reference(y, p), abs=1e-12, rel=1e-12), name
        assert metric(name, y, np.column_stack([1 - p, p]), threshold=0.4, recall=0.7, costs=COSTS) == found


@settings(max_examples=30, deadline=None)
@given(st.integers(6, 200), st.integers(3, 6), st.integers(0, 10_000))
def test_multiclass_metrics_equal_sklearn(n: int, k: int, seed: int) -> None:
    rng = np.random.default_rng(seed)
    p = rng.dirichlet(np.ones(k), n).round(2) + 1e-3
    p /= p.sum(1, keepdims=True)
    y = np.r_[np.arange(k), rng.integers(0, k, max(n - k, 0))][:n] if n >= k else np.arange(n)
    chosen, one_hot = p.argmax(1), np.eye(k)[y]
    expected = {
        "log_loss": sk.log_loss(y, p, labels=range(k)), "brier": ((p - one_hot) ** 2).sum(1).mean(),
        "accuracy": sk.accuracy_score(y, chosen), "balanced_accuracy": sk.balanced_accuracy_score(y, chosen),
        "f1": sk.f1_score(y, chosen, average="macro", zero_division=0),
        "roc_auc": np.mean([sk.roc_auc_score(y == c, p[:, c]) for c in range(k)]),
        "average_precision": np.mean([sk.average_precision_score(y == c, p[:, c]) for c in range(k)]),
    }
    for name, value in expected.items():
        assert metric(name, y, p) == pytest.approx(value, abs=1e-12), name


@settings(max_examples=30, deadline=None)
@given(st.integers(2, 200), st.integers(0, 10_000))
def test_regression_metrics_equal_sklearn(n: int, seed: int) -> None:
    rng = np.random.default_rng(seed)
    y = rng.normal(10, 3, n)
    p = y + rng.normal(0, 1, n)
    assert metric("mae", y, p) == pytest.approx(sk.mean_absolute_error(y, p), abs=1e-12)
    assert metric("rmse", y, p) == pytest.approx(sk.root_mean_squared_error(y, p), abs=1e-12)
    assert metric("r2", y, p) == pytest.approx(sk.r2_score(y, p), abs=1e-9)
    band = np.column_stack([p, p - 1, p + 1])
    assert metric("coverage_90", y, band) == np.mean(np.abs(y - p) <= 1)
    assert metric("mae", y, band) == metric("mae", y, p)


def test_calibration_error_equals_its_definition() -> None:
    rng = np.random.default_rng(7)
    p = rng.beta(2, 3, 5000)
    y = (rng.random(5000) < p**1.5).astype(int)
    bins = np.minimum((p * 15).astype(int), 14)
    by_hand = sum((bins == b).mean() * abs(p[bins == b].mean() - y[bins == b].mean()) for b in np.unique(bins))
    assert metric("ece", y, p) == pytest.approx(by_hand, abs=1e-12)


@pytest.mark.parametrize(("name", "y", "p"), [
    ("roc_auc", [1, 1, 1], [0.1, 0.2, 0.3]), ("roc_auc", [], []), ("average_precision", [0, 0], [0.1, 0.2]),
    ("precision_at_recall", [0, 0], [0.1, 0.2]), ("log_loss", [0, 1], [0.5, math.nan]), ("brier", [0, math.inf], [0.1, 0.2]),
    ("f1", [0, 0], [0.1, 0.2]), ("balanced_accuracy", [0, 0], [0.1, 0.2]), ("r2", [1.0, 1.0], [1.0, 2.0]),
    ("mae", [1.0], [math.nan]), ("coverage_90", [1.0], [1.0]), ("mae", [1.0, 2.0], [1.0]), ("log_loss", [1, 2], [0.5, 0.5]),
    ("value_per_1000", [0, 1, 2], [[0.2, 0.3, 0.5]] * 3), ("precision_at_recall", [0, 1, 2], [[0.2, 0.3, 0.5]] * 3),
    ("roc_auc", [0, 1, 1], [[0.2, 0.3, 0.5]] * 3), ("nonsense", [0], [0.1]),
])
def test_undefined_is_an_error_with_a_reason_and_no_go_at_a_gate(name: str, y: list, p: list) -> None:
    with pytest.raises(InputError) as error:
        metric(name, y, p)
    assert len(str(error.value)) > 20
    assert metric_or_none(name, y, p) is None
    assert judge(None, 0.0, None) == "no-go"


def test_an_unreachable_recall_says_so() -> None:
    with pytest.raises(InputError, match="not reachable"):
        metric("precision_at_recall", [0, 1], [0.2, 0.7], recall=1.5)


def test_every_name_of_the_problem_file_is_defined_for_a_task_and_has_a_direction() -> None:
    from typing import get_args

    from pipeline.core.problem import Metric

    names = set(get_args(Metric))
    assert names == set(BETTER) == set(LABELS) == {m for ms in TASKS.values() for m in ms}


def test_student_equals_scipy() -> None:
    from scipy.stats import t

    for freedom in (1, 2, 3, 4, 7, 30, 1000):
        assert student(freedom) == pytest.approx(t.ppf(0.975, freedom), rel=0.012)


def coverage(hits: list[bool]) -> float:
    return float(np.mean(hits))


@pytest.mark.parametrize("blocks", [31, 400])
def test_bootstrap_intervals_of_a_mean_cover_95_percent(blocks: int) -> None:
    rng = np.random.default_rng(11)
    hits = []
    for trial in range(400):
        shared = rng.normal(0, 0.5, blocks)
        block = np.repeat(np.arange(blocks), 4)
        error = shared[block] + rng.normal(0, 1, len(block))
        found = bootstrap("mae", 100 + error, np.zeros(len(block)), unit=block, seed=trial, draws=300)
        hits.append(found.low <= 100 <= found.high)
    assert 0.93 <= coverage(hits) <= 0.975


def test_intervals_that_ignore_blocks_are_too_narrow() -> None:
    rng = np.random.default_rng(3)
    hits = []
    for trial in range(200):
        block = np.repeat(np.arange(40), 25)
        error = rng.normal(0, 0.7, 40)[block] + rng.normal(0, 1, 1000)
        found = bootstrap("mae", 100 + error, np.zeros(1000), seed=trial, draws=200)
        hits.append(found.low <= 100 <= found.high)
    assert coverage(hits) < 0.7


@pytest.mark.parametrize("seeds", [3, 10])
def test_intervals_over_seeds_cover_the_mean_over_all_seeds_and_rows(seeds: int) -> None:
    rng = np.random.default_rng(5)
    hits = []
    for _ in range(1000):
        rows = rng.normal(0, 0.02)                        # luck of this holdout, shared by all seeds
        values = list(0.7 + rows + rng.normal(0, 0.03, seeds))
        drawn = rng.normal(np.mean(values), 0.02, 200)
        found = combine_seeds(values, drawn, 10_000)
        hits.append(found.low <= 0.7 <= found.high)
    assert 0.93 <= coverage(hits) <= 0.975


def test_auc_intervals_cover() -> None:
    rng = np.random.default_rng(8)
    truth = metric("roc_auc", np.r_[np.ones(20_000), np.zeros(20_000)], np.r_[rng.normal(1, 1, 20_000), rng.normal(0, 1, 20_000)])
    hits = []
    for trial in range(300):
        y = np.r_[np.ones(60), np.zeros(140)]
        p = np.r_[rng.normal(1, 1, 60), rng.normal(0, 1, 140)]
        found = bootstrap("roc_auc", y, p, seed=trial, draws=200)
        hits.append(found.low <= truth <= found.high)
    assert 0.91 <= coverage(hits) <= 0.98


def test_the_same_seed_gives_the_same_interval_and_pairs_use_the_same_draws() -> None:
    rng = np.random.default_rng(1)
    p = rng.random(500)
    y = (rng.random(500) < p).astype(int)
    assert bootstrap("roc_auc", y, p, seed=3) == bootstrap("roc_auc", y, p, seed=3)
    same = paired("roc_auc", y, p, p, seed=3)
    assert (same.value, same.low, same.high) == (0, 0, 0)
    worse = paired("brier", y, p, np.full(500, y.mean()), seed=3)
    assert worse.high < 0


def test_noise_enlarges_a_calibration_error_and_its_interval_takes_that_back() -> None:
    rng = np.random.default_rng(2)
    p = rng.random(2000)
    y = (rng.random(2000) < p).astype(int)
    found = bootstrap("ece", y, p, seed=3)
    drawn = draw_metric("ece", y, p, seed=3)
    assert found.low <= found.value <= found.high
    assert drawn.mean() > found.value                       # noise enlarges; the interval takes that back
    assert found.high < np.quantile(drawn, 0.975)


def test_few_or_one_sided_rows_give_no_confident_interval() -> None:
    with pytest.raises(InputError, match="too few"):
        bootstrap("mae", [1.0], [1.0])
    with pytest.raises(InputError, match="too few"):
        interval(0.5, np.array([math.nan, math.nan, 0.5]), 10)
    with pytest.raises(InputError, match="at least two"):
        over_seeds("mae", [1.0, 2.0], [[1.0, 2.0]])
    found = bootstrap("roc_auc", [1, 0, 0, 0, 0, 0], [0.9, 0.1, 0.2, 0.3, 0.1, 0.1])
    assert judge(found, 0.65, None, "low") == "inconclusive"
