"""Names that people type: found whatever their case, and what was most likely meant by others."""

import difflib
from collections.abc import Iterable

SHORT_DTYPES = {"fp32": "float32", "bf16": "bfloat16", "fp16": "float16"}


def named(text: str, known: Iterable[str]) -> str:
    """The known name that a text means in any case, without spaces around it; the text itself if it
    means none."""
    meant = text.strip()
    return next((name for name in known if name.lower() == meant.lower()), meant)


def did_you_mean(text: str, known: Iterable[str]) -> str:
    """The end of an error message about an unknown name: "; did you mean square?", or nothing.
    Names that begin with the text come first."""
    by_lower = {name.lower(): name for name in known}
    meant = text.strip().lower()
    begin = [name for name in by_lower if meant and name.startswith(meant)]
    near = begin or difflib.get_close_matches(meant, by_lower, n=1)
    return f"; did you mean {' or '.join(by_lower[name] for name in near)}?" if near else ""
