"""The one exception that a user is meant to read."""


class PlanishError(ValueError):
    """Something in the input is wrong; the message is one sentence that says what, where, and what to do.

    The command line prints the message without a traceback and exits with status 2.
    """
