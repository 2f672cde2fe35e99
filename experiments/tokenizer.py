"""Bytes as tokens: no file, no download, any language.

0 is padding, 1 ends a document, 2 begins one, byte b is 3 + b, 259 stands for a token that is hidden.
"""

from collections.abc import Iterable

import numpy as np
from jaxtyping import Integer, UInt16

PAD, EOS, BOS = 0, 1, 2
OFFSET = 3
"""The token of byte 0."""
MASK = OFFSET + 256
VOCAB_SIZE = MASK + 1


def encode(text: str | bytes) -> UInt16[np.ndarray, " n"]:
    """One token per byte of the text as UTF-8.

    >>> encode("é").tolist()
    [198, 172]
    """
    data = text.encode() if isinstance(text, str) else text
    return np.frombuffer(data, np.uint8).astype(np.uint16) + np.uint16(OFFSET)


def decode(ids: Iterable[int] | Integer[np.ndarray, " n"]) -> str:
    """The text of tokens. Ids that are no bytes are left out; bytes that are no UTF-8 become U+FFFD.

    >>> decode([2, 198, 172, 1])
    'é'
    """
    array = np.asarray(ids if isinstance(ids, np.ndarray) else list(ids), np.int64)
    array = array[(array >= OFFSET) & (array < MASK)] - OFFSET
    return array.astype(np.uint8).tobytes().decode(errors="replace")
