"""Which float32 operators a device runs in tf32: what torch does unasked, and what a step asks for.

Sources: torch's notes "TensorFloat-32 (TF32) on Ampere (and later) devices" (`torch.backends.cudnn.allow_tf32` is on,
`torch.backends.cuda.matmul.allow_tf32` is off since torch 1.12; `torch.set_float32_matmul_precision("high")` turns it
on): convolutions and recurrent layers round unasked, products do not. It is so for NVIDIA's GPUs; that AMD's, whose
xf32 is behind a switch of its own, and other accelerators round nothing unasked is an ASSUMPTION.
"""

from __future__ import annotations

from dataclasses import replace

from costmodels.cluster import Cluster
from costmodels.device import Device
from costmodels.relatives import vendor

UNASKED = ("conv", "conv_backward", "rnn", "rnn_backward")
ASKED = ("gemm", *UNASKED)


def rounded_families(device: Device, precision: str) -> tuple[str, ...]:
    """Families whose float32 operators run in tf32 on the device in a step of this precision ("fp32" is torch as it
    comes, "tf32" with its products rounded too)."""
    if device.kind == "cpu" or "tf32" not in device.peak_flops:
        return ()
    if precision == "tf32":
        return ASKED
    return UNASKED if precision == "fp32" and vendor(device) == "NVIDIA" else ()


def in_precision(cluster: Cluster, precision: str) -> Cluster:
    """The cluster whose devices price float32 operators as they run in a step of this precision. ValueError for fp8 on
    CPUs."""
    if precision == "fp8" and cluster.device.kind == "cpu":
        raise ValueError(f"nothing tells the time of products in fp8 on the CPUs of {cluster.name}; use bf16")
    families = rounded_families(cluster.device, precision)
    if cluster.device.in_tf32 == families:
        return cluster
    key = "precision", families, cluster.device.slowest  # clusters of other counts share the cache
    if key not in cluster.cache:
        cluster.cache[key] = replace(
            cluster, device=replace(cluster.device, in_tf32=families, cache={}), cache={}
        )
    found: Cluster = cluster.cache[key]
    return found
