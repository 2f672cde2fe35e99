"""The one error that a user can cause. Imports nothing, so that every room can raise it."""

import difflib
from collections.abc import Iterable


class RequestError(ValueError):
    """What was asked for is wrong: the message is one line that names the value, what was
    expected and the nearest right one. Entry points print it and exit with code 2."""


def nearest(value: str, options: Iterable[str]) -> str:
    """The end of a message about an unknown name: the closest option, or all of them.

    >>> nearest("lama3-8b", ["llama3-8b", "tiny"])
    "did you mean 'llama3-8b'?"
    >>> nearest("x", ["tiny", "gpt2-124m"])
    'known: gpt2-124m, tiny'
    """
    options = sorted(options)
    close = difflib.get_close_matches(value, options, n=1)
    return f"did you mean {close[0]!r}?" if close else f"known: {', '.join(options)}"
