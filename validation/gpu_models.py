"""The training steps that the GPU suite predicts and runs: models, variants, and their division into pieces."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from opgraph.workload import Workload
from planner.plan import ParallelPlan, Precision

PIECE_SECONDS = 420.0  # of a piece, estimated: a call has 540
EAGER_SECONDS, COMPILED_SECONDS = 8.0, 75.0  # of one row, building, warming up and compiling included: ASSUMPTIONS


@dataclass(frozen=True, slots=True)
class Model:
    """A model spec without its batch, and its small and large batch."""

    spec: str
    small: int
    large: int


MODELS = (
    Model("gpt2", 1, 16),
    Model("gpt2-medium:seq=512", 1, 8),
    Model("bert-base", 2, 32),
    Model("llama3-1b:layers=4,seq=2048", 1, 4),
    Model("mixtral-8x7b:layers=4,hidden=1024,heads=16,kv_heads=4,ffn=3584,seq=1024", 1, 8),
    Model("vit-b16", 8, 128),
    Model("resnet50", 8, 128),
    Model("vgg16", 8, 64),
    Model("alexnet", 32, 512),
    Model("googlenet", 8, 128),
    Model("lstm-medium", 20, 256),
    Model("mlp:layers=8,hidden=2048,ffn=8192", 32, 4096),
    Model("lenet5", 64, 8192),
)
TINY = "hidden=32,heads=2,ffn=64,seq=16"
QUICK_MODELS = (
    Model(f"gpt2:layers=2,positions=16,vocab=64,{TINY}", 2, 8),
    Model("mlp:layers=2,hidden=64,ffn=128", 2, 16),
    Model("lenet5", 2, 8),
)


@dataclass(frozen=True, slots=True)
class Variant:
    """How a step is run. precision: as a plan names it; recompute: every block's activations; large: at the
    larger batch."""

    precision: Precision
    compiled: bool = False
    recompute: bool = False
    large: bool = True

    @property
    def label(self) -> str:
        words = [self.precision, "compiled" * self.compiled, "recompute" * self.recompute]
        return " ".join(filter(None, [*words, "large" if self.large else "small"]))


EAGER = (
    Variant("fp32", large=False), Variant("bf16", large=False), Variant("fp32"), Variant("tf32"), Variant("bf16"),
    Variant("bf16", recompute=True),
)  # fmt: skip
COMPILED = Variant("bf16", compiled=True)
COMPILED_SMALL = Variant("bf16", compiled=True, large=False)
BOTH_BATCHES = 4  # models whose compiled step is also run at the small batch: compiling takes most of a row's time
QUICK = (
    Variant("fp32", large=False), Variant("fp32"), Variant("tf32"), Variant("bf16"), Variant("fp32", recompute=True),
)  # fmt: skip


@dataclass(frozen=True, slots=True)
class Run:
    """One training step to predict and measure."""

    model: Model
    variant: Variant

    @property
    def batch(self) -> int:
        return self.model.large if self.variant.large else self.model.small

    @property
    def key(self) -> str:
        return f"{self.model.spec} | {self.variant.label}"

    @property
    def head(self) -> dict[str, Any]:
        """What every file says of the row."""
        return {"key": self.key, "model": self.model.spec, "variant": self.variant.label, "batch": self.batch}

    @property
    def spec(self) -> str:
        return f"{self.model.spec}{',' if ':' in self.model.spec else ':'}batch={self.batch}"

    @property
    def seconds(self) -> float:
        """What the row takes, roughly: to divide rows over pieces."""
        return COMPILED_SECONDS if self.variant.compiled else EAGER_SECONDS

    def plan(self, workload: Workload) -> ParallelPlan:
        """The plan that is predicted and executed."""
        again = workload.blocks if self.variant.recompute else ()
        return ParallelPlan(self.batch, precision=self.variant.precision, recompute=again)


def runs(quick: bool = False) -> list[Run]:
    """All rows: eager ones model by model, then compiled ones, so that who has little time leaves out the latter."""
    if quick:
        return [*(Run(m, v) for m in QUICK_MODELS for v in QUICK), Run(QUICK_MODELS[1], COMPILED)]
    eager = [Run(m, v) for m in MODELS for v in EAGER]
    some = (*MODELS[: BOTH_BATCHES // 2], *MODELS[6 : 6 + BOTH_BATCHES // 2])  # transformers and CNNs
    return [*eager, *(Run(m, COMPILED) for m in MODELS), *(Run(m, COMPILED_SMALL) for m in some)]


def pieces(quick: bool = False, limit: float = PIECE_SECONDS) -> dict[str, list[Run]]:
    """steps-1, steps-2, ...: rows in order, cut where a piece would be longer than `limit` estimated seconds.

    >>> list(pieces(quick=True))
    ['steps-1']
    """
    found: dict[str, list[Run]] = {}
    spent = limit
    for run in runs(quick):
        if spent + run.seconds > limit:
            found[f"steps-{len(found) + 1}"] = []
            spent = 0.0
        spent += run.seconds
        found[f"steps-{len(found)}"].append(run)
    return found
