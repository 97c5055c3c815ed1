"""The device mesh of a plan."""

from __future__ import annotations

from itertools import count

import torch
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh

from planner.plan import AXES, ParallelPlan

_MESHES = count()


def make_mesh(plan: ParallelPlan, device: torch.device) -> DeviceMesh | None:
    """The mesh of the axes larger than 1 (None where there is none). A collective call."""
    axes = [axis for axis in AXES if getattr(plan, axis) > 1]
    if not axes:
        return None
    # DTensor caches what it derives from a mesh, and takes meshes of equal ranks and names for the same one, even
    # after their process groups are gone: so every mesh gets names of its own
    number = next(_MESHES)
    names = tuple(f"{axis}_{number}" for axis in axes)
    return init_device_mesh(device.type, tuple(getattr(plan, a) for a in axes), mesh_dim_names=names)


def along(mesh: DeviceMesh | None, axis: str) -> DeviceMesh:
    """The sub-mesh of one axis."""
    assert mesh is not None and mesh.mesh_dim_names is not None
    return mesh[next(name for name in mesh.mesh_dim_names if name.startswith(axis))]
