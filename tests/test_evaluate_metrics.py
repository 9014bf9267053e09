"Metrics equal scikit-learn's, undefined ones never look like numbers, and intervals hold what they promise."
from __future__ import annotations

import math
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from simulated import WORLDS, held
from sklearn import metrics as sk

from pipeline.core.errors import InputError
from pipeline.core.intervals import (
    Estimate, against_margin, bootstrap, chance_of, combine_seeds, draw_metric, holm, interval, over_seeds, paired, score, student,
)
from pipeline.core.metrics import BETTER, LABELS, TASKS, Settings, brier_parts, metric, metric_or_none, metrics_for
from pipeline.core.run import judge
from pipeline.scope.value import best_threshold, break_even

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


@settings(max_examples=40, deadline=None)
@given(st.integers(4, 200), st.integers(0, 10_000), st.sampled_from([4, 10**9]))
def test_weighted_metrics_equal_sklearn(n: int, seed: int, grid: int) -> None:
    rng = np.random.default_rng(seed)
    w = rng.integers(0, 4, n) + (rng.random(n) < 0.5) * rng.random(n)
    p = np.round(rng.random(n) * grid) / grid
    y = (rng.random(n) < p).astype(int)
    y[:2], y[-2:], w[:2], w[-2:] = 0, 1, 1.5, 0.5
    precision, reached, _ = sk.precision_recall_curve(y, p, sample_weight=w)
    worth = np.where(p >= 0.4, np.where(y == 1, 105, -40), 0)
    binary = {
        "roc_auc": sk.roc_auc_score(y, p, sample_weight=w), "average_precision": sk.average_precision_score(y, p, sample_weight=w),
        "log_loss": sk.log_loss(y, p, sample_weight=w), "brier": sk.brier_score_loss(y, p, sample_weight=w),
        "accuracy": sk.accuracy_score(y, p >= 0.4, sample_weight=w), "balanced_accuracy": sk.balanced_accuracy_score(y, p >= 0.4, sample_weight=w),
        "f1": sk.f1_score(y, p >= 0.4, sample_weight=w, zero_division=0), "value_per_1000": 1000 * np.average(worth, weights=w),
        "precision_at_recall": precision[reached >= 0.7].max(),
    }
    for name, value in binary.items():
        assert metric(name, y, p, weights=w, threshold=0.4, recall=0.7, costs=COSTS) == pytest.approx(value, abs=1e-12, rel=1e-12), name
    q = rng.dirichlet(np.ones(3), n)
    c = np.r_[0, 1, 2, rng.integers(0, 3, n - 3)]
    w[:3] = 1
    several = {
        "log_loss": sk.log_loss(c, q, labels=range(3), sample_weight=w), "accuracy": sk.accuracy_score(c, q.argmax(1), sample_weight=w),
        "roc_auc": sk.roc_auc_score(c, q, multi_class="ovr", sample_weight=w),
        "f1": sk.f1_score(c, q.argmax(1), average="macro", sample_weight=w, zero_division=0),
        "balanced_accuracy": sk.balanced_accuracy_score(c, q.argmax(1), sample_weight=w),
    }
    for name, value in several.items():
        assert metric(name, c, q, weights=w) == pytest.approx(value, abs=1e-12, rel=1e-12), name
    t = rng.normal(10, 3, n)
    for name, reference in (("mae", sk.mean_absolute_error), ("rmse", sk.root_mean_squared_error), ("r2", sk.r2_score)):
        assert metric(name, t, t + p, weights=w) == pytest.approx(reference(t, t + p, sample_weight=w), abs=1e-9), name


@settings(max_examples=40, deadline=None)
@given(st.integers(1, 25), st.integers(0, 10_000), st.sampled_from([3, 10**9]))
def test_means_over_lists_equal_sklearn_list_by_list(lists: int, seed: int, grid: int) -> None:
    rng = np.random.default_rng(seed)
    group = np.sort(rng.integers(0, lists, lists * 7))
    y = np.maximum(rng.integers(-2, 4, len(group)), 0)
    s = np.round(rng.random(len(group)) * grid) / grid
    mixed = rng.permutation(len(group))
    kept = [g for g in np.unique(group) if y[group == g].any()]
    if not kept:
        assert metric_or_none("ndcg", y, s, group=group) is None
        return
    gain = np.mean([sk.ndcg_score([y[group == g]], [s[group == g]]) if (group == g).sum() > 1 else 1.0 for g in kept])
    mean = np.mean([sk.average_precision_score(y[group == g] > 0, s[group == g]) for g in kept])
    assert metric("ndcg", y[mixed], s[mixed], group=group[mixed]) == pytest.approx(gain, abs=1e-12)
    assert metric("map", y[mixed], s[mixed], group=group[mixed]) == pytest.approx(mean, abs=1e-12)
    shuffles = []
    for _ in range(40 if grid == 3 else 1):
        order = np.lexsort((rng.random(len(s)), -s, group))
        shuffles.append(np.mean([1 / (1 + np.flatnonzero(y[order][group[order] == g])[0]) for g in kept]))
    assert metric("mrr", y, s, group=group) == pytest.approx(np.mean(shuffles), abs=0.25 if grid == 3 else 1e-12)


