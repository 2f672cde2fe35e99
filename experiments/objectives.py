"""What is predicted from what: rows of tokens -> the batch of an objective.

    causal    the next token from those before it: a decoder
    prefix    the same, after a beginning that is seen whole: a prefix decoder
    masked    tokens that were hidden, from all others: an encoder
    pairs     a target, token by token, from its source: an encoder-decoder

Batches are as `transformer.models` reads them, int32, with "targets" [B, L] and float32 "weights" [B, L]: the loss
is the weighted mean. Whatever is random comes in as `draws`.

Letters: B batch, L length, T = L + 1 tokens whose targets are among them.
"""

from typing import Literal

import numpy as np
from jaxtyping import Int32, UInt64

from experiments.tokenizer import BOS, EOS, MASK, OFFSET, PAD

Objective = Literal["causal", "masked", "prefix", "pairs"]
Batch = dict[str, np.ndarray]

CHOSEN, HIDDEN, REPLACED = 0.15, 0.8, 0.1
"""Masking: the part of tokens to predict; of those the part that becomes MASK, and another token."""


def draws(key: int, first: int, n: int, width: int) -> UInt64[np.ndarray, "n {width}"]:
    """`width` random numbers for each of n sequences, those from `first` on of a stream that `key` names.

    Philox counts: a sequence has its numbers whatever was drawn before, on whichever process (Salmon et al. 2011).
    """
    blocks = -(-width // 4)  # a count is good for four numbers
    numbers = np.random.Philox(key=key, counter=first * blocks).random_raw(n * blocks * 4)
    return np.asarray(numbers, np.uint64).reshape(n, -1)[:, :width]


def next_tokens(window: Int32[np.ndarray, "B T"]) -> Batch:
    """Every token from those before it."""
    inputs, targets = window[:, :-1], window[:, 1:]
    return {"inputs": inputs, "targets": targets, "weights": np.ones(inputs.shape, np.float32)}


def after_prefix(window: Int32[np.ndarray, "B T"], draws: UInt64[np.ndarray, " B"]) -> Batch:
    """A prefix LM (Raffel et al. 2020, sec. 3.2.3): "prefix" [B], uniform in 1 ... L - 1, inputs are seen by all.

    Position i predicts token i + 1. Where i + 1 < prefix it sees the answer, so that its weight is 0; the first
    that counts is the prefix's last position, as the last of the prompt is in use."""
    batch = next_tokens(window)
    seq_len = batch["inputs"].shape[1]
    span = np.uint64(seq_len - 1)
    prefix = 1 + ((draws >> np.uint64(32)) * span >> np.uint64(32)).astype(np.int32)
    counts = np.arange(1, seq_len + 1)[None] >= prefix[:, None]
    return batch | {"prefix": prefix, "weights": counts.astype(np.float32)}


def masked(window: Int32[np.ndarray, "B L"], draws: UInt64[np.ndarray, "B L"]) -> Batch:
    """A masked LM (Devlin et al. 2019, sec. 3.1): 15 % of tokens are to be predicted, at least one a window.

    Each is chosen by itself; of those chosen 80 % become MASK, 10 % a random byte and 10 % stay. Of a random
    number, 32 bits choose, 24 say what becomes of the token, and 8 are the random byte."""
    choice = draws >> np.uint64(32)
    fate = draws >> np.uint64(8) & np.uint64(0xFFFFFF)
    other = OFFSET + (draws & np.uint64(0xFF)).astype(np.int32)
    chosen = (choice < int(CHOSEN * 2**32)) | (choice == choice.min(axis=1, keepdims=True))
    corrupted = np.where(fate < int((HIDDEN + REPLACED) * 2**24), other, window)
    corrupted = np.where(fate < int(HIDDEN * 2**24), np.int32(MASK), corrupted)
    return {
        "inputs": np.where(chosen, corrupted, window),
        "targets": window,
        "weights": chosen.astype(np.float32),
    }


def side_by_side(rows: Int32[np.ndarray, "B 2 L"]) -> Batch:
    """Packed pairs as an encoder-decoder reads them: segments from 1 and 0 for padding, positions from 0 in each.

    The decoder's inputs are BOS and the target without its end. Every text ends in EOS and PAD is in none, so
    all follows from the tokens."""
    filled = rows != PAD
    starts = filled.copy()
    starts[..., 1:] &= rows[..., :-1] == EOS
    place = np.arange(rows.shape[-1], dtype=np.int32)
    segments = starts.cumsum(axis=-1, dtype=np.int32) * filled
    positions = (place - np.maximum.accumulate(np.where(starts, place, 0), axis=-1)) * filled
    targets = rows[:, 1]
    before = np.concatenate([targets[:, :1], targets[:, :-1]], axis=1)  # the first is replaced
    return {
        "source": rows[:, 0],
        "source_segments": segments[:, 0],
        "source_positions": positions[:, 0],
        "inputs": np.where(starts[:, 1], np.int32(BOS), before) * filled[:, 1],
        "targets": targets,
        "segments": segments[:, 1],
        "positions": positions[:, 1],
        "weights": filled[:, 1].astype(np.float32),
    }
