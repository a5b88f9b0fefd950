"""Errors that a user can fix."""


class UserError(ValueError):
    """A mistake that the user can fix; commands print it as one line and exit with code 1.

    The message names the file, row or key, says what was found and what was expected, and what to
    do.
    """


class MissingFileError(UserError, FileNotFoundError):
    """A file or folder that the user named does not exist."""
