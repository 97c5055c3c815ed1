"""Clusters from what machines tell of themselves: `nvidia-smi topo -m` text, and the topology XML of NCCL and RCCL.

None names a GPU model. `device`, a first line "# device: h100-sxm" in the text, or a comment <!-- device: h100-sxm -->
in the XML gives it; otherwise it is guessed (`costmodels.import_device`), and the notes say so.
"""

from __future__ import annotations

from pathlib import Path

from costmodels.cluster import Cluster
from costmodels.import_matrix import from_matrix
from costmodels.import_xml import from_xml


def read_topology(path: Path, device: str = "") -> Cluster:
    """One node of a cluster from a .txt of `nvidia-smi topo -m` or an NCCL topology .xml; device: its name."""
    try:
        data = path.read_bytes()
        text = data.decode("utf-16" if data[:2] in (b"\xff\xfe", b"\xfe\xff") else "utf-8-sig")  # PowerShell's `>`
    except (OSError, UnicodeDecodeError) as error:
        reason = getattr(error, "strerror", None) or "no text"
        raise ValueError(f"{path}: cannot be read ({reason}); give a text file") from None
    if not text.strip():
        raise ValueError(f"{path}: is empty; give what nvidia-smi topo -m printed, or what NCCL_TOPO_DUMP_FILE wrote")
    read = from_xml if path.suffix == ".xml" else from_matrix
    return read(text, str(path), device)
