"""How often a rollout is believed, and how often wrongly: simulated rollouts, looked at all the time.

    python -m tests.bench.rollouts [PART …] [--trials 1000]      # PART: errors rollouts kpi split

Load, hour of day, error base and speed move all the time, for both models alike. "A/A" means that the new model is no worse than the
old one: whatever is rolled back or called significant there is wrong. Beside it the test that most people would do: a z-test at every look.

Results go to tests/bench/results/rollouts.json and are printed as tables.
"""
from __future__ import annotations

import argparse
import datetime as dt
import json
import math
import os
import sys
import time
from pathlib import Path
from typing import Any

import numpy as np

ROOT = Path(__file__).resolve().parent.parent.parent
sys.path[:0] = [str(ROOT), str(ROOT / "tests")]

from pipeline.core.intervals import wilson  # noqa: E402
from pipeline.rollout.canary import TESTS, Look, Rules, consider, start  # noqa: E402
from pipeline.rollout.sequential import Errors, Split, budget, count_errors, count_kpi, count_subjects, matched, new_uplift  # noqa: E402

RESULTS = Path(__file__).parent / "results" / "rollouts.json"
LOOKS = 60
Z = 1.6449     # one-sided, 5 %


def share(hits: int, trials: int) -> str:
    low, high = wilson(hits, trials)
    return f"{hits / trials:.2%} ({low:.2%}–{high:.2%})"


# -- errors alone: the figures' row

def errors(trials: int) -> list[dict[str, Any]]:
    "False alarms of the test on errors, with its part of the budget, and how soon more errors are found; 100 requests of the new model a look."
    lines, alpha = [], budget(0.05, TESTS)["errors"]
    for base, new, what in ((.001, .001, "no difference"), (.005, .005, "no difference"), (.02, .02, "no difference"),
                            (.005, .005, "no difference, error base and load move"), (.005, .02, "4 times as many"), (.005, .01, "twice as many")):
        random, alarms, naive, looks = np.random.default_rng(1), 0, 0, []
        for _ in range(trials):
            moving = "move" in what
            factor = np.exp(.7 * np.sin(np.arange(LOOKS) / 4 + random.random() * 6) + np.cumsum(random.normal(0, .15, LOOKS))) if moving else np.ones(LOOKS)
            load = random.integers(300, 6000, LOOKS) if moving else np.full(LOOKS, 1900)
            ours, theirs = random.binomial(100, np.minimum(new * factor, .5)), random.binomial(load, np.minimum(base * factor, .5))
            state, found = Errors(alpha), 0
            for look in range(LOOKS):
                state = count_errors(state, int(ours[look]), 100, int(theirs[look]), int(load[look]))
                if state.rejected:
                    found = look + 1
                    break
            alarms += bool(found)
            looks.append(found or math.inf)
            n, m = 100.0 * np.arange(1, LOOKS + 1), np.cumsum(load)
            a, b = np.cumsum(ours) / n, np.cumsum(theirs) / m
            pooled = (a * n + b * m) / (n + m)
            with np.errstate(invalid="ignore", divide="ignore"):
                naive += bool(np.nanmax((a - b) / np.sqrt(pooled * (1 - pooled) * (1 / n + 1 / m))) > Z)
        lines.append({"case": f"{base:.1%} → {new:.1%}, {what}" if what != "no difference" else f"{base:.1%}, {what}", "trials": trials, "rolled back": alarms / trials, "shown": share(alarms, trials),
                      "median look": float(np.median(looks)), "naive z-test": naive / trials})
    return lines


# -- whole rollouts

RULES = Rules(stages=(5.0, 25.0, 50.0, 100.0), windows_per_stage=12, worse_by=.002, outcome_delay=0)
CASES: dict[str, dict[str, float]] = {
    "A/A": {},
    "A/A, new model as good but other": {"noise": .15},
    "exactly as much worse as tolerated": {"noise": .15, "worse": .002},
    "5 % more loss": {"noise": .15, "worse_share": .05},
    "better by 3 %": {"noise": .15, "worse_share": -.03},
    "4 times the errors": {"errors": 4},
    "1.5 times as slow": {"slow": 1.5},
    "always the same answer": {"stuck": 1},
}


def rollout(seed: int, noise: float = 0.0, worse: float = 0.0, worse_share: float = 0.0, errors: float = 1.0, slow: float = 1.0, stuck: float = 0.0) -> tuple[str, int, int]:
    "Outcome, looks and requests of the new model of one rollout of `LOOKS` looks."
    random, state = np.random.default_rng(seed), start(RULES)
    phase, drift, speed = random.random() * 24, np.cumsum(random.normal(0, .12, LOOKS)), np.cumsum(random.normal(0, .05, LOOKS))
    for look in range(LOOKS):
        hour = math.sin((look + phase) / 24 * 2 * math.pi)
        total = int(1500 * (1 + .7 * hour) * random.uniform(.6, 1.4))
        n = int(random.binomial(total, RULES.stages[state.stage] / 100))
        m = total - n
        base = min(.004 * math.exp(drift[look] + .5 * hour), .2)
        failed, old_failed = random.random(n) < min(base * errors, .9), random.random(m) < base
        within = np.linspace(0, .3 * hour, 50)      # the speed changes during a window too
        ms, old_ms = (np.exp(speed[look] + .4 * hour + np.interp(np.linspace(0, 1, c), np.linspace(0, 1, 50), within) + random.normal(0, .5, c)) * f for c, f in ((n, slow), (m, 1.0)))
        k = min(m, 300)
        p = random.beta(2, 4, k)                     # the shadow's pairs: of the rows that the old model answered, those whose outcome comes
        came = (random.random(k) < np.clip(p + random.normal(0, .1, k), 0, 1)).astype(float)
        old = np.clip(p + random.normal(0, .1, k), .01, .99)
        new = np.full(k, .33) if stuck else old if not noise and not worse_share else np.clip(p + random.normal(0, .1, k), .01, .99)
        loss = (old - came) ** 2
        difference = (new - came) ** 2 - loss + worse + worse_share * (loss.mean() if k else 0.0) if not stuck else np.zeros(0)
        state, decision = consider(state, Look(failed, old_failed, np.clip(difference, -1, 1), (ms > 1e9).astype(float), len(difference), None, (old_ms > 1e9).astype(float),
                                               matched(np.log(ms), np.log(old_ms)), new, old, None, n, m), RULES)
        if state.status != "running":
            return decision.decision, look + 1, state.served
    return "hold", LOOKS, state.served


