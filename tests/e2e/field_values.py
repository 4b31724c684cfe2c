"""Values for every field of completions and chats, so that each changes or checks what comes back."""

from __future__ import annotations

MODEL = "pydoc-mini"
FILLER = "The report was read twice and filed. Nobody asked for a second copy. " * 6
SCHEMA = {
    "type": "object",
    "properties": {
        "name": {"type": "string", "maxLength": 12},
        "count": {"type": "integer", "minimum": 0, "maximum": 99},
        "kind": {"enum": ["a", "b"]},
    },
    "required": ["name", "count", "kind"],
    "additionalProperties": False,
}
TOOLS = [
    {"type": "function", "function": {"name": "f", "parameters": SCHEMA}},
    {"type": "function", "function": {"name": "ping"}},
]
FORMAT = {"type": "json_schema", "json_schema": {"name": "s", "schema": SCHEMA, "strict": True}}
NAMED = {"type": "function", "function": {"name": "f"}}

COMPLETIONS = {
    "json": {"guided_json": SCHEMA, "temperature": 1, "seed": 4, "n": 3, "logprobs": 2},
    "regex": {"structured_outputs": {"regex": "[a-f]{3}-[0-9]{2}"}, "temperature": 1, "seed": 1},
    "guided-regex": {"guided_regex": "[a-z ]{8,40}", "temperature": 1, "seed": 13},
    "choice": {"guided_choice": ["yes", "no", "maybe"], "temperature": 1, "seed": 2, "n": 4},
    "grammar": {"guided_grammar": 'root ::= "a" root | "b"', "temperature": 1, "seed": 5},
    "echo": {"echo": True, "logprobs": 2, "max_tokens": 0},
    "prompt-logprobs": {"prompt_logprobs": 3, "n": 2, "max_tokens": 4, "temperature": 0},
    "best-of": {"best_of": 4, "n": 2, "temperature": 1, "seed": 6, "max_tokens": 12},
    "allowed": {"allowed_token_ids": [300, 301, 302], "temperature": 1, "seed": 7, "max_tokens": 8},
    "bad-words": {"bad_words": ["the", "is"], "temperature": 0, "max_tokens": 24},
    "stop": {"stop": ["the"], "include_stop_str_in_output": True, "temperature": 0, "max_tokens": 40},
    "token-ids": {"return_token_ids": True, "return_tokens_as_token_ids": True, "logprobs": 1, "max_tokens": 6},
    "truncated": {"truncate_prompt_tokens": 40, "temperature": 0, "max_tokens": 8},
    "special": {"skip_special_tokens": False, "temperature": 0, "max_tokens": 40},
    "sampling": {"temperature": 0.9, "seed": 8, "top_p": 0.9, "top_k": 40, "min_p": 0.02, "n": 2, "logprobs": 1},
    "penalties": {"temperature": 0.8, "seed": 9, "presence_penalty": 0.7, "frequency_penalty": 0.3,
                  "repetition_penalty": 1.1, "ignore_eos": True},
    "bias": {"temperature": 0, "logit_bias": {"300": 5.0, "310": -100}, "min_tokens": 20, "stop_token_ids": [300]},
    "batch": {"prompt": [FILLER, FILLER + "Again."], "temperature": 1, "seed": 10, "n": 2, "max_tokens": 32},
    "whitespace": {"guided_json": SCHEMA, "guided_whitespace_pattern": "[ ]?", "temperature": 1, "seed": 11},
    "object": {"response_format": {"type": "json_object"}, "temperature": 1, "seed": 12, "max_tokens": 60},
    "right": {"truncate_prompt_tokens": 40, "truncation_side": "right", "temperature": 0, "max_tokens": 24},
    "beams": {"use_beam_search": True, "n": 3, "max_tokens": 24, "length_penalty": 0.5, "logprobs": 0},
}  # fmt: skip
CHATS = {
    "response-format": {"response_format": FORMAT, "temperature": 1, "seed": 1, "n": 2},
    "required": {"tools": TOOLS, "tool_choice": "required", "temperature": 1, "seed": 2},
    "named": {"tools": TOOLS, "tool_choice": NAMED, "temperature": 1, "seed": 3},
    "one-call": {"tools": TOOLS, "tool_choice": "required", "parallel_tool_calls": False, "temperature": 1, "seed": 4},
    "scores": {"logprobs": True, "top_logprobs": 3, "temperature": 0, "max_completion_tokens": 40, "max_tokens": None},
    "begun": {"messages": [{"role": "user", "content": FILLER}, {"role": "assistant", "content": "It is"}],
              "continue_final_message": True, "add_generation_prompt": False, "temperature": 0},
    "offered": {"tools": TOOLS, "tool_choice": "auto", "temperature": 1, "seed": 5, "max_tokens": 60},
}  # fmt: skip
