"""Entry point: parse, dispatch, and turn errors into one sentence and an exit status."""

from __future__ import annotations

import os
import re
import signal
import sys
from collections.abc import Sequence
from importlib import import_module
from typing import Any

from planish.cli.ended import about_memory
from planish.errors import PlanishError, printable

INTERRUPTED = 130
_SIGNALS = (signal.SIGINT, signal.SIGTERM)


def main(argv: Sequence[str] | None = None) -> int:
    """Run a command; returns (and, as a console script, exits with) 0, 2 for bad input, 130 after Ctrl-C.

    A command that went on after failures (classify, past unreadable images) ends with 1.
    """
    arguments = list(sys.argv[1:] if argv is None else argv)
    if arguments == ["--version"]:
        from planish import __version__

        print(f"planish {__version__}")
        return 0
    try:
        command = _parse(arguments)
        from planish.recipes.presence import present

        module = import_module(f"planish.cli.{type(command).__name__.lower()}")  # what is heavy is imported here
        for number in _SIGNALS:  # only where entry() has set them
            if signal.getsignal(number) is _leave:
                signal.signal(number, _interrupt)
        with present():
            status = module.execute(command) or 0
        sys.stdout.flush()
    except PlanishError as error:
        return _fail(_as_options(str(error)))
    except KeyboardInterrupt as stop:
        return _fail(str(stop) or "interrupted; nothing was written", INTERRUPTED)
    except BrokenPipeError:  # the reader, such as `head`, has had enough
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 1
    except OSError as error:
        return _fail(f"{error.filename or 'a file'}: {error.strerror or error}; what was written before is kept")
    except (MemoryError, RuntimeError) as error:
        text = about_memory(error)
        if text is None:
            raise
        return _fail(text)
    return status


def _parse(arguments: list[str]) -> Any:
    import tyro

    from planish.cli import options

    commands: dict[str, Any] = {
        "run": options.Run, "flatten": options.Flatten, "quantize": options.Quantize, "train": options.Train,
        "evaluate": options.Evaluate, "diagnose": options.Diagnose, "compare": options.Compare,
        "export": options.Export, "classify": options.Classify, "demo": options.Demo, "methods": options.Methods,
    }  # fmt: skip
    config = (tyro.conf.OmitArgPrefixes, tyro.conf.FlagCreatePairsOff)
    command = tyro.extras.subcommand_cli_from_dict(
        commands,
        args=arguments or ["--help"],
        prog="planish",
        description="Low-bit quantization of vision models: hammer the network flat, then quantize it.",
        config=config,
    )
    if isinstance(command, options.Run) and command.resume:
        from planish.cli.resume import as_it_began

        begun = as_it_began(command)
        return tyro.cli(options.Run, args=arguments[1:], prog="planish run", default=begun, config=config)
    return command


def _as_options(message: str) -> str:
    """An error that names the arguments of a Python call, in the words of the command line."""
    message = re.sub(r"\ballow=\('([^']*)',\)", r"--allow '\1'", message)
    message = re.sub(r"\ballow='([^']*)'", r"--allow '\1'", message)
    head = r"give a model that was trained for \1 classes (--model, --weights)"
    message = re.sub(r"give num_classes=(\d+) for a new head", head, message)
    message = message.replace("leave activations=False", "leave --budget-activations away")
    return message.replace("trust=True", "--trust").replace("output_bits", "output-bits")


def _fail(message: str, status: int = 2) -> int:
    rank = int(os.environ.get("RANK", "0"))  # of the processes of `accelerate launch`; Ctrl-C reaches all of them
    if not (rank and status == INTERRUPTED):
        print(f"planish{f' (process {rank})' if rank else ''}: {printable(message)}", file=sys.stderr)
    return status


def _leave(number: int, frame: Any) -> None:
    """A signal while modules are imported, where anyone could catch an exception; nothing is lost yet."""
    os.write(2, b"planish: interrupted before anything was done\n")
    os._exit(INTERRUPTED)


def _interrupt(number: int, frame: Any) -> None:
    raise KeyboardInterrupt


def entry() -> None:
    """The console script."""
    for number in _SIGNALS:
        if signal.getsignal(number) is not signal.SIG_IGN:  # in the background of a script, or under nohup
            signal.signal(number, _leave)
    for stream in (sys.stdout, sys.stderr):  # a file name that the terminal's encoding lacks is no reason to stop
        if hasattr(stream, "reconfigure"):
            stream.reconfigure(errors="backslashreplace")
    status = main()
    for number in _SIGNALS:
        signal.signal(number, signal.SIG_IGN)  # it is over: the interpreter only cleans up
    if not status and "torch" in sys.modules:
        from planish.recipes.processes import leave_group

        leave_group()
    sys.exit(status)
