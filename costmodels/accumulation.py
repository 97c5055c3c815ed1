"""What a matrix product pays for adding its result to a float32 buffer, as Megatron's and Transformer Engine's products
for the weights' gradients do: it reads and writes 4 bytes an element in place of writing 2."""

from __future__ import annotations

from functools import cache

from costmodels.device import Device, load_device
from costmodels.relatives import same_generation

# Share of the time which a kernel of its own would take to move the additional bytes, that the product does not hide
# behind its arithmetic: EMPIRICAL, by `python -m validation.fit_accumulation` (reports/accumulation) from the op tables
# of two machines (system files of SimuMax 1.2: A100 PCIe, B200).
EXPOSED = {"a100-pcie-80gb": 0.47, "b200": 0.75}
ELSEWHERE = 0.61  # ASSUMPTION: other generations lie between the two


def exposed_share(device: Device) -> float:
    """The share for a device: what was measured of its generation, else the middle."""
    return next((share for name, share in EXPOSED.items() if same_generation(device, _measured(name))), ELSEWHERE)


@cache
def _measured(name: str) -> Device:
    return load_device(name)
