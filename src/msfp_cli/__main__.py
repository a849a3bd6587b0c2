"""``python -m msfp_cli`` and the console script ``msfp``."""

import os

from msfp_cli.commands.app import app


def main() -> None:
    """Run the command line."""
    let_threads_sleep()
    app(prog_name="msfp")


def let_threads_sleep() -> None:
    """Let torch's threads sleep while they wait for each other, unless the user chose otherwise.

    By default a thread that waits spins in a busy loop. Beside another busy process it then takes
    the core that the thread it waits for needs, and everything takes several times longer. OpenMP
    reads the variable when torch is imported, which no command has done yet; processes that a
    command starts inherit it. A program that imports msfp as a library keeps its own settings.
    """
    os.environ.setdefault("OMP_WAIT_POLICY", "passive")


if __name__ == "__main__":
    main()
