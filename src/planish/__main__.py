"""``python -m planish`` is the command line."""

from planish.cli.main import entry

entry()
