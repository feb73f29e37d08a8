"""The one error that a user's own mistake raises."""

from __future__ import annotations


class UserError(ValueError):
    """A mistake that the user can mend: one sentence with the value, the place and the remedy.

    The command line prints the sentence without a traceback and exits with status 2.
    """
