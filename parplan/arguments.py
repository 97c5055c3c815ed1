"""Arguments that several verbs share."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

if TYPE_CHECKING:
    from planner.plan import Precision

Model = Annotated[
    str,
    typer.Argument(
        help="A zoo name (gpt2, gpt2:layers=4,hidden=256), a Hugging Face config.json (model_type gpt2, llama, "
        "mistral, qwen2, mixtral, bert or vit), or file.py:factory.",
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
PrecisionName = Annotated[
    str, typer.Option("--precision", help="fp32, tf32 (products, too), bf16, fp16 (with loss scaling) or fp8.")
]
Compile = Annotated[
    bool, typer.Option("--compile", help="Assume torch.compile: pointwise and reductions fused, no eager dispatch.")
]
CudaGraphs = Annotated[bool, typer.Option("--cuda-graphs", help="Assume CUDA graphs: no host thread to wait for.")]
PICTURES = (".png", ".pdf", ".svg")  # what --plot draws
Json = Annotated[bool, typer.Option("--json", help="One JSON object on stdout.")]


def precision_of(name: str) -> Precision:
    """ValueError for a precision that plans do not have."""
    known: tuple[Precision, ...] = ("fp32", "tf32", "bf16", "fp16", "fp8")
    for precision in known:
        if name == precision:
            return precision
    raise ValueError(f"--precision is {name}; give {', '.join(known[:-1])} or {known[-1]}")


def positive(name: str, value: int | None) -> None:
    """ValueError for a count below 1."""
    if value is not None and value < 1:
        raise ValueError(f"{name} is {value}; give a whole number of 1 or more")


def refuse(options: dict[str, Any], why: str) -> None:
    """ValueError for options that were given (not None, not False) though they change nothing here."""
    if given := [name for name, value in options.items() if value is not None and value is not False]:
        verb = "changes" if len(given) == 1 else "change"
        raise ValueError(f"{' and '.join(given)} {verb} nothing here: {why}")


def check_graphs(cuda_graphs: bool, cluster: Any) -> None:
    """ValueError for CUDA graphs on what has none."""
    if cuda_graphs and cluster.device.kind != "gpu":
        raise ValueError(
            f"--cuda-graphs changes nothing on {cluster.name}: its {cluster.device.name} is no GPU (kind "
            f"{cluster.device.kind}); leave it out"
        )


def check_different(files: Mapping[str, Path | None]) -> None:
    """ValueError for two options that name one file: the second would replace what the first wrote."""
    seen: dict[Path, str] = {}
    for option, path in files.items():
        if path is not None and (first := seen.setdefault(path.resolve(), option)) != option:
            raise ValueError(f"{first} and {option} both name {path}; give two files")


def check_file(option: str, path: Path | None, *endings: str) -> None:
    """ValueError, before any work is done, for a file that could not be written: of another ending than `endings`
    where some are given, in no folder, or where this user may not write."""
    from validation.report_files import check_writable

    if path is None:
        return
    if endings and path.suffix not in endings:
        raise ValueError(f"{option} {path} ends in none of {', '.join(endings)}; the ending says what to write")
    if path.is_dir():
        raise ValueError(f"{option} {path} is a folder; give the name of a file")
    if not path.parent.is_dir():
        raise ValueError(f"there is no folder {path.parent} to write {path.name} into; make it first")
    check_writable(path)
