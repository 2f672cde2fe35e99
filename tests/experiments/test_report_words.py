"""Numbers as the report says them."""

import pytest

from experiments.report import words


@pytest.mark.parametrize(
    ("said", "expected"),
    [
        (words.seconds(0.01234), "12.3 ms"),
        (words.seconds(4.2), "4.20 s"),
        (words.usd(122470.4), "USD 122,470"),
        (words.usd(0.21449), "USD 0.214"),
        (words.amount(1.39e12), "1.39 T"),
        (words.amount(999.9), "1.00 k"),
        (words.short(1536), "1.5k"),
        (words.short(2e6), "2M"),
        (words.short(0.05), "0.05"),
        (words.days(0.5), "12.0 h"),
        (words.days(6.95), "6.95 days"),
        (words.days(1 / 86400), "1.00 s"),
        (words.memory(62e9), "62.0 GB"),
        (words.memory(53.6e6), "53.6 MB"),
        (words.percent(float("nan")), words.DASH),
        (words.span(words.usd, None, 2.0), words.DASH),
        (words.span(words.seconds, 2.0, 2.0), words.DASH),
        (words.span(words.seconds, 1.0, 2.0), "1.00 s to 2.00 s"),
    ],
)
def test_numbers_as_a_reader_says_them(said, expected):
    assert said == expected
