"""Start the command line: the entry of `refshard`, and of `python -m refshard`, which launchers start."""

import sys
from pathlib import Path

__all__ = ["main"]


def main() -> None:
    """Run the command; end with its exit status."""
    from stages.cli import run

    run()


if __name__ == "__main__":
    # `python -m` searches the working folder first, where modules of any name may lie; the command does not.
    if not sys.flags.safe_path and Path(sys.path[0]) == Path.cwd():
        del sys.path[0]
    main()
