"""The one error type that data problems raise."""


class DataError(ValueError):
    """Data on disk, in a package or given by the user cannot be used.

    The message is one readable line: what is wrong, where, and what to do. Commands print it and exit with 1.
    """
