"""What tests of the sampler share: this folder's toy models, and the command line run in here."""

import pathlib
import sys

import pytest
from absl import flags
from absl.testing import flagsaver

import jaxalope.model

sys.path.insert(0, str(pathlib.Path(__file__).parent))


@pytest.fixture
def command_line(monkeypatch, capsys):
    """``command_line(model)``: a function that runs the command with flags; returns what it says.

    Flags are this process's: those of a call are forgotten after it.
    """
    from jaxalope.infer import __main__ as cli

    def of(model):
        monkeypatch.setattr(jaxalope.model, "load", lambda path, step=None, run=None: model)

        def call(*arguments):
            with flagsaver.flagsaver():
                flags.FLAGS.unparse_flags()
                for name in flags.FLAGS:
                    flags.FLAGS[name].present = 0
                flags.FLAGS(["infer", "--model=somewhere", *arguments])
                cli.main(["infer"])
            return capsys.readouterr()

        return call

    return of
