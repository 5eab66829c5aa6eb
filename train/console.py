"""What a person sees of a run. None of it may end the run: whoever read it may be gone."""

from __future__ import annotations

import contextlib
import os
import sys
from collections.abc import Iterator, Mapping
from typing import TextIO

# What a terminal line shows of a training step, in this order, and how.
_SHOWN = {
    "skipped": "skipped",
    "loss": "loss {:.4f}",
    "accuracy": "accuracy {:.3f}",
    "grad_norm": "grad {:.2f}",
    "lr": "lr {:.1e}",
    "load_imbalance": "imbalance {:.2f}",
    "tokens_per_second": "{:,.0f} tokens/s",
    "mfu": "mfu {:.1%}",
    "eval_loss": "loss {:.4f}",
    "eval_perplexity": "perplexity {:.2f}",
    "eval_bits_per_byte": "bits/byte {:.3f}",
    "eval_accuracy": "accuracy {:.3f}",
    "eval_ema_loss": "ema loss {:.4f}",
}


def tell(text: str, stream: TextIO | None = None) -> None:
    """A line to ``stream`` (standard error if None); lost, and no error, if it cannot be written.

    Also from a signal handler: Ctrl-C ends the ``tee`` behind a pipe as well as asking the run to
    stop and save.
    """
    stream = sys.stderr if stream is None else stream
    with forgiving(stream):
        print(text, file=stream, flush=True)


@contextlib.contextmanager
def forgiving(stream: TextIO | None) -> Iterator[None]:
    """Lets pass what goes wrong when something is written to ``stream`` inside."""
    try:
        yield
    except BrokenPipeError:
        _silence(stream)
    # A full disk or a lost terminal; a closed stream; a handler that interrupted another write.
    except (OSError, ValueError, RuntimeError):
        pass


def flush_or_silence() -> None:
    """Empty the standard streams: what they still hold at exit must not change the exit status."""
    for stream in (sys.stdout, sys.stderr):
        try:
            if stream is not None:
                stream.flush()
        except (OSError, ValueError):
            _silence(stream)


def _silence(stream: TextIO | None) -> None:
    """Send what is written to ``stream``, and what it still holds, nowhere."""
    with contextlib.suppress(OSError, ValueError, AttributeError):
        nowhere = os.open(os.devnull, os.O_WRONLY)
        os.dup2(nowhere, stream.fileno())
        os.close(nowhere)


class Console:
    """What a person sees: a progress bar on a terminal, a line per log elsewhere.

    Args:
        total, done: steps of the run, and those taken already.
        quiet: print nothing (all processes but the first).
        stream: standard error if None.
    """

    def __init__(self, total: int, done: int, *, quiet: bool = False, stream: TextIO | None = None):
        self._total, self._quiet = total, quiet
        self._stream = stream or sys.stderr
        self._bar = None
        if quiet:
            return
        with forgiving(self._stream):
            if self._stream is not None and self._stream.isatty():
                import tqdm

                self._bar = tqdm.tqdm(
                    total=total, initial=done, unit="step", file=self._stream, dynamic_ncols=True
                )

    def say(self, text: str) -> None:
        """A line of its own."""
        if self._quiet:
            return
        if self._bar is None:
            tell(text, self._stream)
        else:
            with forgiving(self._stream):
                self._bar.write(text, file=self._stream)

    def advance(self, step: int) -> None:
        """``step`` steps are done."""
        if self._bar is not None:
            with forgiving(self._stream):
                self._bar.update(step - self._bar.n)

    def log(self, step: int, values: Mapping[str, float]) -> None:
        """The numbers of a training step."""
        if self._bar is None:
            self.say(f"step {step:>{len(str(self._total))}}/{self._total}  {_show(values)}")
        else:
            with forgiving(self._stream):
                self._bar.set_postfix_str(_show(values))

    def log_evaluation(self, step: int, values: Mapping[str, float]) -> None:
        """The numbers of an evaluation."""
        self.say(f"step {step:>{len(str(self._total))}}/{self._total}  held out: {_show(values)}")

    def close(self) -> None:
        """Leave the bar as it stands."""
        if self._bar is not None:
            with forgiving(self._stream):
                self._bar.close()


def _show(values: Mapping[str, float]) -> str:
    return "  ".join(form.format(values[name]) for name, form in _SHOWN.items() if name in values)
