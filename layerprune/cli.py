"""The command line's outer edge: what goes wrong becomes one line and an exit code.

0: done; 1: the run failed; 2: the user can set it right; 130: stopped by Ctrl-C or SIGTERM.
The commands are in `layerprune.commands`, which needs the extra ``train``.
"""

from __future__ import annotations

import sys
from collections.abc import Sequence
from typing import NoReturn

__all__ = ["main"]

_TRAIN = "matplotlib safetensors sklearn tensorboard torchvision tqdm typer yaml".split()
_EXPORT = "onnx onnxruntime onnxscript".split()
_EXTRA = dict.fromkeys(_TRAIN, "train") | dict.fromkeys(_EXPORT, "export")
"""Which of the package's extras brings a module."""


def main(arguments: Sequence[str] | None = None) -> NoReturn:
    """Runs a command and exits.

    Args:
        arguments: as after ``layerprune``; None for the process's own.
    """
    try:
        code = _run(arguments)
    except KeyboardInterrupt:
        code = _complain("stopped", 130)
    except ModuleNotFoundError as error:
        module = (error.name or "").partition(".")[0]
        if module not in _EXTRA:
            raise
        code = _complain(f"{module} is missing: pip install layerprune[{_EXTRA[module]}]", 2)
    sys.exit(code)


def _run(arguments: Sequence[str] | None) -> int:
    import typer

    from layerprune.commands import FAILURES, MISTAKES, Interrupted, app

    try:
        result = app(
            None if arguments is None else list(arguments),
            prog_name="layerprune",
            standalone_mode=False,
        )
        return result if isinstance(result, int) else 0
    except typer.Abort:
        return _complain("stopped", 130)
    except Interrupted as stopped:
        return _complain(str(stopped), 130)
    except MISTAKES as error:
        return _complain(str(error), 2)
    except FAILURES as error:
        return _complain(str(error), 1)
    except Exception as error:
        # typer's own exceptions lie in another module from version to version.
        if not hasattr(error, "format_message"):
            raise
        return _complain(error.format_message(), 2)


def _complain(message: str, code: int) -> int:
    # From a data-loading process comes a whole traceback, the message at its end.
    lines = message.strip().splitlines()
    if lines:  # nothing to say where typer has printed the help
        print(f"error: {lines[-1]}" if code != 130 else lines[-1], file=sys.stderr)
    return code
