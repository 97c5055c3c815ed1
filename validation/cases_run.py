"""Predicts published runs row by row; a row that cannot be predicted keeps its reason."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from math import inf
from pathlib import Path
from typing import Any

from validation.cases import Case, CaseError

GIB = 2**30
Progress = Callable[[str, float], None]


@dataclass(frozen=True, slots=True)
class Outcome:
    """Seconds and bytes; None where nothing was predicted or measured. interval: nine in ten steps should lie inside.
    reserved_bytes: what torch's caching allocator takes of a GPU. parts: device seconds by kind of work of the busiest
    stage (of a CNN: the first). reason: why nothing was predicted, empty otherwise."""

    case: Case
    predicted_seconds: float | None = None
    interval: tuple[float, float] | None = None
    allocated_bytes: int | None = None
    reserved_bytes: int | None = None
    parts: dict[str, float] = field(default_factory=dict)
    shares: dict[str, float] = field(default_factory=dict)
    plan: str = ""
    software: str = ""
    notes: tuple[str, ...] = ()
    reason: str = ""

    @property
    def measured_seconds(self) -> float | None:
        return _published(self.case, "step_time_s")

    @property
    def error(self) -> float | None:
        """Predicted over measured, less one."""
        return _error(self.predicted_seconds, self.measured_seconds)

    @property
    def inside(self) -> bool | None:
        """Whether the measured step lies in the interval."""
        if self.interval is None or self.measured_seconds is None:
            return None
        return self.interval[0] <= self.measured_seconds <= self.interval[1]

    @property
    def allocated_error(self) -> float | None:
        measured = _published(self.case, "peak_mem_alloc_gib")
        return _error(self.allocated_bytes, measured * GIB if measured else None)

    @property
    def reserved_error(self) -> float | None:
        measured = _published(self.case, "peak_mem_reserved_gib")
        return _error(self.reserved_bytes, measured * GIB if measured else None)


def _published(case: Case, name: str) -> float | None:
    """A measured number; None where it is not stated or cannot have been measured."""
    try:
        value = case.number(name)
    except CaseError:
        return None
    return value if value is not None and 0 < value < inf else None


def _error(predicted: float | None, measured: float | None) -> float | None:
    return predicted / measured - 1 if predicted is not None and measured else None


def run_cases(cases: Sequence[Case], progress: Progress, folder: Path = Path()) -> list[Outcome]:
    """All rows, in their order; rows of one model share its trace, equal rows their prediction. folder: where device
    files that rows name may lie."""
    runner = _Runner(folder)
    outcomes = []
    for i, case in enumerate(cases):
        progress(f"predicting {case.set}", i / len(cases))
        outcomes.append(runner.outcome(case))
    return outcomes


class _Runner:
    def __init__(self, folder: Path) -> None:
        from validation import cases_transformer, cases_vision

        self.folder = folder
        self.traces = cases_transformer.Traces()
        self.pictures = cases_vision.Traces()
        self.clusters: dict[tuple[str, ...], Any] = {}
        self.devices: dict[str, Any] = {}
        self.known: dict[Any, Outcome] = {}

    def outcome(self, case: Case) -> Outcome:
        try:
            return self._vision(case) if case.kind == "vision" else self._transformer(case)
        except ValueError as error:  # a CaseError, or a plan or model that does not fit, or a shape not divisible
            return Outcome(case, reason=str(error))
        except Exception as error:  # ours: the other rows of the file are predicted all the same
            said = str(error).strip().partition("\n")[0][:200]
            return Outcome(case, reason=f"a fault of Parplan ({type(error).__name__}: {said}); please report the row")

    def cluster(self, case: Case) -> Any:
        """Clusters are shared so that their devices remember prices."""
        from validation.cases_cluster import MACHINES, cluster_of

        names = ("gpu", "num_gpus", "gpus_per_node", "intra_node", "inter_node", "interconnect")
        key = (MACHINES.get(case.text("set"), ""), *(case.text(name) for name in names))
        if key not in self.clusters:
            self.clusters[key] = cluster_of(case, self.devices, self.folder)
        return self.clusters[key]

    def _transformer(self, case: Case) -> Outcome:
        from planner.folded import predict_folded
        from validation.cases_notes import notes_of
        from validation.cases_software import software_of
        from validation.cases_transformer import model_of, plan_of

        software = software_of(case)
        plan = plan_of(case, software)
        cluster = self.cluster(case)
        model = model_of(case, software, self.traces)
        key = (id(model.graph), model.layers, plan, software, id(cluster))
        if key not in self.known:
            p = predict_folded(model, plan, cluster, software, replay=cluster.device.kind == "gpu")
            self.known[key] = Outcome(
                case, p.step_seconds, p.interval, p.allocated_bytes, p.reserved_bytes or None,
                p.device, p.shares, plan.label, software.name, cluster.notes,
            )  # fmt: skip
        notes = notes_of(case, cluster.device)
        found = self.known[key]
        return _fitting(replace(found, case=case, notes=(*cluster.notes, *notes)), cluster)

    def _vision(self, case: Case) -> Outcome:
        from planner.whole_step import predict_whole
        from validation import cases_vision as vision
        from validation.cases_notes import notes_of_pictures

        plan, software = vision.plan_of(case), vision.software_of(case)
        sharing = vision.sharing_of(case)
        cluster = self.cluster(case)
        precision = plan.precision if plan.precision in ("fp16", "bf16") else "fp32"
        graph = self.pictures.graph(vision.model_name(case), precision, plan.micro_batch)
        p = predict_whole(graph, plan, cluster, software, sharing, vision.around_of(case, plan))
        found = Outcome(
            case, p.step_seconds, p.interval, p.allocated_bytes, None, p.device, p.shares, plan.label, software.name,
            (*cluster.notes, *notes_of_pictures(case, plan.precision, cluster.device)),
        )  # fmt: skip
        return _fitting(found, cluster)


def _fitting(found: Outcome, cluster: Any) -> Outcome:
    """With a note where the prediction needs more memory than a device has."""
    allocated, holds = (found.allocated_bytes or 0) / GIB, cluster.device.memory_bytes / GIB
    if cluster.node_memory:  # which the cores share
        holds = cluster.node_memory / GIB / found.case.whole("num_gpus")
    needs = (found.reserved_bytes or 0) / GIB or allocated
    if needs <= holds:
        return found
    both = f"{needs:.1f} GiB reserved, {allocated:.1f} allocated," if found.reserved_bytes else f"{needs:.1f} GiB"
    note = f"does not fit by this prediction: {both} on a device of {holds:.1f} GiB"
    return replace(found, notes=(*found.notes, note))
