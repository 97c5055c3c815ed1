"""The environment that every measured or executed rank runs in. Calibration and execution must use the same one."""

from __future__ import annotations

# One thread per rank (a rank is a device). The malloc settings keep large tensors in the heap: otherwise every step
# page-faults its large outputs anew, _log_softmax of 32 MiB takes twice as long (shared/facts/torch.md section 7).
RANK_ENV = {
    "OMP_NUM_THREADS": "1",
    "MALLOC_MMAP_MAX_": "0",
    "MALLOC_TRIM_THRESHOLD_": "17179869184",
    "MALLOC_TOP_PAD_": "67108864",
}
