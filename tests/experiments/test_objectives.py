"""What is predicted from what, by hand and by counting; and that no prefix shows its own answer."""

import numpy as np
import pytest

from experiments import data, objectives
from experiments.tokenizer import BOS, EOS, MASK, PAD

TEXT = np.random.default_rng(0).integers(ord("a"), ord("z") + 1, (4000, 27), np.uint8)
"""108,000 letters of which no two windows are alike."""


@pytest.fixture
def corpus(tmp_path, monkeypatch):
    monkeypatch.setenv("LADDER_CACHE", str(tmp_path / "cache"))
    (tmp_path / "a.txt").write_bytes(TEXT.tobytes())
    return f"text:{tmp_path}/a.txt"


def stream(corpus, objective, **changes):
    request = {"split": "train", "batch_seqs": 16, "seq_len": 64, "seed": 0, "vocab_size": 264}
    return data.batches(corpus, objective=objective, **(request | changes))


def epochs(corpus, objective, n, **changes):
    """n epochs, each as one batch."""
    n_tokens = len(data.tokens(corpus, "train"))
    n_windows = (n_tokens - (objective != "masked")) // 64
    read = stream(corpus, objective, batch_seqs=1, **changes)
    found = []
    for _ in range(n):
        rows = [next(read) for _ in range(n_windows)]
        found.append({key: np.concatenate([row[key] for row in rows]) for key in rows[0]})
    return found


def by_text(epoch, key):
    """The rows of an epoch in an order that every epoch has."""
    order = np.lexsort(epoch["targets"].T)
    return epoch[key][order]


def test_the_default_dataset_has_what_the_objective_needs():
    defaults = {objective: data.default_dataset(objective) for objective in ("causal", "masked", "prefix", "pairs")}
    assert defaults == {"causal": "shakespeare", "masked": "shakespeare", "prefix": "shakespeare", "pairs": "en_es"}


# Masking


def test_masking_changes_what_it_chose_and_nothing_else(corpus):
    for batch, _ in zip(stream(corpus, "masked"), range(20), strict=False):
        chosen = batch["weights"] == 1
        np.testing.assert_array_equal(batch["inputs"][~chosen], batch["targets"][~chosen])
        assert chosen.any(axis=1).all()
        assert (batch["targets"] != MASK).all()


def test_targets_of_a_masked_batch_are_the_text(corpus):
    (whole,) = epochs(corpus, "masked", 1)
    tokens = data.tokens(corpus, "train")
    n = len(tokens) // 64
    windows = tokens[: n * 64].reshape(n, 64).astype(np.int32)
    np.testing.assert_array_equal(by_text(whole, "targets"), windows[np.lexsort(windows.T)])


def test_masking_is_80_10_10_of_15_percent(corpus):
    """Devlin et al. 2019, sec. 3.1. Of 100,000 tokens 15,000 are chosen, so 4 standard errors are 0.5 and 1.3 %."""
    (whole,) = epochs(corpus, "masked", 1)
    chosen = whole["weights"] == 1
    inputs, targets = whole["inputs"][chosen], whole["targets"][chosen]
    assert chosen.mean() == pytest.approx(0.15, abs=0.005)
    assert np.mean(inputs == MASK) == pytest.approx(0.8, abs=0.013)
    assert np.mean(inputs == targets) == pytest.approx(0.1 + 0.1 / 256, abs=0.01)
    other = inputs[(inputs != MASK) & (inputs != targets)]
    assert len(other) / len(inputs) == pytest.approx(0.1 * 255 / 256, abs=0.01)
    assert other.min() >= 3
    assert len(np.unique(other)) > 240  # of 256, in some 1,500 throws
    assert other.mean() == pytest.approx(130.5, abs=8)


def test_masking_prefers_no_place_and_no_neighbour(corpus):
    (whole,) = epochs(corpus, "masked", 1)
    chosen = whole["weights"]
    n = len(chosen)
    assert np.abs(chosen.mean(axis=0) - 0.15).max() < 4.5 * np.sqrt(0.15 * 0.85 / n)
    together = (chosen[:, 1:] * chosen[:, :-1]).mean()
    assert together == pytest.approx(0.15**2, abs=4.5 * np.sqrt(0.15**2 / (n * 63)))


def test_a_window_of_one_token_is_always_asked_for(corpus):
    batch = next(stream(corpus, "masked", seq_len=1))
    assert (batch["weights"] == 1).all()


