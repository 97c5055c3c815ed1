"""A row's prediction does not depend on what was measured."""

from __future__ import annotations

from dataclasses import replace

from tests.validation.test_cases import outcome_of, row
from validation.cases_cluster import cluster_of
from validation.cases_run import Outcome, _fitting


def test_memory_is_the_same_whether_or_not_it_was_measured() -> None:
    asked, measured = outcome_of(), outcome_of(peak_mem_alloc_gib="3.0", peak_mem_reserved_gib="4.0")
    assert asked.reserved_bytes and asked.allocated_bytes and asked.allocated_bytes < asked.reserved_bytes
    assert (asked.allocated_bytes, asked.reserved_bytes) == (measured.allocated_bytes, measured.reserved_bytes)


def test_a_step_fits_by_what_the_allocator_reserves() -> None:
    case = row()
    cluster = cluster_of(case, {})
    gib = cluster.device.memory_bytes // 80
    for allocated, reserved, fits in ((70, 80, True), (79, 81, False), (81, None, False), (79, None, True)):
        found = Outcome(case, 1.0, allocated_bytes=allocated * gib, reserved_bytes=reserved and reserved * gib)
        assert (_fitting(found, cluster).notes == ()) == fits
    cores = cluster_of(row(gpu="local", num_gpus="2"), {})
    half = replace(found, allocated_bytes=int(0.6 * cores.node_memory), case=row(gpu="local", num_gpus="2"))
    assert _fitting(half, cores).notes and not _fitting(replace(half, case=row(num_gpus="1")), cores).notes
