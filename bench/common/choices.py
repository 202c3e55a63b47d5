"""Names that people type: found whatever their case, and what was most likely meant by others."""

import difflib
from collections.abc import Iterable

from ironmoe.bench.common.user_error import UserError

SHORT_DTYPES = {"fp32": "float32", "bf16": "bfloat16", "fp16": "float16"}


def named(text: str, known: Iterable[str]) -> str:
    """The known name that a text means in any case, without spaces around it; the text itself if it
    means none."""
    meant = text.strip()
    return next((name for name in known if name.lower() == meant.lower()), meant)


def chosen_names(
    option: str, text: str, known: Iterable[str], error: type[Exception] = UserError
) -> tuple[str, ...]:
    """The names in a text, separated by commas, in any case, each once.

    Args:
        option: what the message calls it.

    Raises:
        UserError: a name is not known; another one if ``error`` says so.
    """
    names = list(known)
    chosen = tuple(dict.fromkeys(named(part, names) for part in text.split(",")))
    for name in chosen:
        if name not in names:
            raise error(
                f"{option} must be among {', '.join(names)}, got {name!r}"
                f"{did_you_mean(name, names)}"
            )
    return chosen


def did_you_mean(text: str, known: Iterable[str]) -> str:
    """The end of an error message about an unknown name: "; did you mean square?", or nothing.
    Names that begin with the text come first."""
    by_lower = {name.lower(): name for name in known}
    meant = text.strip().lower()
    begin = [name for name in by_lower if meant and name.startswith(meant)]
    near = begin or difflib.get_close_matches(meant, by_lower, n=1)
    return f"; did you mean {' or '.join(by_lower[name] for name in near)}?" if near else ""
