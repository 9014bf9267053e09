"Rows from known worlds, so that the true value of every metric is known and intervals can be counted against it."
from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import cache
from typing import Any

import numpy as np

from pipeline.core.intervals import bootstrap, over_seeds, paired
from pipeline.core.metrics import TASKS, metric

SETTINGS: dict[str, Any] = {"threshold": 0.3, "recall": 0.6, "costs": {"false_alarm": 40, "miss": 100}}
LISTS = ("ndcg", "map", "mrr")


@dataclass(frozen=True)
class Rows:
    "One sample: outcomes, a model's answers, a rival's, and those of other seeds."

    y: np.ndarray
    p: np.ndarray
    q: np.ndarray
    seeds: list[np.ndarray]
    unit: np.ndarray | None = None
    group: np.ndarray | None = None


def logistic(z: np.ndarray) -> np.ndarray:
    return 1 / (1 + np.exp(-z))


def softmax(z: np.ndarray) -> np.ndarray:
    e = np.exp(z - z.max(1, keepdims=True))
    return e / e.sum(1, keepdims=True)


def lucks(rng: np.random.Generator, k: int) -> list[tuple[float, float, float]]:
    "What a training seed does to a model: its slope, its level, its noise."
    return [(1.3 + rng.normal(0, 0.2), 0.2 + rng.normal(0, 0.15), abs(rng.normal(0.5, 0.2))) for _ in range(k)]


