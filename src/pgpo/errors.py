"""The errors that end a command with one sentence."""

from __future__ import annotations


class UserError(ValueError):
    """A mistake that the user can mend: one sentence with the value, the place and the remedy.

    The command line prints the sentence without a traceback and exits with status 2.
    """


class LostRankError(RuntimeError):
    """Another process of the job has died, failed or fallen silent; the sentence names it. Exit status 1."""