def test_masking_differs_between_epochs_and_seeds_in_training(corpus):
    first, second = epochs(corpus, "masked", 2)
    (other,) = epochs(corpus, "masked", 1, seed=1)
    for epoch in (second, other):
        np.testing.assert_array_equal(by_text(first, "targets"), by_text(epoch, "targets"))
        agree = (by_text(first, "weights") == by_text(epoch, "weights")).mean()
        assert agree == pytest.approx(0.15**2 + 0.85**2, abs=0.02)


def test_masking_is_fixed_in_validation_whatever_the_seed_and_the_batch(corpus):
    def whole(**changes):
        return np.concatenate([b["inputs"] for b in stream(corpus, "masked", split="validation", **changes)])[:64]

    np.testing.assert_array_equal(whole(seed=0), whole(seed=5))
    np.testing.assert_array_equal(whole(batch_seqs=16), whole(batch_seqs=4))


def test_masked_by_hand():
    """Chosen are 0 and 2: below 15 %. Token 0 becomes MASK; 2 a random byte, 7; row 1 has only its smallest."""
    limit, bits = int(0.15 * 2**32), 2**24
    draws = np.array(
        [
            [(limit - 1) << 32, limit << 32, (int(0.85 * bits) << 8) + 7],
            [(limit + 9) << 32, ((limit + 5) << 32) + (int(0.95 * bits) << 8), 2**64 - 1],
        ],
        np.uint64,
    )
    window = np.array([[10, 11, 12], [20, 21, 22]], np.int32)
    batch = objectives.masked(window, draws)
    assert batch["inputs"].tolist() == [[MASK, 11, 3 + 7], [20, 21, 22]]
    assert batch["weights"].tolist() == [[1, 0, 1], [0, 1, 0]]
    assert batch["targets"] is window


# Prefix


def test_a_target_counts_where_and_only_where_its_position_cannot_see_it():
    """Position i sees keys s with s <= i or s < prefix, so its target, token i + 1, is seen where i + 1 < prefix."""
    L = 9
    window = np.arange(L + 1, dtype=np.int32)[None].repeat(L - 1, 0)
    draws = (np.arange(L - 1, dtype=np.uint64) << np.uint64(32)) * np.uint64(2**32 // (L - 1)) + np.uint64(2**32 - 1)
    batch = objectives.after_prefix(window, draws)
    assert batch["prefix"].tolist() == list(range(1, L))
    for row, prefix in enumerate(batch["prefix"]):
        for i in range(L):
            visible = {s for s in range(L) if s <= i or s < prefix}
            assert batch["inputs"][row, i] == i
            assert batch["targets"][row, i] == i + 1
            assert batch["weights"][row, i] == (i + 1 not in visible)


def test_the_split_is_uniform_over_all_that_leave_both_parts(corpus):
    (whole,) = epochs(corpus, "prefix", 1)
    counts = np.bincount(whole["prefix"], minlength=65)
    assert counts[0] == counts[64] == 0
    expected = len(whole["prefix"]) / 63
    chi2 = ((counts[1:64] - expected) ** 2 / expected).sum()
    assert chi2 < 62 + 4 * np.sqrt(2 * 62)
    first, second = (by_text(epoch, "prefix") for epoch in epochs(corpus, "prefix", 2))
    assert np.mean(first == second) < 0.1


def test_the_smallest_window_has_one_split(corpus):
    batch = next(stream(corpus, "prefix", seq_len=2))
    assert (batch["prefix"] == 1).all()
    assert (batch["weights"] == 1).all()


# Random numbers


@pytest.mark.parametrize("width", [1, 4, 7])
def test_a_sequence_has_its_numbers_wherever_they_are_drawn(width):
    whole = objectives.draws(5, 0, 12, width)
    np.testing.assert_array_equal(objectives.draws(5, 3, 4, width), whole[3:7])
    assert len(np.unique(whole)) == whole.size
    assert not np.intersect1d(whole, objectives.draws(6, 0, 12, width)).size


# Pairs


def test_packed_pairs_by_hand():
    a, b, c, d = 11, 12, 13, 14
    rows = np.array([[[a, b, EOS, c, EOS, PAD], [d, EOS, EOS, PAD, PAD, PAD]]], np.int32)
    batch = {key: array.tolist()[0] for key, array in objectives.side_by_side(rows).items()}
    assert batch == {
        "source": [a, b, EOS, c, EOS, PAD],
        "source_segments": [1, 1, 1, 2, 2, 0],
        "source_positions": [0, 1, 2, 0, 1, 0],
        "inputs": [BOS, d, BOS, PAD, PAD, PAD],
        "targets": [d, EOS, EOS, PAD, PAD, PAD],
        "segments": [1, 1, 2, 0, 0, 0],
        "positions": [0, 1, 0, 0, 0, 0],
        "weights": [1, 1, 1, 0, 0, 0],
    }
