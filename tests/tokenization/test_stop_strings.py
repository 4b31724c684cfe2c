"""Stop strings are found wherever the pieces are cut."""

from __future__ import annotations

from hypothesis import given
from hypothesis import strategies as st

from shared.tokenization.stop_strings import StopMatcher


def run(stops, pieces):
    matcher, shown = StopMatcher(stops), []
    for piece in pieces:
        shown.append(matcher.push(piece))
        if matcher.matched is not None:
            return "".join(shown), matcher.matched
    return "".join(shown) + matcher.flush(), None


def expected(stops, text):
    """The stop string that completes first; of those that complete together, the longest."""
    for end in range(1, len(text) + 1):
        found = [stop for stop in stops if text[:end].endswith(stop)]
        if found:
            stop = max(found, key=len)
            return text[: end - len(stop)], stop
    return text, None


def test_stop_string_across_pieces_is_cut_out():
    assert run(("\n\nQ:",), ["answer\n", "\n", "Q", ": next"]) == ("answer", "\n\nQ:")


def test_text_that_only_begins_like_a_stop_string_is_shown_late_but_shown():
    matcher = StopMatcher(("END",))
    assert matcher.push("the EN") == "the "
    assert matcher.push("ORM") == "ENORM"


def test_held_text_comes_out_at_the_end():
    matcher = StopMatcher(("END",))
    assert matcher.push("EN") == ""
    assert matcher.flush() == "EN"


def test_overlap_with_itself_is_followed():
    assert run(("aab",), ["a", "a", "a", "b"]) == ("a", "aab")


def test_stop_string_inside_a_longer_one_wins_because_it_completes_first():
    assert run(("abcd", "bc"), ["abcd"]) == ("a", "bc")


def test_longest_wins_when_two_complete_together():
    assert run(("c", "abc"), ["xabc"]) == ("x", "abc")


@given(
    st.lists(st.text("ab", min_size=1, max_size=5), min_size=1, max_size=3).map(tuple),
    st.lists(st.text("abc", max_size=4), max_size=12),
)
def test_result_depends_on_the_text_alone(stops, pieces):
    assert run(stops, pieces) == expected(stops, "".join(pieces))
