"""A published directory's tensors: of safetensors, or else of PyTorch's own files."""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence

from etils import epath

from ...errors import InputError
from .files import INDEX, Stored, read_header
from .torch_files import read_torch_header

TORCH_INDEX = "pytorch_model.bin.index.json"
TORCH_SINGLE = "pytorch_model.bin"
# What training leaves beside the weights.
_NO_WEIGHTS = ("optimizer", "rng_state", "scaler", "scheduler", "training_args")


def read_directory(directory: epath.Path) -> dict[str, Stored]:
    """Every tensor of a published directory, by name.

    One file, or as many as ``model.safetensors.index.json`` names, or every ``*.safetensors`` there
    is. Where there is none of these, the same of PyTorch's: ``pytorch_model.bin``, its index and
    what that names, its parts, or the one other file that is PyTorch's. Only headers are read.

    Raises:
        InputError: there is none, one is damaged, missing or no file of weights, or the index and
            the files disagree.
    """
    if (directory / INDEX).exists():
        return _indexed(directory, INDEX, read_header)
    files = sorted(directory.glob("*.safetensors"))
    if files:
        return _together(files, read_header)
    if (directory / TORCH_SINGLE).exists():
        return read_torch_header(directory / TORCH_SINGLE)
    if (directory / TORCH_INDEX).exists():
        return _indexed(directory, TORCH_INDEX, read_torch_header)
    return _together(_torch_files(directory), read_torch_header)


def _torch_files(directory: epath.Path) -> Sequence[epath.Path]:
    parts = sorted(directory.glob("pytorch_model-*-of-*.bin"))
    if parts:
        return parts
    others = sorted(
        path
        for path in directory.iterdir()
        if path.suffix in (".bin", ".pt", ".pth") and not path.name.startswith(_NO_WEIGHTS)
    )
    if not others:
        raise InputError(
            f"{directory} holds no *.safetensors and no {TORCH_SINGLE}; give a directory with "
            "weights, or a hub id"
        )
    if len(others) > 1:
        names = ", ".join(path.name for path in others)
        raise InputError(
            f"{directory} holds {names}, and nothing says which are the weights; rename theirs to "
            f"{TORCH_SINGLE}"
        )
    return others


def _together(
    files: Sequence[epath.Path], read: Callable[[epath.Path], dict[str, Stored]]
) -> dict[str, Stored]:
    found: dict[str, Stored] = {}
    for file in files:
        found |= read(file)
    return found


def _indexed(
    directory: epath.Path, name: str, read: Callable[[epath.Path], dict[str, Stored]]
) -> dict[str, Stored]:
    index = directory / name
    try:
        listed: dict[str, str] = json.loads(index.read_text())["weight_map"]
        files = sorted(set(listed.values()))
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise InputError(f"{index} is no index of weights ({error}); fetch it again") from error
    absent = [name for name in files if not (directory / name).exists()]
    if absent:
        raise InputError(
            f"{index} names {', '.join(absent)}, which {'is' if len(absent) == 1 else 'are'} not "
            "there; fetch the missing files (the download may have stopped early)"
        )
    headers = {name: read(directory / name) for name in files}
    wrong = sorted(tensor for tensor, name in listed.items() if tensor not in headers[name])
    if wrong:
        raise InputError(
            f"{index} says that {listed[wrong[0]]} holds {wrong[0]}, which it does not "
            f"({len(wrong)} such tensors); index and files are of different versions: fetch both "
            "again"
        )
    return {tensor: headers[name][tensor] for tensor, name in listed.items()}
