"""What is found among rows that stay, and what these stand for."""

import numpy as np

from penstock.operators.duplicate_quality import relevant_share, with_represented


def test_represented_names_follow_what_stands_for_them() -> None:
    found = [("a#0", "a"), ("a#1", "a"), ("b#0", "b"), ("c#0", "c")]
    stands_for = {"a#1": ["x", "b", "other"], "b#0": ["x", "y"], "c#0": ["z"]}
    names, credited = with_represented(found, stands_for, {"b", "x", "y", "z"}, 2)
    assert names == ["a", "b"]
    assert credited == ["a", "x", "b", "y"]  # nothing for "c", which is the third


def test_a_passage_stands_for_nothing_where_nothing_went() -> None:
    assert with_represented([("a#0", "a"), ("b#0", "b")], {}, {"a"}, 5) == (["a", "b"], ["a", "b"])
    assert with_represented([], {"a": ["b"]}, {"b"}, 5) == ([], [])


def test_share_of_the_relevant_that_is_found() -> None:
    judged = [{"a": 1.0, "b": 2.0, "c": 0.0}, {"a": 0.0}, {"x": 1.0}]
    shares = relevant_share([["a", "c", "d"], ["a"], []], judged)
    assert shares[0] == 0.5 and np.isnan(shares[1]) and shares[2] == 0
