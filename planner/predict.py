"""A plan's step time, memory, and how sure we are of them."""

from __future__ import annotations

from dataclasses import asdict, dataclass, field
from math import hypot

from costmodels.cluster import Cluster
from costmodels.device import BRIEF_STEP, Device, basis_of
from costmodels.families import family
from costmodels.ops import peak_of
from costmodels.rounding import in_precision
from costmodels.variability import synchronous
from opgraph.eight_bits import EIGHT_BIT
from opgraph.graph import OpGraph
from opgraph.summary import model_flops
from planner.host_thread import EAGER, HOST_ERROR, Running, assumptions, host_costs, host_notes
from planner.lower import Lowered, lower
from planner.memory import RankMemory, memory
from planner.offload import is_apart, offload_notes
from planner.plan import ParallelPlan, Precision
from simulator import Timeline, breakdown, overall, simulate

NINE_IN_TEN = 1.645  # standard deviations on either side of the mean of a normal distribution
# What whole steps on devices that nobody calibrated are off beyond the errors of their ops: GPUs of one cluster differ
# by 5 %, releases of one recipe by 0.5 to 8 %, trainers by what `planner.software` does not know. The least number with
# which nine in ten published rows lie inside their intervals, in the mean of 18 sets. Each set scored with what the
# other 17 ask for (0.07 to 0.1), 0.89 do; without it 0.77 do:
# `python -m validation.fit_step_error reports/published`.
STEP_ERROR = 0.095
FORMATS = {"tf32": "tf32", "fp16": "float16", "bf16": "bfloat16", "fp8": "float8_e4m3fn"}  # whose peak an MFU takes


@dataclass(frozen=True, slots=True)
class Prediction:
    """What one plan will do. Times in seconds, sizes in bytes.

    interval: nine in ten step times should lie between these: the errors of the laws and tables on held-out samples,
    that of whole calibration steps (`Device.step_error`, `brief_error`, `STEP_ERROR` without), and that of the host's
    assumed speed, added in squares, 1.645 standard deviations wide. peak_bytes: tensor bytes at the worst moment, by
    rank; memory_bytes: what a rank has. breakdown: compute, exposed_communication, bubble (nothing of the rank runs: it
    waits for others) and host (waiting for the host thread), averaged over ranks; they sum to the step. mfu: model FLOP
    (`opgraph.summary.model_flops`) over what the step's devices would do at their peak (`mfu_peak`). shares: of the
    time by kind of price. unpriced: ops that no model covers. tasks: simulated. at_peak: bytes by category
    (`memory_ledger.CATEGORIES`) at the worst moment of the fullest rank; resting_bytes: what it holds between steps.
    assumed: options that the step is assumed to run with; fused: chains of ops that a compiled step runs as one kernel,
    and how often. host_bytes: by category, what offload keeps of the fullest rank in the host's memory at most, of
    which host_pinned_bytes are page-locked.
    """

    plan: ParallelPlan
    step_seconds: float
    interval: tuple[float, float]
    peak_bytes: tuple[int, ...]
    memory_bytes: int
    fits: bool
    breakdown: dict[str, float]
    mfu: float
    shares: dict[str, float]
    unpriced: tuple[str, ...]
    notes: tuple[str, ...]
    tasks: int
    at_peak: dict[str, int] = field(default_factory=dict)
    resting_bytes: int = 0
    assumed: tuple[str, ...] = ()
    fused: dict[str, int] = field(default_factory=dict)
    host_bytes: dict[str, int] = field(default_factory=dict)
    host_pinned_bytes: int = 0


def predict(
    graph: OpGraph, plan: ParallelPlan, cluster: Cluster, *, compiled: bool = False, cuda_graphs: bool = False
) -> Prediction:
    """Lowers, simulates and judges one plan; through torch.compile or replayed from CUDA graphs, where asked for.
    ValueError with one sentence where it is illegal for the model."""
    return simulate_plan(graph, plan, cluster, Running(cuda_graphs, compiled=compiled))[0]


def simulate_plan(
    graph: OpGraph, plan: ParallelPlan, cluster: Cluster, running: Running = EAGER
) -> tuple[Prediction, Timeline]:
    """The prediction with the simulated timeline of every task."""
    check_size(plan, cluster)
    cluster = synchronous(in_precision(cluster, plan.precision), plan.world_size)
    if plan.precision != graph.precision:
        raise ValueError(
            f"the plan computes in {plan.precision}, but the graph was traced in {graph.precision}; "
            f"trace with precision={plan.precision!r}"
        )
    graph = graph.run_by(cluster.device.kind)
    lowered = lower(graph, plan, cluster, running)
    timeline = simulate(lowered.program)
    return _judge(graph, plan, cluster, running, lowered, timeline), timeline


def check_size(plan: ParallelPlan, cluster: Cluster) -> None:
    """ValueError where a plan needs more devices than the cluster has; cores of one machine may be shared."""
    if plan.world_size > cluster.size and not cluster.cores:
        raise ValueError(
            f"the plan needs {plan.world_size} devices (pp {plan.pp} x dp {plan.dp} x tp {plan.tp}), but "
            f"{cluster.name} has {cluster.size}; use fewer, or more nodes"
        )


