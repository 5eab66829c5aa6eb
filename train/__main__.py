"""Train an experiment: ``python -m jaxalope.train --config=NAME_OR_FILE --workdir=DIR``.

The same command on the same workdir goes on where the last one stopped. Exit status: 0 complete or
stopped by a signal and saved; 1 training failed, or reading or writing a checkpoint; 2 the input is
wrong.
"""

from __future__ import annotations

import contextlib
import json
import warnings

from absl import app, flags, logging

from ..errors import InputError, ReadError, SaveError
from .console import flush_or_silence, tell

_CONFIG = flags.DEFINE_string(
    "config",
    None,
    "A named experiment (see --list), or a .py or .json file that holds one. Left "
    "out, the experiment that --workdir holds.",
)
_WORKDIR = flags.DEFINE_string("workdir", None, "Where everything of the run goes.")
_SET = flags.DEFINE_multi_string(
    "set", [], "Change a field of the experiment: path.to.field=value. May be repeated."
)
_LIST = flags.DEFINE_bool("list", False, "Print the named experiments.")
_DRY_RUN = flags.DEFINE_bool(
    "dry_run", False, "Print the resolved experiment, its parameters and memory; train nothing."
)
_TOPOLOGY = flags.DEFINE_string(
    "topology",
    None,
    "With --dry_run: the TPU slice (v5e:4x4, v5p:2x2x4) or GPUs (h200:8, h100:4x8) to compile for, "
    "which need not be there.",
)
_CACHE = flags.DEFINE_string(
    "compilation_cache",
    None,
    "Folder where compiled programs are kept for the next start; 'none' keeps none. Default: JAX's "
    "own setting (JAX_COMPILATION_CACHE_DIR), else ~/.cache/jaxalope/xla.",
)
_DISTRIBUTED = flags.DEFINE_bool(
    "distributed", False, "Join a multi-host run whose other hosts the cluster tells about."
)
_COORDINATOR = flags.DEFINE_string("coordinator", None, "host:port of process 0, multi-host.")
_NUM_PROCESSES = flags.DEFINE_integer("num_processes", None, "Number of processes, multi-host.")
_PROCESS_ID = flags.DEFINE_integer("process_id", None, "This process's number, multi-host.")


def main(argv: list[str]) -> int:
    """Run what the flags say; returns the exit status."""
    if not flags.FLAGS["verbosity"].present:
        logging.set_verbosity(logging.WARNING)
        # Orbax logs a traceback for every thread of a save that fails; it also raises, and the
        # error printed here says what happened.
        logging.get_absl_handler().addFilter(_not_from_orbax)
    warnings.showwarning = _warn
    try:
        if argv[1:]:
            raise InputError(
                f"unexpected {argv[1]!r}; flags look like --set train.steps=10, each with its own "
                "--set"
            )
        return _run()
    except InputError as error:
        return _fail(error, 2)
    except (FloatingPointError, OSError) as error:
        from .ledger import NonFiniteLoss
        from .workdir import DISK_FULL

        if isinstance(error, NonFiniteLoss | ReadError | SaveError) or (
            isinstance(error, OSError) and error.errno in DISK_FULL
        ):
            return _fail(error, 1)
        raise
    finally:
        flush_or_silence()


def _run() -> int:
    # Imports wait until they are needed: --help and a wrong flag answer at once.
    from ..configs.overlay import overlay
    from ..configs.registry import EXPERIMENTS, get_experiment

    if _LIST.value:
        for name, build in EXPERIMENTS.items():
            print(f"{name:<20} {(build.__doc__ or '').strip().splitlines()[0]}")
        return 0
    experiment = overlay(get_experiment(_config()), _SET.value)
    if _TOPOLOGY.value and not _DRY_RUN.value:
        raise InputError(f"--topology={_TOPOLOGY.value} needs --dry_run: what it names is not here")
    _start_distributed()
    _keep_compiled()
    if _DRY_RUN.value:
        return _dry_run(experiment)
    if _WORKDIR.value is None:
        raise InputError("--workdir=DIR is missing: where should the run go?")
    from .loop import train

    result = train(experiment, _WORKDIR.value)
    if result.reason not in ("complete", "already complete"):
        tell(
            f"{result.reason}: stopped and saved after step {result.step} of "
            f"{experiment.train.steps}; the same command goes on from there"
        )
    return 0


def _config() -> str:
    if _CONFIG.value is not None:
        return _CONFIG.value
    if _WORKDIR.value is not None:
        from etils import epath

        from .workdir import EXPERIMENT

        saved = epath.Path(_WORKDIR.value) / EXPERIMENT
        if saved.exists():
            return str(saved)
    raise InputError("--config=NAME_OR_FILE is missing; --list prints the names")


def _start_distributed() -> None:
    given = (_COORDINATOR.value, _NUM_PROCESSES.value, _PROCESS_ID.value)
    if _DISTRIBUTED.value or any(value is not None for value in given):
        from ..sharding import distributed

        distributed.start(*given)


def _keep_compiled() -> None:
    import os

    import jax

    if _CACHE.value == "none":
        jax.config.update("jax_enable_compilation_cache", False)
    elif _CACHE.value is not None:
        jax.config.update("jax_compilation_cache_dir", os.path.expanduser(_CACHE.value))
    elif jax.config.jax_compilation_cache_dir is None:
        cache = os.path.join(os.path.expanduser("~"), ".cache", "jaxalope", "xla")
        jax.config.update("jax_compilation_cache_dir", cache)


def _dry_run(experiment) -> int:
    import jax

    from ..configs.experiment import experiment_to_dict
    from ..sharding import absent_devices, make_mesh, use_mesh
    from .estimate import estimate

    devices = absent_devices(_TOPOLOGY.value) if _TOPOLOGY.value else jax.devices()
    print(json.dumps(experiment_to_dict(experiment), indent=1), flush=True)
    mesh = make_mesh(experiment.mesh, devices) if len(devices) > 1 or _TOPOLOGY.value else None
    with contextlib.ExitStack() as stack:
        if mesh is not None:
            stack.enter_context(use_mesh(mesh, experiment.rules))
        if _TOPOLOGY.value and devices[0].platform == "gpu":
            stack.enter_context(_nothing_kept())
        print(estimate(experiment, mesh))
    print(f"devices: {len(devices)} x {devices[0].device_kind}")
    return 0


@contextlib.contextmanager
def _nothing_kept():
    """No compilation cache: without a GPU, a program for one cannot be read from it again."""
    import jax
    from jax.experimental.compilation_cache import compilation_cache

    name = "jax_enable_compilation_cache"
    before = getattr(jax.config, name)
    jax.config.update(name, False)
    compilation_cache.reset_cache()  # JAX looks at the setting once
    try:
        yield
    finally:
        jax.config.update(name, before)
        compilation_cache.reset_cache()


def _fail(error: Exception, status: int) -> int:
    tell(f"error: {' '.join(str(error).split())}")
    return status


def _not_from_orbax(record) -> bool:
    return "orbax" not in record.pathname


def _warn(message, category, filename, lineno, file=None, line=None) -> None:
    tell(f"warning: {message}", file)


if __name__ == "__main__":
    app.run(main)
