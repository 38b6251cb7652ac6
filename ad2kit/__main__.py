"""``ad2kit`` and ``python -m ad2kit``: the command line, and the exit code of each way to end."""

from __future__ import annotations

import sys

import typer

from ad2kit.cli.app import app
from ad2kit.run.errors import (
    EXIT_BUG,
    EXIT_INTERRUPTED,
    Ad2kitError,
    MissingExtra,
    UserError,
    no_room_left,
)


def main() -> None:
    """Run the command line; every way to end has its exit code (see :mod:`ad2kit.run.errors`)."""
    try:
        try:
            code = app(standalone_mode=False)
        except ModuleNotFoundError as error:
            raise MissingExtra.of(error) from error
        if code == EXIT_INTERRUPTED:
            raise KeyboardInterrupt  # newer typers catch it, and say nothing
    except typer.Exit as stop:
        code = stop.exit_code
    except (KeyboardInterrupt, typer.Abort):
        _complain("stopped", "the same command goes on where this one stopped")
        code = EXIT_INTERRUPTED
    except Ad2kitError as error:
        _complain(error.message, error.hint)
        code = error.exit_code
    except BrokenPipeError:
        sys.stderr.close()
        code = 0
    except Exception as error:
        show = getattr(error, "show", None)  # typer's own errors about options and arguments
        if callable(show):
            show()
            code = UserError.exit_code
        elif no_room_left(error):
            _complain(
                f"the disk is full, or a file is larger than allowed: {error}",
                "make room, then run the same command again; nothing finished was lost",
            )
            code = UserError.exit_code
        else:
            import traceback

            traceback.print_exc()
            _complain("this is a defect of ad2kit", "please report it with the lines above")
            code = EXIT_BUG
    sys.exit(code or 0)


def _complain(message: str, hint: str) -> None:
    typer.echo(f"ad2kit: {message}\n  -> {hint}", err=True)


if __name__ == "__main__":
    main()
