"""Products that add to float32 buffers hide a part of what that moves."""

from __future__ import annotations

import pytest

from costmodels.accumulation import ELSEWHERE, EXPOSED, exposed_share
from costmodels.device import load_device


@pytest.mark.parametrize(
    ("name", "share"),
    [
        ("a100-sxm-80gb", EXPOSED["a100-pcie-80gb"]), ("a100-pcie-40gb", EXPOSED["a100-pcie-80gb"]),
        ("b200", EXPOSED["b200"]), ("gb200", EXPOSED["b200"]), ("h100-sxm", ELSEWHERE), ("mi300x", ELSEWHERE),
    ],
)  # fmt: skip
def test_a_generation_has_what_was_measured_of_it(name: str, share: float) -> None:
    assert exposed_share(load_device(name)) == share
    assert 0 < share < 1
