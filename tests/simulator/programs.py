"""Random programs, and an oracle for processor sharing that shares no code with the engines."""

from __future__ import annotations

from fractions import Fraction

import numpy as np
from hypothesis import strategies as st

from simulator import Pool, Program, Resource, program_from_arrays

# Not `st.integers`: it draws small and repeated numbers so often that most programs would be the same few tiny ones.
SEEDS = st.sampled_from(range(10**6))
SIZES = st.sampled_from([1, 2, 3, 5, 8, 13, 21, 34, 55])


def random_program(
    seed: int, tasks: int, resources: int, pools: int = 0, ties: bool = False, ascending: bool = False, wide: int = 3
) -> Program:
    """A DAG with ids in random order unless `ascending`; with `ties`, durations are 0, 1, 2 or 3."""
    rng = np.random.default_rng(seed)
    edges = rng.integers(0, tasks, (2, int(rng.integers(0, 3 * tasks))))
    edges = edges[:, edges[0] != edges[1]]
    names = np.arange(tasks) if ascending else rng.permutation(tasks)
    return program_from_arrays(
        rng.integers(0, 4, tasks).astype(float) if ties else rng.exponential(1.0, tasks),
        names[edges.min(axis=0)],
        names[edges.max(axis=0)],
        resource=rng.integers(-1, resources, tasks),
        demand=rng.choice([0.0, 0.3, 1.0, 2.0], tasks),
        rank=rng.integers(-1, 3, tasks),
        resources=[
            Resource(
                f"r{r}",
                capacity=int(rng.integers(1, wide + 1)),
                pool=int(rng.integers(-1, pools)),
                rank=int(rng.integers(-1, 3)),
                kind=("compute", "communication", "link", "host")[int(rng.integers(0, 4))],
            )
            for r in range(resources)
        ],
        pools=[Pool(f"p{p}", float(rng.choice([1.0, 2.0, 3.5]))) for p in range(pools)],
    )


def edge_list(program: Program) -> list[tuple[int, int]]:
    rows = program.succ_ptr
    return [(a, int(b)) for a in range(len(program)) for b in program.succ[rows[a] : rows[a + 1]]]


def exact_times(program: Program) -> tuple[list[float], list[float]]:
    """(start, finish) by remaining work in exact fractions, all tasks looked at after every event."""
    n = len(program)
    before = {i: {a for a, b in edge_list(program) if b == i} for i in range(n)}
    remaining = [Fraction(float(d)) for d in program.duration]
    ready_at: dict[int, Fraction] = {}
    start: dict[int, Fraction] = {}
    finish: dict[int, Fraction] = {}
    now = Fraction(0)
    while len(finish) < n:
        for i in range(n):
            if i not in ready_at and before[i] <= finish.keys():
                ready_at[i] = now
        for i in sorted(ready_at.keys() - start.keys(), key=lambda i: (ready_at[i], i)):
            r = int(program.resource[i])
            held = sum(program.resource[j] == r for j in start.keys() - finish.keys())
            if r < 0 or held < program.resources[r].capacity:
                start[i] = now
        running = sorted(start.keys() - finish.keys())
        rates = {i: _rate(program, i, running) for i in running}
        step = min(remaining[i] / rates[i] for i in running)
        now += step
        for i in running:
            remaining[i] -= step * rates[i]
            if remaining[i] == 0:
                finish[i] = now
    return [float(start[i]) for i in range(n)], [float(finish[i]) for i in range(n)]


def _rate(program: Program, task: int, running: list[int]) -> Fraction:
    pool = _pool(program, task)
    if pool < 0:
        return Fraction(1)
    load = sum(Fraction(float(program.demand[i])) for i in running if _pool(program, i) == pool)
    return min(Fraction(1), Fraction(program.pools[pool].capacity) / load)


def _pool(program: Program, task: int) -> int:
    r = int(program.resource[task])
    return program.resources[r].pool if r >= 0 and program.demand[task] > 0 else -1