def blocks(rng: np.random.Generator, n: int, size: int, spread: float, wide: int = 1) -> tuple[np.ndarray | None, np.ndarray]:
    "Rows of one block share a shock; size 1: none."
    if size == 1:
        return None, np.zeros((n, wide))
    unit = np.repeat(np.arange(n // size), size)
    return unit, rng.normal(0, spread, (n // size, wide))[unit]


def binary(rng: np.random.Generator, n: int, k: int, size: int = 1, level: float = -1.3, spread: float = 1.0, said: tuple[float, float] = (1.4, 0.2)) -> Rows:
    "A quarter are positive; the model is too sure of itself."
    unit, shock = blocks(rng, n, size, 0.4)
    z = rng.normal(level, spread, n)
    y = (rng.random(n) < logistic(z + shock[:, 0])).astype(float)
    noise = rng.normal(size=(k + 1, n))
    others = [logistic(a * z + b + s * e) for (a, b, s), e in zip(lucks(rng, k), noise)]
    return Rows(y, logistic(said[0] * z + said[1]), logistic(1.1 * z + 0.7 * noise[k]), others, unit)


def multiclass(rng: np.random.Generator, n: int, k: int, size: int = 1, rarest: float = -0.7) -> Rows:
    "Four classes, from half to a tenth."
    unit, shock = blocks(rng, n, size, 0.4, 4)
    z = rng.normal(0, 1.2, (n, 4)) + [1, 0.3, 0, rarest]
    y = (rng.random((n, 1)) > softmax(z + shock).cumsum(1)).sum(1).clip(0, 3).astype(float)
    noise = rng.normal(size=(k + 1, n, 4))
    return Rows(y, softmax(1.3 * z), softmax(z + 0.7 * noise[k]), [softmax(a * z + s * e) for (a, _, s), e in zip(lucks(rng, k), noise)], unit)


def regression(rng: np.random.Generator, n: int, k: int, size: int = 1) -> Rows:
    "Errors that grow with the prediction and have a tail on one side."
    unit, shock = blocks(rng, n, size, 0.4)
    x = rng.gamma(3, 1, n)
    y = x + shock[:, 0] + (rng.gamma(4, 0.25, n) - 1) * np.sqrt(x) * 1.5
    noise = rng.normal(size=(k + 1, n))
    band = np.sqrt(x) * 1.5
    others = [np.column_stack([m, m - band, m + 1.3 * band]) for a, b, s in lucks(rng, k) for m in [x * (0.7 + a / 4) + b + s * noise[0]]]
    worse = x + 0.1 + 0.5 * noise[k]
    return Rows(y, np.column_stack([x + 0.1, x - 0.7 * band, x + band]), np.column_stack([worse, worse - band, worse + band]), others, unit)


def lists(rng: np.random.Generator, n: int, k: int, size: int = 8) -> Rows:
    "Eight rows a list, a third of them relevant."
    group = np.repeat(np.arange(n // size), size)
    z = rng.normal(-0.8, 1, n)
    y = (rng.random(n) < logistic(z)).astype(float)
    noise = rng.normal(size=(k + 1, n))
    return Rows(y, logistic(z + 0.5 * noise[k]), logistic(z + rng.normal(0, 1, n)), [logistic(a * z + s * e) for (a, _, s), e in zip(lucks(rng, k), noise)], None, group)


@dataclass(frozen=True)
class World:
    "How rows come about, how many a sample has, and what is measured on them."

    name: str
    make: Callable[..., Rows]
    metrics: tuple[str, ...]
    rows: int
    size: int = 1


def of(task: str) -> tuple[str, ...]:
    return tuple(m for m in TASKS[task] if m not in LISTS)


WORLDS = [
    World("binary, 800 rows", binary, of("binary"), 800), World("binary, 40 days of 20 rows", binary, of("binary"), 800, 20),
    World("four classes, 600 rows", multiclass, of("multiclass"), 600), World("four classes, 40 days of 15 rows", multiclass, of("multiclass"), 600, 15),
    World("regression, 400 rows", regression, of("regression"), 400), World("regression, 40 days of 10 rows", regression, of("regression"), 400, 10),
    World("100 lists of 8 rows", lists, LISTS, 800, 8),
]
WAYS = ("one model", "two models", "3 seeds", "10 seeds")


def answers(way: str, name: str, rows: Rows) -> Any:
    "The number that an interval is for, on these rows."
    using = SETTINGS | {"group": rows.group}
    if way == "one model":
        return metric(name, rows.y, rows.p, **using)
    if way == "two models":
        return metric(name, rows.y, rows.p, **using) - metric(name, rows.y, rows.q, **using)
    return float(np.mean([metric(name, rows.y, p, **using) for p in rows.seeds]))


@cache
def truth(world: World, way: str, name: str) -> float:
    "The value on very many rows (and, over seeds, very many seeds)."
    rng = np.random.default_rng(2026)
    seeds, times, n = (0, 6, 240_000) if way in WAYS[:2] else (40, 10, 24_000)
    return float(np.mean([answers(way, name, world.make(rng, n, seeds, world.size)) for _ in range(times)]))


def sample(world: World, way: str, trial: int, draws: int) -> Callable[[str], Any]:
    "One sample of a world; called with a metric's name it gives the interval, as it is made in this way."
    rows = world.make(np.random.default_rng([trial, 77]), world.rows, seeds_of(way), world.size)
    using: dict[str, Any] = SETTINGS | {"unit": rows.unit, "group": rows.group, "seed": trial, "draws": draws}
    if way == "one model":
        return lambda name: bootstrap(name, rows.y, rows.p, **using)
    if way == "two models":
        return lambda name: paired(name, rows.y, rows.p, rows.q, **using)
    return lambda name: over_seeds(name, rows.y, rows.seeds, **using)


def seeds_of(way: str) -> int:
    return int(way.split()[0]) if way.endswith("seeds") else 0


def held(world: World, way: str, name: str, trials: int, draws: int = 500, start: int = 0) -> np.ndarray:
    "How often the truth lay inside, below, above; and the mean width: (4,)."
    aim, found = truth(world, way, name), np.zeros(4)
    for trial in range(start, start + trials):
        it = sample(world, way, trial, draws)(name)
        assert it.low is not None and it.high is not None
        found += [it.low <= aim <= it.high, aim < it.low, aim > it.high, it.high - it.low]
    return found / trials