def test_a_mean_over_lists_draws_lists_and_needs_them() -> None:
    import polars as pl

    rng = np.random.default_rng(4)
    group = np.repeat([f"q{i}" for i in range(60)], 6)
    y = (rng.random(360) < 0.3).astype(int)
    p = np.clip(0.3 * y + rng.random(360), 0.01, 1.5) / 1.5
    frame = pl.DataFrame({"__group": group, "y": y, "p_no": 1 - p, "p_yes": p})
    found = score(frame, "ndcg", ["no", "yes"])
    assert found is not None and found.value == pytest.approx(metric("ndcg", y, p, group=group)) and found.low < found.value < found.high
    assert score(frame.drop("__group"), "ndcg", ["no", "yes"]) is None
    with pytest.raises(InputError, match="no list is named"):
        metric("mrr", y, p)
    with pytest.raises(InputError, match="different blocks"):
        bootstrap("map", y, p, group=group, unit=np.arange(360) // 10)
    assert bootstrap("map", y, p, group=group, unit=np.arange(360) // 12).value == bootstrap("map", y, p, group=group).value
    with pytest.raises(InputError, match="cannot rank models"):
        metrics_for("binary", main="ndcg")


def test_pinball_equals_sklearn_and_needs_an_interval() -> None:
    rng = np.random.default_rng(3)
    y = rng.normal(size=300)
    band = np.column_stack([y * 0, y * 0 - 1.2, y * 0 + 1.7])
    by_hand = (sk.mean_pinball_loss(y, band[:, 1], alpha=0.05) + sk.mean_pinball_loss(y, band[:, 2], alpha=0.95)) / 2
    assert metric("pinball_90", y, band) == pytest.approx(by_hand, abs=1e-12)
    with pytest.raises(InputError, match="no intervals"):
        metric("pinball_90", y, band[:, 0])


@settings(max_examples=40, deadline=None)
@given(st.integers(2, 400), st.integers(0, 10_000), st.sampled_from([2, 10, 15]))
def test_the_parts_of_a_brier_score_add_up(n: int, seed: int, bins: int) -> None:
    rng = np.random.default_rng(seed)
    p = rng.random(n)
    y = (rng.random(n) < p**2).astype(int)
    made = brier_parts(y, p, bins)
    assert made.uncertainty - made.resolution + made.reliability + made.within == pytest.approx(sk.brier_score_loss(y, p), abs=1e-12)


def test_noise_is_taken_off_a_calibration_error() -> None:
    plain, clean = [], []
    for seed in range(40):
        rng = np.random.default_rng(seed)
        p = rng.beta(2, 4, 400)
        y = (rng.random(400) < p).astype(int)
        plain.append(metric("ece", y, p))
        clean.append(metric("ece_debiased", y, p))
        assert 0 <= clean[-1] <= plain[-1]
    assert np.mean(clean) < 0.4 * np.mean(plain)                    # the truth is zero
    rng = np.random.default_rng(1)
    p = rng.beta(2, 4, 50_000)
    y = (rng.random(50_000) < p / 2).astype(int)
    assert metric("ece_debiased", y, p) == pytest.approx(metric("ece", y, p), rel=0.01)


@settings(max_examples=25, deadline=None)
@given(st.integers(2, 120), st.integers(0, 10_000), st.sampled_from([5, 10**9]), st.floats(1, 200), st.floats(1, 200))
def test_the_best_threshold_is_worth_what_brute_force_finds(n: int, seed: int, grid: int, false_alarm: float, miss: float) -> None:
    rng = np.random.default_rng(seed)
    p = np.round(rng.random(n) * grid) / grid
    y = (rng.random(n) < p).astype(int)
    costs = {"false_alarm": false_alarm, "miss": miss, "hit": 0.0}
    worth = [metric("value_per_1000", y, p, threshold=t, costs=costs) for t in [*np.unique(p), 1.1]]
    found = metric("value_per_1000", y, p, threshold=best_threshold(y, p, costs), costs=costs)
    assert found == pytest.approx(max(worth), abs=1e-9)
    swapped = {"false_alarm": miss, "miss": false_alarm, "hit": 0.0}
    assert (break_even(costs) < break_even(swapped)) == (false_alarm < miss) or false_alarm == miss


def test_a_setting_that_does_not_exist_is_refused() -> None:
    for call in (metric, bootstrap):
        with pytest.raises(InputError, match="no setting 'treshold'; did you mean 'threshold'"):
            call("accuracy", [0, 1], [0.2, 0.7], treshold=0.3)
    assert metric("accuracy", [0, 1], [0.2, 0.7], settings=Settings(threshold=0.1)) == 0.5
    for weights in ([1.0], [0.0, 0.0], [1.0, math.nan], [-1.0, 2.0]):
        with pytest.raises(InputError, match="weights"):
            metric("accuracy", [0, 1], [0.2, 0.7], weights=weights)


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


def test_precision_at_a_recall_by_hand_also_with_ties() -> None:
    y, p = [1, 0, 1, 1, 0, 0, 1, 0], [0.9, 0.8, 0.7, 0.7, 0.7, 0.4, 0.3, 0.1]
    for recall, by_hand in ((0.25, 1.0), (0.5, 3 / 5), (0.75, 3 / 5), (0.76, 4 / 7), (1.0, 4 / 7)):   # the three of .7 come together
        assert metric("precision_at_recall", y, p, recall=recall) == pytest.approx(by_hand, abs=1e-9)


def test_an_unreachable_recall_says_so() -> None:
    with pytest.raises(InputError, match="not reachable"):
        metric("precision_at_recall", [0, 1], [0.2, 0.7], recall=1.5)


def test_every_name_of_the_problem_file_is_defined_for_a_task_and_has_a_direction() -> None:
    from typing import get_args

    from pipeline.core.problem import Metric

    names = set(get_args(Metric))
    assert names == set(BETTER) == set(LABELS) == {m for ms in TASKS.values() for m in ms}


# One of each method: a share, sums, a tail, a ranking, a calibration error, lists; all of them: tests/bench/intervals.py
COVERED = [
    ("binary, 800 rows", "one model", "ece"), ("binary, 800 rows", "one model", "accuracy"), ("binary, 40 days of 20 rows", "one model", "value_per_1000"),
    ("binary, 40 days of 20 rows", "two models", "roc_auc"), ("regression, 40 days of 10 rows", "one model", "rmse"), ("100 lists of 8 rows", "one model", "ndcg"),
    ("regression, 400 rows", "10 seeds", "mae"), ("binary, 800 rows", "3 seeds", "ece"), ("100 lists of 8 rows", "3 seeds", "mrr"),
]


@pytest.mark.parametrize(("world", "way", "name"), COVERED)
def test_intervals_hold_the_truth(world: str, way: str, name: str) -> None:
    inside, below, above, _ = held(next(w for w in WORLDS if w.name == world), way, name, 150, 150)
    assert 0.9 <= inside <= 0.99 and max(below, above) <= 0.075


FEW_OF_A_CLASS = [
    ("8 positives of 300 rows", "one model", ("roc_auc", "average_precision", "f1", "balanced_accuracy")),
    ("15 positives of 300 rows", "one model", ("roc_auc", "f1", "log_loss")), ("four classes, the rarest 8 of 300 rows", "one model", ("f1", "balanced_accuracy")),
    ("8 positives of 300 rows", "two models", ("accuracy", "f1", "balanced_accuracy")),
]


@pytest.mark.parametrize(("name", "way", "metrics"), FEW_OF_A_CLASS)
def test_intervals_of_few_positives_hold_the_truth(name: str, way: str, metrics: tuple[str, ...]) -> None:
    from tests.bench.intervals import WORLDS as MORE
    from tests.bench.intervals import measure

    for line in measure(next(w for w in MORE if w.name == name), way, 300, metrics):
        assert line["inside"] >= 0.93 and line["width"] < 1.5 and line["truth_below"] <= 0.065, line


@pytest.mark.parametrize("name", ["accuracy", "roc_auc", "f1", "ece", "brier", "value_per_1000", "precision_at_recall"])
def test_seeds_that_agree_say_no_more_than_one_model(name: str) -> None:
    "The mean over seeds stands on the same rows: its interval is no narrower than one model's, however alike the seeds are."
    rng = np.random.default_rng(3)
    p = rng.beta(1, 4, 200)
    y = (rng.random(200) < p).astype(int)
    alike = [np.clip(p + shift, 0, 1) for shift in (0, 1e-9, 2e-9)]
    one, mean = (found(name, y, q, seed=1, threshold=0.3, costs=COSTS) for found, q in ((bootstrap, p), (over_seeds, alike)))
    assert mean.value == pytest.approx(one.value, abs=1e-6)
    assert mean.low <= one.low + 1e-6 * abs(one.low) + 1e-12 and mean.high >= one.high - 1e-6 * abs(one.high)


def test_r2_over_seeds_is_as_unsure_as_r2_of_one() -> None:
    "Thirty rows with one far off."
    rng = np.random.default_rng(2)
    y = np.r_[rng.normal(size=29), 9.0]
    answers = [y * 0.8 + 0.3 * rng.normal(size=30) for _ in range(3)]
    alone, mean = [bootstrap("r2", y, p) for p in answers], over_seeds("r2", y, answers)
    assert mean.value - mean.low >= 0.95 * np.mean([e.value - e.low for e in alone]) and mean.high - mean.value >= 0.95 * np.mean([e.high - e.value for e in alone])


def test_a_perfect_score_on_few_rows_is_no_certainty() -> None:
    y, p = np.array([0, 1] * 15), np.array([0.1, 0.9] * 15)
    for name in ("accuracy", "balanced_accuracy", "f1", "roc_auc", "average_precision"):
        found = bootstrap(name, y, p)
        assert found.value == found.high == 1 and 0.7 < found.low < 0.95, name


def test_a_calibration_error_of_true_probabilities_reaches_down_to_zero() -> None:
    low = []
    for seed in range(30):
        rng = np.random.default_rng(seed)
        p = rng.random(500)
        found = bootstrap("ece", (rng.random(500) < p).astype(int), p, draws=200)
        low.append(found.low)
        assert found.low <= found.value <= found.high
    assert np.mean(np.array(low) < 1e-3) > 0.85


def test_many_comparisons_need_more_evidence() -> None:
    assert holm([0.01, 0.02, 0.03, 0.9]) == pytest.approx([0.04, 0.06, 0.06, 0.9]) and holm([]) == []
    assert chance_of(Estimate(0.5, 0.0, 1.0)) == pytest.approx(0.05, abs=1e-6)
    with pytest.raises(InputError, match="without an interval"):
        chance_of(Estimate(0.5))
    rng, false = np.random.default_rng(3), 0
    for _ in range(400):
        gains = rng.normal(0, 1, 10)
        false += min(holm([chance_of(Estimate(g, g - 1.959964, g + 1.959964)) for g in gains])) <= 0.05
    assert false / 400 <= 0.08                                       # one by one it would be 40 %
    assert against_margin(Estimate(-0.002, -0.004, 0.0), 0.005) == "no worse" and against_margin(Estimate(0.1), 0.005) == "unclear"


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


class Watched:
    "Notes what a phase would claim, check and decide."

    def __init__(self, margin: float) -> None:
        from types import SimpleNamespace

        self.problem = SimpleNamespace(evaluate=SimpleNamespace(margin=margin))
        self.verdicts: dict[str, str] = {}
        self.decided = ""

    def load(self, name: str) -> None:
        assert name == "data/train"

    def claim(self, name: str, *, by: Any, using: dict[str, Any], **told: Any) -> Any:
        return by(self.frame, **using)

    def check(self, title: str, found: Any, *, at_least: float | None = None, at_most: float | None = None, bound: Any = None, **told: Any) -> None:
        self.verdicts[title] = judge(found, at_least, at_most, bound)

    def decide(self, title: str, options: list, chose: str, because: str) -> None:
        self.decided = because


@pytest.mark.parametrize(("error", "verdict", "words"), [
    (0.5, "go", "it wins"), (1.0, "go", "no worse than the default model"), (1.3, "no-go", "is worse than"),
])
def test_a_loss_beyond_the_margin_is_refused_and_a_small_one_is_not(monkeypatch: pytest.MonkeyPatch, error: float, verdict: str, words: str) -> None:
    from types import SimpleNamespace

    import polars as pl

    from pipeline.evaluate import compare

    rng = np.random.default_rng(6)
    y = rng.normal(50, 10, 1500)
    frame = pl.DataFrame({"y": y, "prediction": y + error * rng.normal(0, 1, 1500), "current_prediction": y + rng.normal(0, 1, 1500)})
    run = Watched(margin=0.1)
    run.frame = frame
    using = {"classes": None, "unit": None, "draws": 200, "seed": 7, "level": 0.95, "threshold": 0.5, "recall": 0.8, "costs": None}
    holdout = SimpleNamespace(predictions=frame, contract={"classes": [], "columns": [], "target": "y"}, task="regression", main="mae", using=using, current=True,
                              model=SimpleNamespace(family="trees"))
    monkeypatch.setattr(compare, "target_values", lambda frame, contract: y)
    compare.compare_simpler(run, holdout)                                    # ten per cent of the default's error would be tolerated
    assert run.verdicts["not shown to lose more against the default model than evaluate.margin"] == verdict
    assert run.verdicts["better than one answer for all rows"] == "go" and words in run.decided
