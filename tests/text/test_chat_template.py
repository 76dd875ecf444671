"""Chat templates, against transformers' rendering of the same."""

from datetime import datetime
from pathlib import Path
from typing import Any

import pytest
from transformers import PreTrainedTokenizerFast
from transformers.utils.chat_template_utils import render_jinja_template

from headrace.store import open_model
from headrace.text import ChatTemplate, TemplateError, TextError, special_tokens_of

USER = {"role": "user", "content": 'What\'s the weather in <Paris> & "Lyon"? 😀'}
SYSTEM = {"role": "system", "content": "  Be brief.\n"}
ANSWER = {"role": "assistant", "content": "Sunny."}
CALL = {
    "role": "assistant",
    "content": None,
    "tool_calls": [
        {
            "id": "c1",
            "type": "function",
            "function": {"name": "weather", "arguments": {"city": "Zürich", "days": [1, 2]}},
        }
    ],
}
RESULT = {"role": "tool", "tool_call_id": "c1", "content": '{"sky": "clear"}'}
TOOLS = [
    {
        "type": "function",
        "function": {
            "name": "weather",
            "description": "The <weather>",
            "parameters": {
                "type": "object",
                "properties": {"city": {"type": "string"}},
                "required": ["city"],
            },
        },
    }
]
CONVERSATIONS: dict[str, list[dict[str, Any]]] = {
    "one turn": [USER],
    "system": [SYSTEM, USER],
    "many turns": [SYSTEM, *[USER, ANSWER] * 5, USER],
    "ends with the assistant": [USER, ANSWER],
    "tools": [SYSTEM, USER, CALL, RESULT, ANSWER, USER],
    "empty content": [{"role": "user", "content": ""}],
    "nothing": [],
}

TURNS = """{{ bos_token }}
{%- if messages and messages[0]['role'] == 'system' -%}
    {%- set preamble = messages[0]['content'] | trim + '\\n\\n' -%}
    {%- set turns = messages[1:] -%}
{%- else -%}
    {%- set preamble = '' -%}
    {%- set turns = messages -%}
{%- endif -%}
{%- for message in turns -%}
    {%- set role = 'model' if message['role'] == 'assistant' else message['role'] -%}
    {{ '<start_of_turn>' ~ role ~ '\\n' ~ (preamble if loop.first else '') }}
    {%- if message['content'] is string -%}{{ message['content'] | trim }}
    {%- elif message['content'] is iterable -%}parts{%- endif -%}
    {{ '<end_of_turn>\\n' }}
{%- endfor -%}
{%- if add_generation_prompt -%}{{ '<start_of_turn>model\\n' }}{%- endif -%}"""

TOOL_USE = """{% macro signature(tool) -%}
  {{ tool.function.name }}({{ tool.function.parameters.properties.keys() | join(', ') }})
{%- endmacro %}
{%- set ns = namespace(calls=0, last=none) %}
{%- if tools %}
Tools: {% for tool in tools %}{{ signature(tool) }}
{{ tool | tojson }}
{{ tool | tojson(indent=2) }}
{% endfor %}{% endif %}
{%- for message in messages %}
    {%- if message.role == 'tool' %}{% continue %}{% endif %}
    {%- if message.tool_calls is defined and message.tool_calls %}
        {%- for call in message.tool_calls %}
            {%- set ns.calls = ns.calls + 1 %}
[{{ ns.calls }}] {{ call.function.name }} {{ call.function.arguments | tojson }}
        {%- endfor %}
    {%- endif %}
    {%- if not loop.last and loop.nextitem.role == message.role %}!{% endif %}
{{ '%-10s|' % message.role }}{{ message.content or '' }}
{% generation %}{{ "{:>4}".format(loop.index) }}{% endgeneration %}
    {%- if loop.index > 8 %}{% break %}{% endif %}
{%- endfor %}
{{ messages | map(attribute='role') | unique | list }}
{{ messages | selectattr('role', 'equalto', 'user') | list | length }}
{{ 7 // 2 }} {{ 2 ** 5 }} {{ -3 % 5 }} {{ 1.5 * 2 }} {{ "ab" * 3 }} {{ [1, 2] + [3] }}
{{ (1, 'x') }} {{ {'k': [none, true]} }} {{ "<b>" }} {{ "<b>" | e }} {{ 'one two' | title }}
{{ messages | length if messages else 'none' }} {{ undefined_variable }}
{{ extra | default('no extra') }}
{{ 'a,b,,c'.split(',') | reject('equalto', '') | join('+') }}
{{ 'x'.join(['1', '2']) }} {{ 'aXbX'.replace('X', '--') }}
{{ [3, 1, 2] | sort | first }} {{ [1, 2, 3] | sum }} {{ range(4) | list }}
"""

BLOCKS = """start
  {% for m in messages %}
    {{ m.role }}:
      {% if m.content %}
      {{- m.content }}
      {% endif %}
  {# a comment #}
  {% endfor %}
end
"""

