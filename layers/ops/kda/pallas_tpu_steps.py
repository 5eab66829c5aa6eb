"""Chains of products, each of which waits for the last, that take turns in one stream of code."""

from collections.abc import Generator, Iterable
from typing import TypeVar

_T = TypeVar("_T")
# A computation that yields wherever what follows waits for a product, and returns its result.
Step = Generator[None, None, _T]


def in_turns(tasks: Iterable[Step]) -> None:
    """Runs the tasks to their ends, one step of each in turn, each started a turn after the last.

    A product takes some two hundred cycles to come out of an MXU, and the compiler moves code
    only so far. What is traced between two steps of a chain are steps of the others: of work for
    the vector units, too, as the tasks are at different places.
    """
    waiting, running = list(tasks), []
    while waiting or running:
        if waiting:
            running.append(waiting.pop(0))
        running = [task for task in running if _go_on(task)]


def _go_on(task: Step) -> bool:
    try:
        next(task)
    except StopIteration:
        return False
    return True
