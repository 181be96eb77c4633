"""Errors that a script reports in one line instead of a traceback."""
from __future__ import annotations


class UserError(Exception):
    """The user's input cannot be used; the message says what is wrong and what would be right.

    Scripts print it as ``error: <message>`` and exit with `exit_code`.
    """

    exit_code = 2


class RunFailed(UserError):
    """The input was fine but the run could not go on (a diverged training, say); exit code 1."""

    exit_code = 1
