"""Chat templates, against transformers' own rendering."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from transformers import AutoTokenizer

from shared.errors import ConfigurationError, InvalidRequest
from shared.tokenization.chat_template import ChatTemplate

MODEL_DIR = Path("shared/assets/pydoc-mini")
MESSAGES = [
    {"role": "system", "content": "Be brief."},
    {"role": "user", "content": 'What is "x" & <y>?'},
    {"role": "assistant", "content": "A letter."},
    {"role": "user", "content": "And 世界?"},
]
# Everything that the environment has to offer, in one template.
FEATURES = """
{% for message in messages %}
    {% if loop.index0 > 2 %}{% break %}{% endif %}
    {{ bos_token }}{{ message | tojson }}{{ {"b": 1, "a": "ü<"} | tojson(indent=2) }}
    {% generation %}{{ message['content'].strip() }}{% endgeneration %}
{% endfor %}
{{ strftime_now("%Y") }}{% if tools is not none %}tools{% endif %}{% if add_generation_prompt %}>>{% endif %}"""


@pytest.fixture(scope="module")
def reference():
    return AutoTokenizer.from_pretrained(MODEL_DIR)


def test_bundled_template_renders_as_transformers_does(reference):
    expected = reference.apply_chat_template(MESSAGES, tokenize=False, add_generation_prompt=True)
    assert ChatTemplate.from_pretrained(MODEL_DIR).render(MESSAGES) == expected


def test_environment_renders_as_transformers_does(reference):
    expected = reference.apply_chat_template(
        MESSAGES, chat_template=FEATURES, tokenize=False, add_generation_prompt=True
    )
    template = ChatTemplate(FEATURES, {"bos_token": reference.bos_token})
    assert template.render(MESSAGES) == expected


def test_refusal_by_the_template_is_the_clients_error():
    template = ChatTemplate("{{ raise_exception('roles must alternate') }}", {})
    with pytest.raises(InvalidRequest, match="roles must alternate"):
        template.render(MESSAGES)


def test_template_cannot_reach_python():
    template = ChatTemplate("{{ messages.__class__.__mro__ }}", {})
    with pytest.raises(InvalidRequest):
        template.render(MESSAGES)


def test_template_cannot_change_its_arguments():
    with pytest.raises(InvalidRequest):
        ChatTemplate("{{ messages.append(1) }}", {}).render(list(MESSAGES))


def test_broken_template_is_a_configuration_error():
    with pytest.raises(ConfigurationError, match="does not compile"):
        ChatTemplate("{% for %}", {})


def test_default_of_several_templates_is_taken(tmp_path):
    config = {
        "bos_token": {"content": "<s>"},
        "chat_template": [{"name": "tool", "template": "no"}, {"name": "default", "template": "{{ bos_token }}yes"}],
    }
    (tmp_path / "tokenizer_config.json").write_text(json.dumps(config))
    assert ChatTemplate.from_pretrained(tmp_path).render([]) == "<s>yes"


def test_checkpoint_without_a_template_has_none(tmp_path):
    assert ChatTemplate.from_pretrained(tmp_path) is None


def test_mentions_what_it_reads_and_nothing_that_is_only_spelled_in_it():
    source = (
        "{% if not terse is defined %}{% set terse = true %}{% endif %}"
        "{% for message in messages %}{{ message.role if terse }} a word{% endfor %}{{ thinking }}"
    )
    template = ChatTemplate(source, {})
    assert all(map(template.mentions, ("messages", "terse", "thinking")))
    assert not any(map(template.mentions, ("message", "a", "word", "think", "role")))