def _judge(
    graph: OpGraph, plan: ParallelPlan, cluster: Cluster, running: Running, lowered: Lowered, timeline: Timeline
) -> Prediction:
    step = timeline.makespan
    total = sum(lowered.seconds_by_source.values()) or 1.0
    parts = asdict(overall(breakdown(timeline)))
    waited = parts["host"] / step if step else 0.0
    said, away = host_notes(waited, host_costs(cluster, running)), offload_notes(plan, cluster)
    notes = (*graph.notes, *cluster.notes, *basis_of(cluster.device), *said, *away)
    notes += format_notes(graph, cluster.device)
    held = memory(lowered.stages, plan, cluster.backend)
    peaks = device_peaks(held, cluster)
    fullest = max(held, key=lambda m: m.peak)
    capacity = memory_per_rank(cluster, plan)
    flops = model_flops(graph.at_batch(plan.micro_batch)) * plan.micro_batches * plan.dp
    devices = min(plan.world_size, cluster.size)
    mfu = flops / (step * devices * mfu_peak(graph, plan.precision, cluster.device)) if step else 0.0
    if mfu > 1:
        notes += ("MFU is above 100 %: convolutions by Winograd or FFT multiply less often than FLOP are counted",)
    return Prediction(
        plan=plan,
        step_seconds=step,
        interval=interval_of(step, waited, lowered, cluster, plan.micro_batches),
        peak_bytes=peaks,
        memory_bytes=capacity,
        fits=max(peaks) <= capacity,
        breakdown=parts,
        mfu=mfu,
        shares={k: v / total for k, v in sorted(lowered.seconds_by_source.items())},
        unpriced=lowered.unpriced,
        notes=tuple(dict.fromkeys(notes)),
        tasks=len(lowered.program),
        at_peak={str(category): size for category, size in fullest.at_peak.items()},
        resting_bytes=fullest.resting,
        assumed=assumptions(running),
        fused=lowered.fused,
        host_bytes={str(category): size for category, size in fullest.host.items()},
        host_pinned_bytes=fullest.pinned,
    )


def mfu_peak(graph: OpGraph, precision: Precision, device: Device) -> float:
    """FLOP/s of one device that an MFU is a share of: the peak of the plan's precision. fp32 is torch as it comes, so
    there it is that of the format in which most FLOP run: tf32 for convolutions rounded unasked (`Device.in_tf32`)."""
    if precision != "fp32":
        return peak_of(device, FORMATS[precision])
    flops: dict[str, int] = {"float32": 0}
    for op in graph.ops:
        if op.flops:
            dtype = "tf32" if family(op.name) in device.in_tf32 else graph.tensors[op.inputs[0]].dtype
            flops[dtype] = flops.get(dtype, 0) + op.flops
    return peak_of(device, max(flops, key=lambda dtype: flops[dtype]))


def format_notes(graph: OpGraph, device: Device) -> tuple[str, ...]:
    """What a reader should know of the formats of a step: that torch rounds float32 to tf32 unasked, or that a device
    has no units for them (`costmodels.ops.peak_of` says what stands in)."""
    if graph.precision == "tf32":
        return () if device.in_tf32 else (f"{device.name} has no tf32; the step is that in fp32",)
    if graph.precision == "fp8" and EIGHT_BIT not in device.peak_flops:
        return (f"{device.name} has no fp8; its products run in bfloat16, on weights that inference keeps in 8 bits",)
    heavy = [op for op in graph.ops if family(op.name) in ("gemm", "conv", "attention")]
    for half in ("bfloat16", "float16"):
        if any(graph.tensors[t].dtype == half for op in heavy for t in op.inputs):
            if device.kind == "cpu" or half in device.peak_flops:
                return ()
            return (f"{device.name} has no {half}; its products are priced at the rate of float32",)
    kinds = {family(op.name) for op in graph.ops} & set(device.in_tf32) & {"conv", "rnn"}
    names = " and ".join({"conv": "convolutions", "rnn": "recurrent layers"}[kind] for kind in sorted(kinds))
    said = f"{names} run in tf32, as torch has it unless torch.backends.cudnn.allow_tf32 is off"
    return (said,) if names else ()


def device_peaks(held: tuple[RankMemory, ...], cluster: Cluster) -> tuple[int, ...]:
    """Most bytes in the memory of every rank's device; what was sent to the host is still there where that is one."""
    return tuple(m.peak + (0 if is_apart(cluster) else sum(m.host.values())) for m in held)


def interval_of(
    seconds: float, waited: float, lowered: Lowered, cluster: Cluster, passes: int = 1
) -> tuple[float, float]:
    """Between which nine in ten such times should lie, where a share `waited` of them is waiting for the host. passes:
    over the model, one after another; short ones err as brief steps do."""
    total = sum(lowered.seconds_by_source.values()) or 1.0
    whole = cluster.device.step_error
    if cluster.device.kind != "cpu" or not whole:  # that of GPUs is their spread alone
        whole = max(whole, STEP_ERROR)
    if seconds / passes < BRIEF_STEP:
        whole = max(whole, cluster.device.brief_error)
    spread = NINE_IN_TEN * hypot(lowered.deviation / total, whole, waited * HOST_ERROR)
    return seconds * max(0.0, 1 - spread), seconds * (1 + spread)


def memory_per_rank(cluster: Cluster, plan: ParallelPlan) -> int:
    """Bytes that one rank may use: its device's, or its share of the node's."""
    if not cluster.node_memory:
        return cluster.device.memory_bytes
    ranks = max(1, -(-plan.world_size // cluster.nodes))
    return cluster.node_memory // ranks
