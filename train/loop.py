"""The train loop: one for every family, objective, optimizer and mesh."""

from __future__ import annotations

import contextlib
import dataclasses
from collections.abc import Callable, Sequence

import jax
from etils import epath
from flax import nnx
from jax.sharding import Mesh

from ..configs.experiment import Experiment
from ..data.pipeline import Pipeline
from ..sharding import make_mesh, use_mesh
from .checkpoints import TrainCheckpoints
from .console import Console
from .evaluate import make_evaluation
from .feed import Feed, data_rows
from .hardware import peak_flops
from .init_from import check_source
from .interrupt import StopRequest
from .ledger import Ledger, NonFiniteLoss
from .metrics import MetricsWriter
from .parts import check_parts
from .plots import write_loss_picture
from .profiling import Profiler
from .skip import make_skip_step
from .step import TrainState, abstract_state, init_state, make_train_step
from .workdir import open_workdir


@dataclasses.dataclass(frozen=True)
class Result:
    """How a call of :func:`train` ended.

    Attributes:
        state: the training state at its end.
        graphdef: with ``state.params``, the module: ``nnx.merge(graphdef, state.params)``.
        step: optimizer steps taken, over all calls.
        reason: ``"complete"``, ``"already complete"``, or the name of the signal that ended it.
        metrics: the last numbers logged, of training and (``eval_*``) of the held-out data.
    """

    state: TrainState
    graphdef: nnx.GraphDef
    step: int
    reason: str
    metrics: dict[str, float]


def train(
    experiment: Experiment,
    workdir: epath.PathLike,
    *,
    devices: Sequence[jax.Device] | None = None,
    quiet: bool = False,
) -> Result:
    """Train up to ``experiment.train.steps``, from the newest checkpoint in ``workdir`` if any.

    SIGTERM and Ctrl-C end it after the step under way, saved; a second one ends it at once.

    Args:
        experiment: what to run. ``workdir.MAY_CHANGE`` names the fields that may differ from those
            of the run that ``workdir`` already holds.
        workdir: gets ``experiment.json``, ``tokenizer/``, ``checkpoints/``, ``metrics.jsonl``,
            ``tensorboard/``, ``loss.png`` and, if asked for, ``profile/``.
        devices: to run on; all of them if None.
        quiet: print nothing.

    Raises:
        InputError: the experiment does not fit the data, the devices or the workdir.
        NonFiniteLoss: training cannot go on; the last good checkpoint is untouched.
        SaveError: a checkpoint could not be written; the last good one is untouched.
    """
    config, cadence = experiment.train, experiment.checkpoint
    primary = jax.process_index() == 0
    devices = jax.devices() if devices is None else list(devices)
    peak = peak_flops(devices)

    with contextlib.ExitStack() as stack:
        # Where to run, and whether the experiment fits there.
        mesh = _mesh(experiment, devices)
        if mesh is not None:
            stack.enter_context(use_mesh(mesh, experiment.rules))
        graphdef, abstract = abstract_state(experiment, mesh)
        check_source(experiment, workdir)
        workdir, tokenizer, notes = open_workdir(workdir, experiment)
        stop = stack.enter_context(StopRequest())

        # What to read.
        rows = data_rows(experiment, mesh)
        pipeline = stack.enter_context(Pipeline(experiment.data, tokenizer, "train", rows))
        feed = Feed(experiment, pipeline, mesh)
        evaluate = None
        if config.eval_every is not None:
            evaluate = make_evaluation(experiment, graphdef, tokenizer, feed)

        # Where to begin.
        checkpoints = stack.enter_context(TrainCheckpoints(workdir, experiment))
        restored = checkpoints.restore(abstract)
        if restored is None:
            state = init_state(experiment, mesh)[1]
        else:
            state, data_state = restored
            pipeline.restore(data_state)
        step = int(state.step)

        console = Console(config.steps, step, quiet=quiet or not primary)
        stack.callback(console.close)
        for note in notes:
            console.say(note)
        if step >= config.steps:
            console.say(f"{workdir} is complete: {step} of {config.steps} steps are done")
            return Result(state, graphdef, step, "already complete", {})
        if restored is not None:
            console.say(f"resuming {workdir} from step {step} of {config.steps}")

        # Where the numbers go.
        last_metrics: dict[str, float] = {}
        writer = None
        if primary:
            stack.callback(_draw, workdir, experiment.name, console)
            writer = MetricsWriter(workdir, step)
            stack.callback(writer.close)

        def record(show: Callable, step: int, values: dict[str, float]) -> None:
            last_metrics.update(values)
            show(step, values)
            if writer is not None:
                writer.write(step, values)

        def explain(step: int, values: dict[str, float]) -> NonFiniteLoss:
            good = checkpoints.latest()
            kept = (
                "there is no checkpoint yet"
                if good is None
                else (f"the last good checkpoint, step {good} in {workdir}, is untouched")
            )
            skip = ",".join(map(str, sorted({*config.skip_steps, step})))
            return NonFiniteLoss(
                f"step {step}: the loss is {values['loss']}, the gradient norm "
                f"{values['grad_norm']}; {kept}. It was {pipeline.describe(step - 1)}. The same "
                f"command repeats steps {(good or 0) + 1} to {step} exactly; add --set "
                f"train.skip_steps={skip} to pass over this batch, or lower "
                "schedule.learning_rate or train.clip_norm for them and all that follow"
            )

        ledger = Ledger(experiment, lambda s, values: record(console.log, s, values), explain, peak)
        profiler = stack.enter_context(Profiler(workdir, config.profile_steps))

        train_step, skip_step = make_train_step(experiment, graphdef), make_skip_step()
        compiled = False
        batch = next(feed)
        if restored is None:
            check_parts(experiment, graphdef, state.params, batch)
        while True:
            profiler.before(step)
            skipped = step + 1 in config.skip_steps
            state, metrics = skip_step(state) if skipped else train_step(state, batch)
            profiler.after(step, metrics)
            step += 1
            ledger.add(step, metrics)
            console.advance(step)

            last = step == config.steps
            stopping = stop.agreed(meeting=step % config.log_every == 0)
            held_out_loss = None
            if evaluate is not None and (last or step % config.eval_every == 0):
                with ledger.pause():
                    numbers = evaluate(state)
                    held_out_loss = numbers["eval_loss"]
                    record(console.log_evaluation, step, numbers)
            if last or stopping or step % cadence.every == 0:
                # Settling first: a state that came of a loss that is no number is never saved.
                with ledger.pause():
                    checkpoints.save(step, state, pipeline.state(), held_out_loss)
            checkpoints.check()
            if last or stopping:
                break
            if not (compiled or skipped):
                compiled = True
                seconds = ledger.first_step_done()
                console.say(f"first step after {seconds:.1f} s, compilation included")
            # The devices are busy with this step; the host makes the next batch.
            batch = next(feed)

        reason = "complete" if last else stop.signal or "another process was told to stop"
        return Result(state, graphdef, step, reason, last_metrics)


def _mesh(experiment: Experiment, devices: Sequence[jax.Device]) -> Mesh | None:
    """The mesh over ``devices``; None where there is just the default device."""
    mesh = make_mesh(experiment.mesh, devices)
    return None if list(devices) == jax.devices()[:1] and jax.process_count() == 1 else mesh


def _draw(workdir: epath.Path, name: str, console: Console) -> None:
    try:
        write_loss_picture(workdir, name)
    except OSError as error:  # A full disk must not hide what ended the run.
        console.say(f"loss picture not drawn: {error}")
