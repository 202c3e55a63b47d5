"""The errors for data that cannot be used."""

import re

ADDRESS = re.compile(r"( <_io\.\w+ object)? at 0x[0-9a-fA-F]+(?(1)>)")
"""What Python says of a thing without a name. Of a file in memory nothing else is known."""


class DataError(ValueError):
    """The data cannot be used; the message says which file or array, and why."""


class UnreadableImage(DataError):
    """One image of the data cannot be read, while others may be."""


def without_addresses(text: str) -> str:
    """An error's text, or a ``repr``, without places in memory, which are others in each run."""
    return ADDRESS.sub("", text)
