"""What a script says in one line: errors instead of a traceback, and notes."""
from __future__ import annotations

import sys
from functools import cache

LONGEST = 590  # characters of a message; with "error: " before it, it stays under 600


def one_line(text: str) -> str:
    """The text without line breaks; of one longer than `LONGEST` the middle is left out, and is said to be."""
    text = " ".join(text.splitlines())
    if len(text) <= LONGEST:
        return text
    return f"{text[:380]} [... {len(text) - 540:,} characters left out ...] {text[-160:]}"


class UserError(Exception):
    """The user's input cannot be used; the message says what is wrong and what would be right.

    Scripts print it as ``error: <message>`` and exit with `exit_code`. It is one line of at most `LONGEST` characters.
    """

    exit_code = 2

    def __init__(self, message: str):
        """message: shortened by `one_line` where it is too long."""
        super().__init__(one_line(message))


class RunFailed(UserError):
    """The input was fine but the run could not go on (a diverged training, say); exit code 1."""

    exit_code = 1


@cache
def note(text: str) -> None:
    """Prints ``note: <text>`` on stderr, each text once in a process."""
    print(one_line(f"note: {text}"), file=sys.stderr)
