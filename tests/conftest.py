"""For all tests."""

from __future__ import annotations

import os
import signal
from collections.abc import Iterator

import pytest
from hypothesis import settings

# Files of tests run beside each other: threads of several processes that wait for one another on the same cores take a
# tick of the scheduler, 4 ms, for what takes microseconds. Before torch is imported.
if "PYTEST_XDIST_WORKER" in os.environ:
    os.environ.setdefault("OMP_NUM_THREADS", "1")

# No test asserts a wall clock, so no example has a deadline either.
settings.register_profile("parplan", deadline=None)
settings.load_profile("parplan")

# A shell that starts the tests in the background makes them ignore Ctrl-C, and every process that they start inherits
# that; some tests send just that signal.
if signal.getsignal(signal.SIGINT) is signal.SIG_IGN:
    signal.signal(signal.SIGINT, signal.default_int_handler)


@pytest.fixture(autouse=True, scope="session")
def never_this_machines_calibration(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    """What `parplan calibrate` found here, at whatever time, decides no test."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("XDG_CACHE_HOME", str(tmp_path_factory.mktemp("cache")))
        yield
