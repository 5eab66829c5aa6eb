"""Experiments by name, or from a file."""

from __future__ import annotations

import importlib.util
import json
from collections.abc import Callable

from etils import epath

from ..errors import InputError
from ..model import fields
from . import autodeco, calm, dlm_crossover, gemma2, gpt_neox, kimi_linear, llada, lora
from .experiment import Experiment, experiment_from_dict

# Every named experiment is a function without arguments, listed here under its own name.
EXPERIMENTS: dict[str, Callable[[], Experiment]] = {
    function.__name__: function
    for function in (
        kimi_linear.tiny,
        kimi_linear.demo,
        kimi_linear.kimi_linear_653m,
        kimi_linear.kimi_linear_878m,
        kimi_linear.kimi_linear_1b1,
        kimi_linear.kimi_linear_1b4,
        kimi_linear.kimi_linear_1b7,
        kimi_linear.kimi_linear_48b,
        autodeco.autodeco_demo,
        lora.lora_demo,
        gemma2.gemma2_tiny,
        gemma2.gemma2_2b,
        gemma2.gemma2_9b,
        gemma2.gemma2_27b,
        gpt_neox.gpt_neox_tiny,
        gpt_neox.pythia_70m,
        gpt_neox.pythia_160m,
        gpt_neox.pythia_410m,
        gpt_neox.pythia_1b,
        gpt_neox.pythia_1_4b,
        gpt_neox.pythia_2_8b,
        gpt_neox.pythia_6_9b,
        gpt_neox.pythia_12b,
        llada.llada_tiny,
        llada.llada_demo,
        llada.llada_block_demo,
        llada.llada_8b,
        llada.llada_8b_sft,
        calm.calm_autoencoder_tiny,
        calm.calm_autoencoder_demo,
        calm.calm_tiny,
        calm.calm_demo,
        calm.calm_ar_demo,
        calm.calm_autoencoder,
        calm.calm_s,
        calm.calm_m,
        calm.calm_l,
        calm.calm_xl,
        calm.calm_ar_s,
        calm.calm_ar_m,
        calm.calm_ar_l,
        dlm_crossover.dlm_crossover,
        dlm_crossover.dlm_crossover_ar,
        dlm_crossover.dlm_crossover_gpu,
        dlm_crossover.dlm_crossover_gpu_ar,
    )
}


def get_experiment(name_or_file: str) -> Experiment:
    """The experiment of this name, or of a file.

    A ``.py`` is executed and defines ``experiment()``; a ``.json`` is what a run writes into its
    workdir (``experiment_to_dict``).

    Raises:
        InputError: an unknown name (the nearest is suggested), or a file that holds no experiment.
    """
    if name_or_file in EXPERIMENTS:
        return EXPERIMENTS[name_or_file]()
    path = epath.Path(name_or_file)
    if path.is_dir():
        raise InputError(
            f"config={name_or_file!r} is a folder; name a file in it (a run's is "
            f"{path / 'experiment.json'})"
        )
    if path.suffix in (".py", ".json"):
        if not path.exists():
            raise InputError(f"config={name_or_file!r}: there is no such file")
        return _from_json(path) if path.suffix == ".json" else _from_python(path)
    near = fields.nearest(name_or_file, EXPERIMENTS)
    raise InputError(
        f"config={name_or_file!r} is no experiment{near} (known: {', '.join(EXPERIMENTS)}; or "
        "the path of a .py with a function `experiment`, or of a .json)"
    )


def _from_json(path: epath.Path) -> Experiment:
    try:
        values = json.loads(path.read_text())
    except ValueError as e:
        raise InputError(f"config={path}: not JSON ({e})") from e
    return experiment_from_dict(values)


def _from_python(path: epath.Path) -> Experiment:
    spec = importlib.util.spec_from_file_location(f"experiment_file_{path.stem}", str(path))
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    build = getattr(module, "experiment", None)
    if not callable(build):
        raise InputError(f"config={path}: it defines no function `experiment()`")
    experiment = build()
    if not isinstance(experiment, Experiment):
        raise InputError(
            f"config={path}: experiment() returned a {type(experiment).__name__}, not an Experiment"
        )
    return experiment
