"""What a hostile template can do: fail, soon, and with little memory."""

import resource
import time

import pytest

from headrace.text import ChatTemplate, TemplateError

USER = {"role": "user", "content": "hi"}

HOSTILE = {
    "loops in loops": "{% for i in range(100000) %}{% for j in range(100000) %}{% endfor %}{% endfor %}",
    "recursive loop": (
        "{% for x in [1,2] recursive %}{% if loop.depth < 60 %}{{ loop([1,2]) }}{% endif %}{% endfor %}"
    ),
    "recursive macro": (
        "{% macro f(n) %}{% if n %}{{ f(n-1) }}{{ f(n-1) }}{% endif %}{% endmacro %}{{ f(60) }}"
    ),
    "endless macro": "{% macro f() %}{{ f() }}{% endmacro %}{{ f() }}",
    "repeated string": "{{ 'a' * 10**10 }}",
    "string repeated by": "{{ 10**10 * 'a' }}",
    "repeated list": "{{ ([0] * 10**10) | length }}",
    "doubling by ~": (
        "{% set n = namespace(x='ab') %}{% for i in range(99) %}{% set n.x = n.x ~ n.x %}{% endfor %}"
    ),
    "doubling by +": (
        "{% set n = namespace(x='ab') %}{% for i in range(99) %}{% set n.x = n.x + n.x %}{% endfor %}"
    ),
    "doubling lists": (
        "{% set n = namespace(x=[1]) %}{% for i in range(99) %}{% set n.x = n.x + n.x %}{% endfor %}"
    ),
    "doubling by set": (
        "{% set n = namespace(x='ab') %}{% for i in range(99) %}"
        "{% set y %}{{ n.x }}{{ n.x }}{% endset %}{% set n.x = y %}{% endfor %}"
    ),
    "doubling by macro": (
        "{% macro f(x) %}{{ x }}{{ x }}{% endmacro %}"
        "{% set n = namespace(x='ab') %}{% for i in range(99) %}{% set n.x = f(n.x) %}{% endfor %}"
    ),
    "nested lists": (
        "{% set n = namespace(x=[1]) %}{% for i in range(99) %}{% set n.x = [n.x, n.x] %}{% endfor %}"
    ),
    "nested tuples": (
        "{% set n = namespace(x=1) %}{% for i in range(99) %}{% set n.x = (n.x, n.x) %}{% endfor %}"
    ),
    "nested dicts": (
        "{% set n = namespace(x=1) %}{% for i in range(99) %}{% set n.x = {'a': n.x, 'b': n.x} %}{% endfor %}"
    ),
    "nested by dict()": (
        "{% set n = namespace(x=1) %}{% for i in range(99) %}{% set n.x = dict(a=n.x, b=n.x) %}{% endfor %}"
    ),
    "power": "{{ 9 ** 9 ** 9 }}",
    "squaring": "{% set n = namespace(x=3) %}{% for i in range(99) %}{% set n.x = n.x * n.x %}{% endfor %}",
    "wide %": "{{ '%1000000000d' % 1 }}",
    "wide % from arguments": "{{ '%*d' % (1000000000, 1) }}",
    "wide format": "{{ '{:1000000000}'.format(1) }}",
    "wide format from arguments": "{{ '{:{}}'.format(1, 1000000000) }}",
    "wide format filter": "{{ '%1000000000d' | format(1) }}",
    "many fields": "{{ ('{0}' * 100000).format('a' * 100000) }}",
    "format_map": "{{ '{a:1000000000}'.format_map({'a': 1}) }}",
    "ljust": "{{ 'a'.ljust(1000000000) }}",
    "zfill": "{{ 'a'['zfill'](1000000000) }}",
    "expandtabs": "{{ '\\t'.expandtabs(1000000000) }}",
    "center": "{{ 'a'.center(1000000000) }}",
    "attr": "{{ ('a' | attr('ljust'))(1000000000) }}",
    "replace": "{{ ('a' * 100000).replace('a', 'b' * 100000) }}",
    "replace filter": "{{ ('a' * 100000) | replace('a', 'b' * 100000) }}",
    "join": "{{ ('a' * 100000).join(range(100000) | map('string')) }}",
    "join filter": "{{ range(100000) | join('a' * 100000) }}",
    "indent": "{{ ('\\n' * 1000000) | indent(9000) }}",
    "indent by text": "{{ ('\\n' * 1000000) | indent('a' * 9000) }}",
    "batch": "{{ [1] | batch(1000000000, 0) | list }}",
    "slice": "{{ [1] | slice(1000000000) | list }}",
    "json indent": "{{ [[1]] | tojson(indent=1000000000) }}",
    "json indent by text": "{{ range(100000) | list | tojson(indent='a' * 100000) }}",
    "to_bytes": "{{ (1).to_bytes(1000000000, 'big') }}",
    "search in lists": (
        "{% set x = range(100000) | list %}{% for i in range(100000) %}{{ -1 in x }}{% endfor %}"
    ),
    "search in text": "{% set x = 'a' * 5000000 %}{% for i in range(100000) %}{{ 'b' in x }}{% endfor %}",
    "find": "{% set x = 'a' * 5000000 %}{% for i in range(100000) %}{{ x.find('b') }}{% endfor %}",
    "slices": "{% set x = 'a' * 5000000 %}{% for i in range(100000) %}{% if x[1:] %}{% endif %}{% endfor %}",
    "comparing": (
        "{% set x = range(100000) | list %}{% set y = range(100000) | list %}"
        "{% for i in range(100000) %}{% if x == y %}{% endif %}{% endfor %}"
    ),
    "sorting": (
        "{% set x = range(100000) | list %}{% for i in range(100000) %}{% set y = x | sort %}{% endfor %}"
    ),
    "summing lists": "{{ ([[1]] * 100000) | sum(start=[]) }}",
    "long output": "{% for i in range(100000) %}" + "x" * 10_000 + "{% endfor %}",
    "long lines of code": "{{ " + " + ".join(["1"] * 20_000) + " }}",
    "lipsum": "{{ lipsum(n=100000) }}",
}


