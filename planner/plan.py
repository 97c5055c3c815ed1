"""`ParallelPlan`: how one training step is split. The same object is estimated, simulated, dry-run and executed."""

from __future__ import annotations

import json
from collections.abc import Iterable
from dataclasses import asdict, dataclass, fields
from math import prod
from pathlib import Path
from typing import Any, Literal, get_args

from opgraph.graph import MOST_SAMPLES

SCHEMA_VERSION = 4
OLDER_SCHEMAS = (1, 2, 3)  # read as plans without the fields that came later
DataParallel = Literal["ddp", "zero1", "zero2", "fsdp"]
Schedule = Literal["gpipe", "1f1b"]
Precision = Literal["fp32", "tf32", "fp16", "bf16", "fp8"]
Sharding = Literal["colwise", "rowwise"]
Kept = Literal["products", "attention"]
Offloaded = Literal["parameters", "optimizer", "activations"]
AXES = ("pp", "dp", "tp")


@dataclass(frozen=True, slots=True)
class ParallelPlan:
    """A plan for one model on `pp * dp * cp * tp` devices.

    Rank r sits at row-major coordinates of the mesh (pp, dp, tp), tp innermost; context-parallel ranks, where there
    are any, lie between dp and tp and share the gradients of the dp axis.

    global_batch: samples per optimizer step, over all data-parallel ranks.
    micro_batches: micro-batches per step and data-parallel rank.
    data_parallel: how dp ranks keep the model; without effect where dp == 1. "fsdp" is `fully_shard`, ZeRO-3; "zero2"
        the same with parameters that stay whole from their forward to the end of the step's last backward.
    schedule: order of micro-batches; without effect where pp == 1.
    cuts: module paths at which pipeline stage 1, 2, ... begins (pp * vpp - 1 of them, in execution order).
    shardings: (module path, style) of the tensor-parallel Linear modules: "colwise" splits the output
        features, "rowwise" the input features and all-reduces its output. A colwise output stays sharded,
        a rowwise input is expected sharded (Megatron pairs).
    fsdp_units: module paths wrapped by `fully_shard`, besides the root (or the stage's root).
    recompute: module paths whose activations are recomputed in backward, in execution order. Whole blocks are full
        recomputation; the modules between the projections of attention ("blocks.0.attn.core" of
        `opgraph.zoo.transformer`) are Megatron's selective one (Korthikanti et al. 2022, section 5).
    recompute_first: of these paths, how many each stage recomputes, its first ones; one number counts for every stage,
        none stands for all of them.
    recompute_keeps: kinds of ops in recomputed modules whose outputs are kept, not made again: "products" (matrix
        products and convolutions), "attention" (fused kernels). torch calls it selective checkpointing.
    offload: what is kept in host memory: "parameters" (the shards of `fully_shard`, their gradients, and with them the
        optimizer, as torch's CPUOffloadPolicy does it), "optimizer" (its state and its step alone, as ZeRO-Offload),
        "activations" (what recomputed modules keep of their inputs).
    precision: "fp32" (torch as it comes: convolutions and recurrent layers round to tf32 where a GPU has it), "tf32"
        (products too, `torch.set_float32_matmul_precision("high")`), "bf16" (autocast, fp32 parameters and gradients),
        "fp16" (the same with loss scaling, `opgraph.scaling`), or "fp8" (products of repeated blocks in 8 bits, the
        rest as in bf16, `opgraph.eight_bits`; predicted, not executed).
    bucket_bytes: a DDP bucket closes once it holds this much; at the default 25 MiB the first one closes at 1 MiB,
        as torch does it.
    vpp: model chunks per pipeline stage (interleaved 1F1B). sequence_parallel: what tensor parallelism leaves whole
        is split along the sequence (Korthikanti 2022). cp: ranks that share the sequence of a sample. ep: ranks,
        within dp, that share the experts; each expert is split over tp (`etp`). These and 16-bit training without
        autocast are predicted by `planner.folded`, not executed yet.
    """

    global_batch: int
    pp: int = 1
    dp: int = 1
    tp: int = 1
    micro_batches: int = 1
    data_parallel: DataParallel = "ddp"
    schedule: Schedule = "1f1b"
    cuts: tuple[str, ...] = ()
    shardings: tuple[tuple[str, Sharding], ...] = ()
    fsdp_units: tuple[str, ...] = ()
    recompute: tuple[str, ...] = ()
    precision: Precision = "fp32"
    bucket_bytes: int = 25 * 2**20
    vpp: int = 1
    sequence_parallel: bool = False
    cp: int = 1
    ep: int = 1
    recompute_first: tuple[int, ...] = ()
    recompute_keeps: tuple[Kept, ...] = ()
    offload: tuple[Offloaded, ...] = ()

    def __post_init__(self) -> None:
        for axis in (*AXES, "cp", "ep", "vpp"):
            if getattr(self, axis) < 1:
                raise ValueError(f"{axis} is {getattr(self, axis)}; every mesh axis needs a size of 1 or more")
        if self.dp * self.cp * self.tp % self.ep:
            raise ValueError(
                f"ep = {self.ep} does not divide dp = {self.dp} (x cp x tp); expert-parallel ranks are those of a stage"
            )
        if self.vpp > 1 and self.pp == 1:
            raise ValueError(f"vpp = {self.vpp} needs a pipeline; use pp of 2 or more, or vpp = 1")
        if self.global_batch > MOST_SAMPLES:
            raise ValueError(f"a global batch of {self.global_batch} is more than {MOST_SAMPLES:,}; give a smaller one")
        if self.global_batch % (self.dp * self.micro_batches):
            raise ValueError(
                f"global batch {self.global_batch} is not divisible by dp x micro-batches = "
                f"{self.dp} x {self.micro_batches}; use a multiple of {self.dp * self.micro_batches}"
            )
        if len(self.cuts) != self.pp * self.vpp - 1:
            chunks = f" x vpp = {self.vpp}" if self.vpp > 1 else ""
            needed = self.pp * self.vpp - 1
            raise ValueError(
                f"pp = {self.pp}{chunks} needs {needed} cuts (module paths), but {len(self.cuts)} are given"
            )
        if self.tp > 1 and not self.shardings:
            raise ValueError(f"tp = {self.tp} needs shardings (module path and style), but none are given")
        self._check_recompute()
        self._check_offload()

    def _check_recompute(self) -> None:
        first, kinds = self.recompute_first, get_args(Kept)
        if (first or self.recompute_keeps) and not self.recompute:
            raise ValueError("recompute_first and recompute_keeps change what is recomputed, but recompute is empty")
        if first and (len(first) not in (1, self.pp) or min(first) < 0):
            raise ValueError(
                f"recompute_first is {list(first)}; give one number of modules, or one for each of the {self.pp} stages"
            )
        if first and max(first) == 0:
            raise ValueError(
                "recompute_first recomputes none of the modules in any stage; give 1 or more, or leave recompute out"
            )
        most = sum(first) if len(first) > 1 else max(first, default=0)
        if most > len(self.recompute):
            raise ValueError(
                f"recompute_first is {', '.join(str(n) for n in first)}, but recompute names {len(self.recompute)} "
                f"module{'s' * (len(self.recompute) > 1)}; give at most so many"
                + (", or leave it out to recompute all" if len(first) == 1 else " in all")
            )
        if unknown := [kind for kind in self.recompute_keeps if kind not in kinds]:
            raise ValueError(f"recompute_keeps names {unknown[0]!r}; it knows {' and '.join(kinds)}")

    def _check_offload(self) -> None:
        kinds = get_args(Offloaded)
        if unknown := [kind for kind in self.offload if kind not in kinds]:
            raise ValueError(f"offload names {unknown[0]!r}; it knows {', '.join(kinds)}")
        if "parameters" in self.offload and not self.fully_sharded:
            raise ValueError(
                "offload of parameters needs shards of them (CPUOffloadPolicy of fully_shard); use fsdp or zero2 with "
                "dp of 2 or more, or offload the optimizer alone"
            )
        if "activations" in self.offload and not self.recompute:
            raise ValueError(
                "offload of activations moves what recomputed modules keep, but recompute is empty; add recompute"
            )

    @property
    def world_size(self) -> int:
        return self.pp * self.dp * self.cp * self.tp

    @property
    def etp(self) -> int:
        """Tensor-parallel ranks that split each expert."""
        return expert_parts(self.dp * self.cp, self.tp, self.ep)

    @property
    def expert_replicas(self) -> int:
        """Ranks that hold the same parts of the same experts and share their gradients."""
        return self.dp * self.cp * self.tp // (self.ep * self.etp)

    @property
    def micro_batch(self) -> int:
        """Samples per micro-batch on one data-parallel rank."""
        return self.global_batch // (self.dp * self.micro_batches)

    @property
    def offloads_optimizer(self) -> bool:
        """Whether the optimizer's state lives, and its step runs, on the host."""
        return "optimizer" in self.offload or "parameters" in self.offload

    @property
    def fully_sharded(self) -> bool:
        """Whether dp ranks hold shards of the parameters between steps (`fully_shard`)."""
        return self.dp > 1 and self.data_parallel in ("fsdp", "zero2")

    def recomputed(self, stage: int, there: Iterable[str]) -> tuple[str, ...]:
        """What stage `stage` recomputes of `there`, those paths of `recompute` that it has, in order. ValueError where
        it is to recompute more than it has; one number for all stages is more than a short stage may have."""
        found, several = tuple(there), len(self.recompute_first) > 1
        if not self.recompute_first:
            return found
        first = self.recompute_first[stage if several else 0]
        if several and first > len(found):
            raise ValueError(
                f"recompute_first asks for {first} modules of stage {stage}, which has {len(found)} of those that "
                "recompute names; give at most so many"
            )
        return found[:first]

    @property
    def style(self) -> dict[str, Sharding]:
        return dict(self.shardings)

    def coordinates(self, rank: int) -> dict[str, int]:
        """Mesh coordinates of a rank, by axis."""
        return {"pp": rank // (self.dp * self.tp), "dp": rank // self.tp % self.dp, "tp": rank % self.tp}

    def group(self, rank: int, axis: str) -> tuple[int, ...]:
        """Ranks that differ from `rank` in `axis` only, in order, `rank` among them."""
        sizes = [getattr(self, a) for a in AXES]
        stride = prod(sizes[AXES.index(axis) + 1 :])
        first = rank - self.coordinates(rank)[axis] * stride
        return tuple(first + i * stride for i in range(getattr(self, axis)))

    def likes(self, rank: int, axis: str) -> range:
        """First ranks of all groups along `axis` ("dp" or "tp") in the pipeline stage of `rank`: they run the same
        script, and so communicate at the same time."""
        stride = self.dp * self.tp
        base = rank // stride * stride
        return range(base, base + self.tp) if axis == "dp" else range(base, base + stride, self.tp)

    @property
    def label(self) -> str:
        """A short name, as tables print it: `dp2 fsdp x tp2`, `pp2 1f1b mb4`."""
        parts = []
        if self.dp > 1:
            parts.append(f"dp{self.dp} {self.data_parallel}")
        if self.cp > 1:
            parts.append(f"cp{self.cp}")
        if self.tp > 1:
            parts.append(f"tp{self.tp}" + (" sp" if self.sequence_parallel else ""))
        if self.ep > 1:
            parts.append(f"ep{self.ep}")
        if self.pp > 1:
            parts.append(f"pp{self.pp} {self.schedule}" + (f" vpp{self.vpp}" if self.vpp > 1 else ""))
        name = " x ".join(parts) or "single"
        if self.micro_batches > 1:
            name += f" mb{self.micro_batches}"
        if self.recompute:
            name += " recompute" + "/".join(str(n) for n in self.recompute_first)
            name += "".join(f" keep-{kind}" for kind in self.recompute_keeps)
        name += "".join(" offload" if kind == "parameters" else f" offload-{kind}" for kind in self.offload)
        return name if self.precision == "fp32" else f"{name} {self.precision}"

    def to_dict(self) -> dict[str, Any]:
        return {"schema": SCHEMA_VERSION, **asdict(self)}

    def save(self, path: str | Path) -> None:
        Path(path).write_text(json.dumps(self.to_dict(), indent=2) + "\n")


def expert_parts(replicas: int, tp: int, ep: int) -> int:
    """Ranks that split each expert: those of tp, as Megatron-Core's `expert_tensor_parallel_size` has it by default
    (megatron/core/model_parallel_config.py), and none where ep spans tp, too: it does not divide the `replicas` (dp x
    cp) of the model alone."""
    return 1 if replicas % ep else tp


def plan_from_dict(data: dict[str, Any]) -> ParallelPlan:
    """The plan that `to_dict` wrote. ValueError for an unknown schema version or field."""
    data = dict(data)
    version = data.pop("schema", None)
    if version != SCHEMA_VERSION and version not in OLDER_SCHEMAS:
        raise ValueError(f"plan schema is {version!r}; this version of parplan reads schema {SCHEMA_VERSION}")
    known = {f.name for f in fields(ParallelPlan)}
    unknown = sorted(set(data) - known)
    if unknown:
        raise ValueError(f"unknown plan field(s) {', '.join(unknown)}; known fields are {', '.join(sorted(known))}")
    if "global_batch" not in data:
        raise ValueError("the plan has no global_batch; give the samples per optimizer step")
    for name in ("cuts", "fsdp_units", "recompute", "recompute_first", "recompute_keeps", "offload"):
        data[name] = tuple(data.get(name, ()))
    data["shardings"] = tuple((str(path), style) for path, style in data.get("shardings", ()))
    return ParallelPlan(**data)


def check_executable(plan: ParallelPlan) -> None:
    """ValueError, in one sentence, for what torch's own runtimes are not driven to do yet."""
    check_lowerable(plan)
    if plan.precision == "fp8":
        raise ValueError(
            "a plan in fp8 is predicted only: torch's autocast knows no 8-bit products, which need other layers "
            "(Transformer Engine, torchao); execute it in bf16"
        )


def check_lowerable(plan: ParallelPlan) -> None:
    """ValueError, in one sentence, for what is predicted for folded transformers alone."""
    beyond = {
        f"vpp = {plan.vpp}": plan.vpp > 1,
        "sequence_parallel": plan.sequence_parallel,
        f"cp = {plan.cp}": plan.cp > 1,
        f"ep = {plan.ep}": plan.ep > 1,
    }
    if found := [name for name, there in beyond.items() if there]:
        raise ValueError(
            f"{', '.join(found)} can be predicted for folded transformers (parplan predict --cases) but is neither "
            "lowered op by op nor executed yet; use a plan without it"
        )


def load_plan(path: str | Path) -> ParallelPlan:
    """Reads a plan file. ValueError with one sentence if it is not one."""
    try:
        data = json.loads(Path(path).read_text())
    except OSError as error:
        raise ValueError(f"plan file {path} cannot be read: {error.strerror}") from None
    except json.JSONDecodeError as error:
        raise ValueError(f"plan file {path} is not JSON: {error}") from None
    if not isinstance(data, dict):
        raise ValueError(f"plan file {path} holds no JSON object; write one with ParallelPlan.save")
    return plan_from_dict(data)
