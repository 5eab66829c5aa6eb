"""Puts this folder, and that of the samplers' toy models, on the path."""

import pathlib
import sys

HERE = pathlib.Path(__file__).parent
sys.path[:0] = [str(HERE), str(HERE.parent / "infer")]
