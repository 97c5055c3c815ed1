"""Arguments that several verbs share."""

from __future__ import annotations

from typing import Annotated, Literal

import typer

Model = Annotated[
    str,
    typer.Argument(
        help="A zoo name (gpt2, gpt2:layers=4,hidden=256), a Hugging Face config.json, or file.py:factory.",
        show_default=False,
    ),
]
ClusterName = Annotated[
    str,
    typer.Option(
        "--cluster", "-c", help="local, a catalogue name (dgx-h100, '8x dgx-h100'), or a TOML file.", show_default=False
    ),
]
GlobalBatch = Annotated[
    int, typer.Option("--global-batch", "-b", help="Samples per optimizer step.", show_default=False)
]
PrecisionName = Annotated[str, typer.Option("--precision", help="fp32, or bf16 (autocast).")]
Compile = Annotated[
    bool, typer.Option("--compile", help="Assume torch.compile: pointwise and reductions fused, no eager dispatch.")
]
CudaGraphs = Annotated[bool, typer.Option("--cuda-graphs", help="Assume CUDA graphs: no host thread to wait for.")]
Json = Annotated[bool, typer.Option("--json", help="One JSON object on stdout.")]


def precision_of(name: str) -> Literal["fp32", "bf16"]:
    """ValueError for a precision that plans do not have."""
    if name == "fp32":
        return "fp32"
    if name == "bf16":
        return "bf16"
    raise ValueError(f"--precision is {name}; give fp32 or bf16")


def positive(name: str, value: int | None) -> None:
    """ValueError for a count below 1."""
    if value is not None and value < 1:
        raise ValueError(f"{name} is {value}; give a whole number of 1 or more")