def rollouts(trials: int) -> list[dict[str, Any]]:
    lines = []
    for case, what in CASES.items():
        ends = [rollout(seed, **what) for seed in range(trials if case.startswith(("A/A", "exactly")) else max(trials // 5, 50))]
        back = [e for e in ends if e[0] == "roll back"]
        lines.append({"case": case, "trials": len(ends), "rolled back": len(back) / len(ends), "shown": share(len(back), len(ends)), "promoted": sum(e[0] == "promote" for e in ends) / len(ends),
                      "median look": float(np.median([e[1] for e in back])) if back else None, "median requests": float(np.median([e[2] for e in back])) if back else None})
        print(f"  {case}: {lines[-1]['shown']}", file=sys.stderr, flush=True)
    return lines


# -- a KPI that everybody peeks at

def kpi(trials: int) -> list[dict[str, Any]]:
    "A/A on a conversion rate that moves with the hour, each look 200 subjects of the new model; and an uplift of a fifth."
    lines = []
    for uplift in (0.0, .02):
        random, wrong, missed, naive = np.random.default_rng(2), 0, 0, 0
        for _ in range(trials):
            state, sums = new_uplift(.05, 1.0), np.zeros((2, 3))
            significant = False
            for look in range(LOOKS):
                rate = .10 + .04 * math.sin(look / 4)
                n, m = int(random.integers(100, 300)), int(random.integers(400, 1200))
                a, b = ((random.random(k) < rate + add).astype(float) for k, add in ((n, uplift), (m, 0)))
                state = count_kpi(state, matched(a, b))
                for side, values in enumerate((a, b)):
                    sums[side] += len(values), values.sum(), (values ** 2).sum()
                means = sums[:, 1] / sums[:, 0]
                spread = math.sqrt(((sums[:, 2] / sums[:, 0] - means**2) / sums[:, 0]).sum())
                significant |= abs(means[0] - means[1]) > 1.96 * spread
            wrong += state.p < .05
            missed += not state.interval[0] <= uplift <= state.interval[1]
            naive += significant
        lines.append({"case": "A/A" if not uplift else "a fifth more", "trials": trials, "significant at some look": wrong / trials, "shown": share(wrong, trials),
                      "interval missed": missed / trials, "naive z-test": naive / trials})
    return lines


def split(trials: int) -> list[dict[str, Any]]:
    "Splits of 5 % that are fine, and ones that lose every fifth subject of the new model."
    lines = []
    for lost in (0.0, .2):
        random, held, looks = np.random.default_rng(3), 0, []
        for _ in range(trials):
            state, found = Split(.005, 5.0), math.inf
            for look in range(LOOKS):
                came = int(random.integers(200, 1500))
                n = int(random.binomial(came, .05))
                state = count_subjects(state, int(random.binomial(n, 1 - lost)), came - n)
                if state.rejected:
                    found = look + 1
                    break
            held += math.isfinite(found)
            looks.append(found)
        lines.append({"case": "as asked" if not lost else "every fifth is lost", "trials": trials, "held": held / trials, "shown": share(held, trials), "median look": float(np.median(looks))})
    return lines


PARTS = {"errors": (errors, 10), "rollouts": (rollouts, 1), "kpi": (kpi, 1), "split": (split, 1)}


def table(lines: list[dict[str, Any]]) -> str:
    def cell(value: Any) -> str:
        return "–" if value is None or value == math.inf else f"{value:.4g}" if isinstance(value, float) else str(value)
    names = list(lines[0])
    return "\n".join(["| " + " | ".join(names) + " |", "|---" * len(names) + "|", *("| " + " | ".join(cell(line[n]) for n in names) + " |" for line in lines)])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("parts", nargs="*", metavar="PART")
    parser.add_argument("--trials", type=int, default=1000)
    asked = parser.parse_args()
    os.nice(10)
    kept = json.loads(RESULTS.read_text()) if RESULTS.exists() else {"parts": {}}
    for name in asked.parts or PARTS:
        measure, times = PARTS[name]
        begun = time.process_time()
        lines = measure(asked.trials * times)
        kept["parts"][name] = {"at": dt.datetime.now(dt.UTC).isoformat(timespec="minutes"), "cpu_s": round(time.process_time() - begun, 1), "looks": LOOKS, "alpha": .05, "numpy": np.__version__,
                               "lines": [{k: None if v == math.inf else v for k, v in line.items()} for line in lines]}
        RESULTS.write_text(json.dumps(kept, indent=1) + "\n")
        print(f"\n{name}\n\n{table(lines)}", flush=True)


if __name__ == "__main__":
    main()
