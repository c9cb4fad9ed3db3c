"""What `shardwise launch` says of the ranks that failed beside the first: each way once, in whole words."""

from __future__ import annotations

from shardwise.cli.failures import Failure, headline, of_others


def failure(rank: int, message: str) -> Failure:
    return Failure(rank, 100 + rank, 1, {"kind": "ConfigError", "message": message, "code": 1, "time_ns": rank})


def test_an_error_that_many_ranks_had_is_said_once():
    cause = headline(failure(0, "a wrong word"))
    others = [failure(3, "a wrong word"), failure(1, "a wrong word"), failure(2, "another\nof two lines")]
    assert of_others(cause, others) == [
        "ranks 1, 3 failed too, with the same error",
        "rank 2 failed too: ConfigError: another",
    ]
    assert of_others(cause, []) == []


def test_a_long_error_ends_at_a_word_and_says_that_it_goes_on():
    (line,) = of_others("", [failure(1, "many words " * 40)])
    assert line.endswith(" ...")
    assert line.removesuffix(" ...").split()[-1] in ("many", "words")
    assert len(line) < 200
