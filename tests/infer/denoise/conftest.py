"""Puts this folder on the path, so that tests share their slow samplers."""

import pathlib
import sys

sys.path.insert(0, str(pathlib.Path(__file__).parent))
