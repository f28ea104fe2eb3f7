"""Errors that a user can mend."""


class UserError(Exception):
    """What is wrong and how to mend it; the command line prints it without a traceback."""


class CheckpointError(UserError):
    """Files that cannot be written, or that are not what was written."""
