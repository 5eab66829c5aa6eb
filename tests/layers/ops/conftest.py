"""Puts this folder on the path, so that tests of one operator share what they run it by."""

import pathlib
import sys

sys.path.insert(0, str(pathlib.Path(__file__).parent))
