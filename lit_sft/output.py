"""Printing, to whoever still reads it."""

import os
import sys
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from typing import TextIO


@contextmanager
def outliving(stream: TextIO) -> Iterator[None]:
    """Print to ``stream`` within; when its reader or terminal is gone, to nobody from there on.

    Work that is worth more than what it prints goes on, and is saved.
    """
    try:
        yield
    except (OSError, ValueError):  # ValueError: closed
        with suppress(OSError, ValueError):
            nobody = os.open(os.devnull, os.O_WRONLY)
            os.dup2(nobody, stream.fileno())  # what is still in its buffer ends there too
            os.close(nobody)


def tell(text: str) -> None:
    """Print a line."""
    with outliving(sys.stdout):
        print(text, flush=True)
