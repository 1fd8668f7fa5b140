"""The command line as a process: `distill`, and `python -m pipelines`."""

import atexit
import os
import sys
from contextlib import suppress


def run() -> None:
    """`main`, and then the end of the process, without the interpreter's own.

    While an interpreter ends, a thread of Arrow that still lets go of a file on an object store asks for it, and the
    process aborts, whatever its exit code was to be.
    """
    code = 1

    def leave() -> None:
        for stream in (sys.stdout, sys.stderr):
            with suppress(OSError):
                stream.flush()
        os._exit(code)

    atexit.register(leave)  # before all others, so after them
    from pipelines.cli import main

    try:
        main()
        code = 0
    except SystemExit as end:
        code = end.code if isinstance(end.code, int) else int(end.code is not None)
        raise


if __name__ == "__main__":
    run()
