"""Ranks of the groups that one rank of a stage belongs to, in Megatron's order: tp innermost, then cp, dp, pp.

Experts have an order of their own, in which context parallelism takes no part (Megatron-Core from 0.9 on, "MoE parallel
folding", arXiv:2504.14960): ranks that split an expert (tp, where ep leaves them), then those of different experts."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cache

from planner.plan import ParallelPlan


@dataclass(frozen=True, slots=True)
class Groups:
    plan: ParallelPlan
    stage: int = 0

    @property
    def first(self) -> int:
        plan = self.plan
        return self.stage * plan.dp * plan.cp * plan.tp

    def ranks(self, axis: str) -> tuple[int, ...]:
        """Members of the group of the stage's first rank. "dp" spans dp and cp, whose ranks share gradients."""
        stride, count = self._shape(axis)
        return tuple(self.first + i * stride for i in range(count))

    def likes(self, axis: str) -> tuple[int, ...]:
        """First ranks of all groups along `axis` in this stage, which communicate at once; "pp": of all pairs of a rank
        and its partner on another stage."""
        stride, count = (1, 1) if axis == "pp" else self._shape(axis)
        return _likes(self.first, self.plan.dp * self.plan.cp * self.plan.tp, stride, count)

    def _shape(self, axis: str) -> tuple[int, int]:
        """Distance between neighbours of a group, and its size."""
        plan = self.plan
        return {
            "tp": (1, plan.tp),
            "cp": (plan.tp, plan.cp),
            "dp": (plan.tp, plan.cp * plan.dp),
            "ep": (plan.etp, plan.ep),
            "edp": (plan.etp * plan.ep, plan.expert_replicas),
        }[axis]

    def neighbours(self, other: int) -> tuple[int, int]:
        """This stage's first rank and its partner on stage `other`."""
        return self.first, Groups(self.plan, other).first


@cache
def _likes(first: int, width: int, stride: int, count: int) -> tuple[int, ...]:
    return tuple(first + i for i in range(width) if i // stride % count == 0)
