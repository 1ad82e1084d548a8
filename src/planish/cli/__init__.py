"""The command line: arguments in, run folder out. Nothing heavy is imported before a command is known.

Each command is a dataclass in ``options`` and a module of its name with ``execute(command)``.
"""

from planish.cli.main import main

__all__ = ["main"]
