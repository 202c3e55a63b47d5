"""The error for data that cannot be used."""


class DataError(ValueError):
    """The data cannot be used; the message says which file or array, and why."""


class UnreadableImage(DataError):
    """One image of the data cannot be read, while others may be."""
