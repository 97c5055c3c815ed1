"""What a product pays that adds its result to a float32 buffer: the shares in `costmodels.accumulation`.

    python -m validation.fit_accumulation --config a100_pcie.json --device a100-pcie-80gb [--json]

The system files of SimuMax hold times of single products with and without accumulation (none of a step), mostly of
different shapes. So the law of products is fitted to those without; what those that add to float32 take beyond it, over
what a kernel of its own would take to move the additional bytes (4 read, and 4 written in place of 2), is the share of
a shape. Half of the shapes, by a hash, gives the median; the other half is scored with it, with 0 and with 1.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from costmodels.device import Device, load_device
from costmodels.ops import OpShape, price
from validation.fit_gemm_law import calibration_half, fit, predictions
from validation.fit_machine import accumulated, products

Array = NDArray[np.float64]
READ, WRITTEN = 4, 2  # bytes an element beyond those of a product that writes 16 bits


def main(arguments: Sequence[str] | None = None) -> int:
    """Entry of the command; 2 for input that cannot be used."""
    parser = argparse.ArgumentParser(prog="python -m validation.fit_accumulation", description=__doc__.splitlines()[0])
    parser.add_argument("--config", type=Path, required=True, help="system file of SimuMax (JSON)")
    parser.add_argument("--device", required=True, help="catalogue device that the machine has")
    parser.add_argument("--json", action="store_true")
    options = parser.parse_args(arguments)
    try:
        found = share_of(json.loads(options.config.read_text()), options.device)
    except (OSError, ValueError, KeyError) as error:
        print(f"fit_accumulation: {options.config} and {options.device}: {error}", file=sys.stderr)
        return 2
    if options.json:
        print(json.dumps(found, indent=1))
        return 0
    print(f"{found['plain']} products without, fitted to {found['law_error']:.1%}; {found['rows']} with accumulation")
    print(f"share that is not hidden: {found['share']:.2f} (quartiles {found['low']:.2f} to {found['high']:.2f})")
    for name, what in (("none", "without any"), ("fitted", "with the share"), ("whole", "with all of it")):
        print(f"held out ({found['held_out']}), {what}: {found[name]:.1%}, bias {found[name + '_bias']:+.1%}")
    return 0


def share_of(config: dict[str, Any], name: str) -> dict[str, Any]:
    """share, with the quartiles low and high; none, fitted, whole: mean absolute errors on the held-out half with no,
    this and all of the additional time, and their biases. name: of the device. ValueError where the file has no such
    products."""
    plain = next((t for t in products(config, name, "plain", False) if t.section == "bfloat16"), None)
    device, (dims, seconds) = load_device(name), accumulated(config)
    if plain is None or len(dims) < 4:
        raise ValueError("there are no products with and without accumulation; give a system file that has both")
    law = fit(plain, np.ones(len(plain.dims), bool))
    alone, own = (predictions(law, d)[1] for d in (dims, plain.dims))
    whole = np.array([additional_seconds(device, int(b * m * n)) for b, m, n, _ in dims])
    each, half = (seconds - alone) / whole, calibration_half(dims)
    if half.all() or not half.any():
        raise ValueError("too few products with accumulation; half of them is held out")
    share = float(np.median(each[half]))
    found = {"share": share, "low": float(np.quantile(each[half], 0.25)), "high": float(np.quantile(each[half], 0.75)),
             "plain": len(plain.dims), "law_error": float(abs(own / plain.seconds - 1).mean()), "rows": len(dims),
             "held_out": int((~half).sum())}  # fmt: skip
    for name, part in (("none", 0.0), ("fitted", share), ("whole", 1.0)):
        error = ((alone + part * whole) / seconds - 1)[~half]
        found |= {name: float(abs(error).mean()), f"{name}_bias": float(error.mean())}
    return found


def additional_seconds(device: Device, elements: int) -> float:
    """What a kernel of its own would take to move the additional bytes."""
    moved = READ * elements, WRITTEN * elements
    shape = OpShape("aten.add_.Tensor", "backward", ((elements,),), ((elements,),), "float32", 0, *moved)
    return price(device, shape).seconds


if __name__ == "__main__":
    sys.exit(main())
