"""What is recorded of torch's CPU allocator."""

from __future__ import annotations

import pytest
import torch
from torch.autograd.profiler import record_function

from validation.allocations import recorded_allocations


def test_sizes_and_marks_come_in_the_order_of_time():
    kept = torch.ones(16)
    with recorded_allocations() as allocations:
        first = torch.empty(1000)
        with record_function("between"):
            second = torch.empty(3, dtype=torch.float64)
        del first
        kept = kept.double()  # the older one goes unseen
    marks = [(name, size) for _, name, size in allocations if name == "between" or size]
    assert marks == [("", 4000), ("between", 0), ("", 24), ("", -4000), ("", 128)]
    assert second.nbytes == 24 and kept.nbytes == 128
    assert [at for at, _, _ in allocations] == sorted(at for at, _, _ in allocations)


def test_what_autograd_allocates_is_seen():
    weight = torch.ones(50, 40, requires_grad=True)
    with recorded_allocations() as allocations:
        (weight * 2).sum().backward()
    assert sum(size for _, _, size in allocations) == weight.nbytes  # the gradient stays


def test_an_error_ends_the_recording():
    with pytest.raises(ValueError, match="inside"), recorded_allocations():
        raise ValueError("inside")
    with recorded_allocations() as allocations:
        pass
    assert [size for _, _, size in allocations if size] == []
