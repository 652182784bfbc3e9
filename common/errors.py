"""Errors a user can mend: one line that says what was wrong, where, what was expected and what to do."""

import difflib
from collections.abc import Iterable


class Refusal(Exception):
    """A request that cannot be carried out as given. Entry scripts print it as one line and exit with `status`."""

    status = 2


def nearest(word: str, known: Iterable[str], limit: int = 3) -> str:
    """Suggest `; did you mean 'a' or 'b'?` for the known names closest to `word`; empty when none is close."""
    close = difflib.get_close_matches(word, list(known), n=limit, cutoff=0.6)
    return f"; did you mean {' or '.join(repr(name) for name in close)}?" if close else ""
