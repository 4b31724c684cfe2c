"""One choice's tokens become text, log-probabilities and an end, however they arrive."""

from __future__ import annotations

import pytest

from services.gateway.replies.choice_text import ChoiceText, Reading
from services.gateway.sessions.session import Finish, FinishReason, Mailbox, Session, TokenLogprobs
from shared.engine.sampling_params import SamplingParams
from shared.identity import pack_tokens

EOS = 3


class Harness:
    def __init__(self, tokenizer, stops=(), **sampling):
        session = Session(pack_tokens([1]), SamplingParams(max_tokens=100, **sampling), 1, Mailbox())
        self.choice = session.choices[0]
        self.text = ChoiceText(0, self.choice, tokenizer, Reading(tuple(stops)))
        self.has_logprobs = sampling.get("num_logprobs") is not None

    def feed(self, token_ids, finish=None):
        for token_id in token_ids:
            self.choice.push(token_id)
            if self.has_logprobs:
                self.choice.push_logprobs(TokenLogprobs(-1.0, (token_id,), (-1.0,)))
        if finish is not None:
            self.choice.end(finish)
        return self.text.advance()


@pytest.fixture
def make(model_files):
    return lambda stops=(), **sampling: Harness(model_files, stops, **sampling)


def test_end_comes_with_the_workers_last_word(make, text_ids):
    delta = make().feed([*text_ids("done"), EOS], Finish(FinishReason.STOP, EOS))
    assert (delta.text, delta.finish_reason, delta.stop_reason) == ("done", "stop", None)


def test_length_is_told_apart_from_stop(make, text_ids):
    assert make().feed(text_ids("do"), Finish(FinishReason.LENGTH)).finish_reason == "length"


def test_stop_token_that_was_asked_for_is_named(make, text_ids):
    harness = make(stop_token_ids=frozenset({300}))
    assert harness.feed([300], Finish(FinishReason.STOP, 300)).stop_reason == 300


def test_stop_string_hides_itself_and_what_follows(make, text_ids):
    harness = make(["STOP"])
    tokens = text_ids("before STOP after")
    first = harness.feed(tokens)
    assert first.text == "before "
    assert harness.text.hit_stop_string
    assert first.finish_reason is None
    last = harness.feed(text_ids("more"), Finish(FinishReason.ABORT))
    assert (last.text, last.finish_reason, last.stop_reason) == ("", "stop", "STOP")


def test_tokens_after_a_stop_string_are_not_counted(make, text_ids):
    harness, tokens = make(["STOP"]), text_ids("a STOP")
    harness.feed(tokens + text_ids(" and more"))
    assert harness.text.num_tokens == len(tokens)


def test_one_by_one_and_all_at_once_show_the_same(make, text_ids):
    tokens = text_ids("some text, then EN and END of it")
    whole = make(["END"], num_logprobs=0).feed(tokens)
    harness = make(["END"], num_logprobs=0)
    deltas = [harness.feed([token_id]) for token_id in tokens]
    assert "".join(delta.text for delta in deltas) == whole.text == "some text, then EN and "
    assert [entry for delta in deltas for entry in delta.tokens] == whole.tokens


def test_logprobs_cover_the_shown_text_and_nothing_else(make, text_ids, model_files):
    harness = make(["END"], num_logprobs=0)
    delta = harness.feed(text_ids("the text END more"))
    assert "".join(model_files.token_text(entry.token_id) for entry in delta.tokens).startswith(delta.text)
    assert all(entry.offset < len(delta.text) for entry in delta.tokens)
    assert delta.tokens[0].offset == 0


def test_end_mark_has_no_logprobs(make, text_ids):
    tokens = text_ids("hi there")
    delta = make(num_logprobs=0).feed([*tokens, EOS], Finish(FinishReason.STOP, EOS))
    assert [entry.token_id for entry in delta.tokens] == tokens


def test_stop_strings_are_not_looked_for_before_min_tokens(make, text_ids):
    tokens = text_ids("a b a b")
    harness = make(["b"], min_tokens=len(tokens) - 1)
    assert harness.feed(tokens).text == "a b a "


def test_unfinished_character_is_shown_as_a_replacement_at_the_end(make, text_ids):
    tokens = text_ids("🎉")[:-1]
    assert make().feed(tokens, Finish(FinishReason.LENGTH)).text == "\ufffd"


def test_text_held_for_a_stop_string_is_shown_at_the_end(make, text_ids):
    harness = make(["ENDING"])
    assert harness.feed(text_ids("the END")).text == "the "
    assert harness.feed([], Finish(FinishReason.LENGTH)).text == "END"
