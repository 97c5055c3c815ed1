"""Ranks of the groups that one rank of a stage belongs to, in Megatron's order: tp innermost, then cp, dp, pp."""

from __future__ import annotations

from dataclasses import dataclass

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
        plan, first = self.plan, self.first
        sizes = {
            "tp": (1, plan.tp),
            "cp": (plan.tp, plan.cp),
            "dp": (plan.tp, plan.cp * plan.dp),
            "ep": (plan.tp * plan.cp, plan.ep),
            "edp": (plan.tp * plan.cp * plan.ep, plan.dp // plan.ep),
        }
        stride, count = sizes[axis]
        return tuple(first + i * stride for i in range(count))

    def neighbours(self, other: int) -> tuple[int, int]:
        """This stage's first rank and its partner on stage `other`."""
        return self.first, Groups(self.plan, other).first
