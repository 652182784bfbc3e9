"""Names as they are shown: a file may be called by any bytes, and a screen, a list or a page takes only some."""

import unicodedata

# What reorders the text around it: "gpj.exe" shown as "exe.jpg".
REORDERING = frozenset("\u200e\u200f\u202a\u202b\u202c\u202d\u202e\u2066\u2067\u2068\u2069")
ESCAPED = frozenset({"Cc", "Cs", "Zl", "Zp"})  # control characters, halves of characters, line and paragraph ends


def printable(name: str | bytes) -> str:
    """Name in one line that can be written anywhere in UTF-8: bytes that are no text become `\\xf6`, a line end `\\n`.

    Takes names as Python has them, in which bytes that the locale cannot read are "surrogates" (PEP 383), and gives the
    same under every locale. What is printable already stays as it is.
    """
    if isinstance(name, str) and name.isascii() and name.isprintable():
        return name
    text = (name if isinstance(name, bytes) else _bytes(name)).decode("utf-8", "backslashreplace")
    return "".join(
        _escaped(character) if character in REORDERING else character for character in map(_escaped_control, text)
    )


def printable_lines(text: str) -> str:
    """Every line of a text as `printable` has it."""
    return "\n".join(map(printable, text.split("\n")))


def _bytes(name: str) -> bytes:
    try:
        return name.encode("utf-8", "surrogateescape")
    except UnicodeEncodeError:  # half of a character of a Windows name
        return name.encode("utf-8", "backslashreplace")


def _escaped_control(character: str) -> str:
    return _escaped(character) if unicodedata.category(character) in ESCAPED else character


def _escaped(character: str) -> str:
    return character.encode("unicode_escape").decode("ascii")
