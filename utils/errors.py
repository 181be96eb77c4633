"""What a script says in one line: errors instead of a traceback, and notes."""
from __future__ import annotations

import sys
from functools import cache


class UserError(Exception):
    """The user's input cannot be used; the message says what is wrong and what would be right.

    Scripts print it as ``error: <message>`` and exit with `exit_code`.
    """

    exit_code = 2


class RunFailed(UserError):
    """The input was fine but the run could not go on (a diverged training, say); exit code 1."""

    exit_code = 1


@cache
def note(text: str) -> None:
    """Prints ``note: <text>`` on stderr, each text once in a process."""
    print(f"note: {text}", file=sys.stderr)