@pytest.mark.parametrize("case", HOSTILE)
def test_hostile_templates_fail_soon_and_small(case: str) -> None:
    before, begin = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss, time.process_time()
    with pytest.raises(TemplateError):
        ChatTemplate(HOSTILE[case]).render([USER])
    assert time.process_time() - begin < 6
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before < 300_000  # kilobytes


@pytest.mark.parametrize(
    "source",
    [
        "{{ ''.__class__ }}",
        "{{ ''['__class__'] }}",
        "{{ '' | attr('__class__') }}",
        "{{ ''.__class__.__mro__ }}",
        "{{ messages.append(1) }}",
        "{{ messages[0].update({'a': 1}) }}",
        "{{ '{0.__class__}'.format(1) }}",
        "{{ namespace(__class__=1) }}",
        "{{ cycler.__init__.__globals__ }}",
        "{{ raise_exception.__globals__ }}",
    ],
)
def test_python_s_internals_are_out_of_reach(source: str) -> None:
    """Jinja gives nothing for a forbidden attribute, and fails when something is done with it."""
    messages = [dict(USER)]
    try:
        assert ChatTemplate(source).render(messages) == ""
    except TemplateError as error:
        assert "unsafe" in str(error) or "cannot hold" in str(error)
    assert messages == [USER]


def test_a_long_conversation_is_no_attack() -> None:
    """A thousand turns, by a template that looks at the whole conversation in each of them."""
    template = ChatTemplate(
        "{% for m in messages %}{% if loop.index0 == messages | length - 1 and messages[-1] == m %}LAST"
        "{% endif %}{{ '<' + m['role'] + '>' + m['content'].strip() + '\\n' }}{% endfor %}"
    )
    messages = [{"role": ("user", "assistant")[i % 2], "content": "word " * 200} for i in range(1000)]
    begin = time.process_time()
    assert template.render(messages).count("<user>") == 500
    assert time.process_time() - begin < 3


def test_gathering_messages_one_by_one_is_no_attack() -> None:
    template = ChatTemplate(
        "{% set n = namespace(kept=[]) %}{% for m in messages %}{% if m.role != 'system' %}"
        "{% set n.kept = n.kept + [m] %}{% endif %}{% endfor %}{{ n.kept | length }}"
    )
    messages = [{"role": ("user", "assistant")[i % 2], "content": "word " * 20} for i in range(2000)]
    assert template.render(messages) == "2000"


def test_a_large_message_is_no_attack() -> None:
    template = ChatTemplate("{% for m in messages %}{{ m.content | trim }}{% endfor %}")
    assert len(template.render([{"role": "user", "content": "a" * 5_000_000}])) == 5_000_000


def test_the_budget_is_for_one_rendering() -> None:
    template = ChatTemplate("{% for i in range(90000) %}{{ i }}{% endfor %}")
    assert len({template.render([USER]) for _ in range(8)}) == 1
