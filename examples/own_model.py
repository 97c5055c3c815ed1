"""A model of your own: `factory` returns the module, example inputs (dim 0 is the batch) and, if wanted, a loss.

On the command line:  parplan trace examples/own_model.py:factory
                      parplan search examples/own_model.py:factory --cluster dgx-h100 --global-batch 64
Here, in Python: three plans of it, predicted on one 8-GPU node.
"""

from __future__ import annotations

import torch
from torch import nn

import parplan


class Mixer(nn.Module):
    """MLP-Mixer: mixes tokens, then channels (Tolstikhin et al. 2021)."""

    def __init__(self, tokens: int, channels: int) -> None:
        super().__init__()
        self.norms = nn.ModuleList([nn.LayerNorm(channels) for _ in range(2)])
        self.tokens = nn.Sequential(nn.Linear(tokens, 2 * tokens), nn.GELU(), nn.Linear(2 * tokens, tokens))
        self.channels = nn.Sequential(nn.Linear(channels, 4 * channels), nn.GELU(), nn.Linear(4 * channels, channels))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = x + self.tokens(self.norms[0](x).transpose(1, 2)).transpose(1, 2)
        return x + self.channels(self.norms[1](x))


def factory() -> tuple[nn.Module, torch.Tensor]:
    """Eight blocks over 196 tokens of 512 channels; without a loss of its own, the outputs' mean square is taken."""
    return nn.Sequential(*(Mixer(196, 512) for _ in range(8))), torch.randn(16, 196, 512)


def main() -> None:
    workload = parplan.load_workload(f"{__file__}:factory")
    graph = parplan.trace_workload(workload)
    cluster = parplan.load_cluster("dgx-h100")
    print(f"{graph.param_count / 1e6:.1f} M parameters, {graph.flops() / 1e12:.2f} TFLOP for {graph.batch} samples")
    for plan in (
        parplan.ParallelPlan(global_batch=64, dp=8),
        parplan.ParallelPlan(global_batch=64, dp=8, data_parallel="fsdp", fsdp_units=workload.blocks),
        parplan.ParallelPlan(global_batch=64, dp=4, pp=2, micro_batches=4, cuts=("4",)),
    ):
        prediction = parplan.predict(graph, plan, cluster)
        low, high = (1e3 * bound for bound in prediction.interval)
        peak = max(prediction.peak_bytes) / 2**30
        print(f"{plan.label:24} {prediction.step_seconds * 1e3:7.2f} ms ({low:.2f} to {high:.2f}), {peak:.2f} GiB")


if __name__ == "__main__":
    main()
