"""Floor 0: logical axes, their rules, meshes, and parameters and activations laid out by them."""

from .activations import (
    constrain,
    einsum,
    kernel_map,
    laid_like,
    mesh_axes_of,
    project,
    psum_over,
    repeat,
    take,
    take_rows,
    whole,
)
from .axes import LOGICAL_AXES, MESH_AXES, AxisRules, current_rules, use_rules
from .mesh import MeshConfig, make_mesh, use_mesh
from .params import (
    Params,
    abstract,
    init_compiler_options,
    init_params,
    param_axes,
    path_name,
    shardings,
    split,
)
from .topology import absent_devices, gpu_memory

__all__ = [
    "LOGICAL_AXES",
    "MESH_AXES",
    "AxisRules",
    "MeshConfig",
    "Params",
    "absent_devices",
    "abstract",
    "constrain",
    "current_rules",
    "einsum",
    "gpu_memory",
    "init_compiler_options",
    "init_params",
    "kernel_map",
    "laid_like",
    "make_mesh",
    "mesh_axes_of",
    "param_axes",
    "path_name",
    "project",
    "psum_over",
    "repeat",
    "shardings",
    "split",
    "take",
    "take_rows",
    "use_mesh",
    "use_rules",
    "whole",
]
