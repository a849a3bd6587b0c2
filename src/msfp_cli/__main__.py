"""``python -m msfp_cli`` and the console script ``msfp``."""

from msfp_cli.commands.app import app


def main() -> None:
    """Run the command line."""
    app(prog_name="msfp")


if __name__ == "__main__":
    main()
