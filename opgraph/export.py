"""OpGraph to networkx, to pandas, and to a file and back."""

from __future__ import annotations

import gzip
import json
import os
import tempfile
from dataclasses import fields
from pathlib import Path
from typing import TYPE_CHECKING, Any

from opgraph.graph import Op, OpGraph, Ref, Storage, Tensor

if TYPE_CHECKING:
    import networkx as nx
    import pandas as pd

FORMAT, VERSION = "parplan op graph", 1
KINDS: tuple[tuple[str, type[Any]], ...] = (("ops", Op), ("tensors", Tensor), ("storages", Storage))


def to_networkx(graph: OpGraph) -> nx.DiGraph[int]:
    """Ops as nodes, with name, phase, module, flops and bytes; edges say what must run before what.

    `kind` of an edge is "data" where the later op reads what the earlier one wrote (`bytes` of it), in place or not,
    and through any view; "order" (0 bytes) where it overwrites what the earlier one still reads.
    """
    import networkx as nx

    out: nx.DiGraph[int] = nx.DiGraph(name=graph.name, batch=graph.batch)
    for op in graph.ops:
        out.add_node(op.id, **_row(graph, op))
    made: dict[int, int] = {}  # tensor -> op that made it
    writer: dict[int, int] = {}  # storage -> op that wrote it last
    readers: dict[int, list[int]] = {}  # storage -> ops that read it since
    for op in graph.ops:
        for t in dict.fromkeys(op.inputs):
            tensor = graph.tensors[t]
            last, view = writer.get(tensor.storage, -1), made.get(t, -1)
            for source in {last, view} - {-1}:
                moved = tensor.bytes if source == last and not op.is_view else 0
                _edge(out, source, op.id, "data", moved)
            readers.setdefault(tensor.storage, []).append(op.id)
        for t in dict.fromkeys((*op.outputs, *op.mutates)):
            made[t] = op.id
            if op.is_view:
                continue
            storage = graph.tensors[t].storage
            for reader in readers.pop(storage, ()):
                if reader != op.id and not out.has_edge(reader, op.id):
                    _edge(out, reader, op.id, "order", 0)
            writer[storage] = op.id
    return out


def _edge(out: nx.DiGraph[int], source: int, target: int, kind: str, moved: int) -> None:
    if out.has_edge(source, target):
        out.edges[source, target]["bytes"] += moved
    else:
        out.add_edge(source, target, kind=kind, bytes=moved)


def to_pandas(graph: OpGraph) -> pd.DataFrame:
    """One row per op, in execution order."""
    import pandas as pd

    rows = [
        {"id": op.id, **_row(graph, op), "inputs": op.inputs, "outputs": op.outputs, "mutates": op.mutates}
        | {"in_shapes": _shapes(graph, op.inputs), "out_shapes": _shapes(graph, (*op.outputs, *op.mutates))}
        for op in graph.ops
    ]
    return pd.DataFrame(rows)


def _row(graph: OpGraph, op: Op) -> dict[str, Any]:
    return {
        "name": op.name,
        "phase": op.phase,
        "module": op.module,
        "flops": op.flops,
        "bytes_read": graph.bytes_read(op),
        "bytes_written": graph.bytes_written(op),
        "is_view": op.is_view,
        "forward": op.forward,
    }


def _shapes(graph: OpGraph, tensors: tuple[int, ...]) -> tuple[tuple[int, ...], ...]:
    return tuple(graph.tensors[t].shape for t in tensors)


# -- files --------------------------------------------------------------------------------------------------


def save(graph: OpGraph, path: str | os.PathLike[str]) -> None:
    """Writes the graph as compressed JSON; the file is whole or not there."""
    data = {"format": FORMAT, "version": VERSION, **_data(graph)}
    target = Path(path)
    handle, temporary = tempfile.mkstemp(dir=target.parent, prefix=f".{target.name}.")
    try:
        with os.fdopen(handle, "wb") as raw:
            with gzip.GzipFile(fileobj=raw, mode="wb", compresslevel=6, mtime=0) as packed:
                packed.write(json.dumps(data, separators=(",", ":")).encode())
            raw.flush()
            os.fsync(raw.fileno())
        os.chmod(temporary, 0o666 & ~_umask())
        os.replace(temporary, target)
    except BaseException:
        Path(temporary).unlink(missing_ok=True)
        raise


def _data(graph: OpGraph) -> dict[str, Any]:
    data = {f.name: getattr(graph, f.name) for f in fields(graph)}
    for name, kind in KINDS:
        names = [f.name for f in fields(kind)]
        data[name] = {"fields": names, "rows": [[_json(getattr(x, n)) for n in names] for x in data[name]]}
    other = data.pop("on_accelerators")
    return data if other is None else data | {"on_accelerators": _data(other)}


def _umask() -> int:
    mask = os.umask(0)
    os.umask(mask)
    return mask


def load_graph(path: str | os.PathLike[str]) -> OpGraph:
    """The graph in a file that `save` wrote."""
    try:
        with gzip.open(path, "rb") as packed:
            data = json.loads(packed.read())
    except (gzip.BadGzipFile, EOFError, UnicodeDecodeError, json.JSONDecodeError) as error:
        raise ValueError(f"{path} is not an op graph that Parplan saved, or it is damaged") from error
    if not isinstance(data, dict) or data.pop("format", None) != FORMAT:
        raise ValueError(f"{path} is not an op graph that Parplan saved")
    version = data.pop("version", None)
    if version != VERSION:
        raise ValueError(f"{path} has version {version} of the format; this Parplan reads {VERSION}: trace again")
    try:
        return _graph(data)
    except (KeyError, TypeError) as error:
        raise ValueError(f"{path} lacks parts of an op graph ({error})") from error


def _graph(data: dict[str, Any]) -> OpGraph:
    found: dict[str, Any] = {}
    for name, kind in KINDS:
        rows = data.pop(name)
        found[name] = tuple(kind(**dict(zip(rows["fields"], map(_plain, row)))) for row in rows["rows"])
    other = data.pop("on_accelerators", None)
    rest = {k: _plain(v) for k, v in data.items()}
    return OpGraph(**found, **rest, on_accelerators=None if other is None else _graph(other))


def _json(value: Any) -> Any:
    """Tuples become lists, a Ref {"t": id}, and the floats that JSON lacks {"f": text}."""
    if isinstance(value, tuple):
        return [_json(v) for v in value]
    if isinstance(value, Ref):
        return {"t": value.tensor}
    if isinstance(value, float) and value - value != 0:
        return {"f": repr(value)}
    return value


def _plain(value: Any) -> Any:
    if isinstance(value, list):
        return tuple([_plain(v) for v in value])
    if isinstance(value, dict):
        return Ref(value["t"]) if "t" in value else float(value["f"])
    return value
