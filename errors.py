"""The one exception that means "the input is wrong", as opposed to "the program is".

Raised at the boundary, with a message that names the field, its value and the remedy. The command
lines print it without a traceback and exit with status 2; everything else keeps its traceback.
"""


class InputError(ValueError):
    """A value given by the user cannot be used; the message says which, and what to do."""


class ReadError(OSError):
    """Something could not be read this time; nothing was changed. Has the remedy."""


class SaveError(OSError):
    """Something could not be written; what was saved before is untouched. Has the remedy."""