TEMPLATES = {
    "blocks": BLOCKS,
    "turns": TURNS,
    "tool use": TOOL_USE,
    "text only": "no messages at all\n",
    "empty": "",
}
SPECIAL = {"bos_token": "<bos>", "eos_token": "<eos>"}


@pytest.mark.parametrize("template", TEMPLATES)
@pytest.mark.parametrize("conversation", CONVERSATIONS)
@pytest.mark.parametrize("prompted", [True, False])
def test_templates_render_as_in_transformers(template: str, conversation: str, prompted: bool) -> None:
    messages = CONVERSATIONS[conversation]
    tools = TOOLS if conversation == "tools" else None
    ours = ChatTemplate(TEMPLATES[template], SPECIAL).render(messages, prompted, tools, extra="given")
    (theirs,), _ = render_jinja_template(
        [messages],
        tools=tools,
        chat_template=TEMPLATES[template],
        add_generation_prompt=prompted,
        extra="given",
        **SPECIAL,
    )
    assert ours == theirs


@pytest.mark.parametrize("conversation", [name for name in CONVERSATIONS if name not in ("tools", "nothing")])
@pytest.mark.parametrize("prompted", [True, False])
def test_smollm2_s_own_template_renders_as_in_transformers(
    conversation: str, prompted: bool, smollm2_dir: Path
) -> None:
    theirs = PreTrainedTokenizerFast.from_pretrained(smollm2_dir).apply_chat_template(
        CONVERSATIONS[conversation], add_generation_prompt=prompted, tokenize=False
    )
    template = ChatTemplate.from_model(open_model(smollm2_dir))
    assert template is not None
    assert template.render(CONVERSATIONS[conversation], prompted) == theirs


def test_a_model_without_a_template_has_none(gemma3_dir: Path) -> None:
    assert ChatTemplate.from_model(open_model(gemma3_dir)) is None


def test_text_parts_are_joined_and_others_refused() -> None:
    template = ChatTemplate("{% for m in messages %}[{{ m.content }}]{% endfor %}")
    parts = [{"type": "text", "text": "one"}, {"type": "text", "text": "two"}]
    assert template.render([{"role": "user", "content": parts}]) == "[one\ntwo]"
    image = [*parts, {"type": "image_url", "image_url": {"url": "x"}}]
    with pytest.raises(TextError, match="'image_url'") as caught:
        template.render([USER, {"role": "user", "content": image}])
    assert caught.value.field == "messages[1].content[2].type"
    with pytest.raises(TextError, match="has no text"):
        template.render([{"role": "user", "content": [{"type": "text"}]}])
    with pytest.raises(TextError, match="is int, not text"):
        template.render([{"role": "user", "content": 5}])


def test_messages_are_not_changed() -> None:
    message = {"role": "user", "content": [{"type": "text", "text": "one"}]}
    ChatTemplate("{{ messages }}").render([message])
    assert message == {"role": "user", "content": [{"type": "text", "text": "one"}]}


def test_a_template_refuses_in_its_own_words() -> None:
    template = ChatTemplate("{{ raise_exception('Roles must alternate: user, assistant') }}")
    with pytest.raises(TemplateError) as caught:
        template.render([USER])
    assert str(caught.value) == "Roles must alternate: user, assistant" and caught.value.field == "messages"


def test_the_date_is_the_given_clocks() -> None:
    template = ChatTemplate("{{ strftime_now('%d %B %Y') }}", now=lambda: datetime(2026, 2, 3))
    assert template.render([USER]) == "03 February 2026"


@pytest.mark.parametrize(
    ("source", "message"),
    [
        ("{% if %}", "not valid: line 1"),
        ("ok\n{{ unclosed", "not valid: line 2"),
        ("{{ x | nonesuch }}", "No filter named 'nonesuch'"),
        ("{{" + "(" * 5000 + "1" + ")" * 5000 + "}}", "nested too deeply"),
        ("a" * 1_000_001, "1000001 characters"),
    ],
)
def test_templates_that_are_no_templates_are_refused(source: str, message: str) -> None:
    with pytest.raises(TemplateError, match=message):
        ChatTemplate(source)


@pytest.mark.parametrize(
    ("source", "message"),
    [
        ("{{ messages[0].content.name.first }}", "UndefinedError"),
        ("{{ 1 / 0 }}", "ZeroDivisionError"),
        ("{{ messages[0].content + 1 }}", "TypeError"),
        ("{% include 'x' %}", "TypeError|TemplateNotFound"),
    ],
)
def test_failures_while_rendering_are_said(source: str, message: str) -> None:
    with pytest.raises(TemplateError, match=message):
        ChatTemplate(source).render([USER])


def test_special_tokens_are_found_in_either_spelling() -> None:
    config = {
        "bos_token": "<s>",
        "eos_token": {"content": "</s>", "lstrip": False},
        "pad_token": None,
        "x": "y",
    }
    assert special_tokens_of(config) == {"bos_token": "<s>", "eos_token": "</s>"}
