"""A template from a stranger can't take the memory or the time, however it tries."""

from __future__ import annotations

import time
import tracemalloc
from typing import Any

import pytest
from jinja2.exceptions import SecurityError, TemplateError, UndefinedError

from chats.template_helpers import byte_level
from phinetune.chats import template_budget
from phinetune.chats.template import render
from phinetune.chats.template_rendering import apply_template

CHAT = [{"role": "user", "content": "Hi 12"}, {"role": "assistant", "content": "Yes."}]


def tokenizer(template: str) -> Any:
    return byte_level(template, ["<|end|>"], left=False)


def twice(name: str, step: str, times: int = 60) -> str:
    """A template that makes `name` of itself, again and again, without a loop."""
    return "{% set x = 'abcdefgh' %}" + f"{{% set {name} = {step} %}}" * times + "{{ x|length }}"


GROWS = {
    "multiplied": "{{ 'x' * 10**10 }}",
    "multiplied from the left": "{{ 10**10 * 'x' }}",
    "a list multiplied": "{{ ([1] * 10**10)|length }}",
    "centred by a filter": "{{ 'x'|center(10**10) }}",
    "centred by a constant": "{{ 'x'|center(10000000000) }}",
    "centred by a method": "{{ 'x'.center(10**10) }}",
    "justified": "{{ 'x'.ljust(10**10) }}",
    "justified right": "{{ 'x'.rjust(9999999999) }}",
    "filled with zeros": "{{ '1'.zfill(10**10) }}",
    "tabs": "{{ '\\t'.expandtabs(10**10) }}",
    "a format's width": "{{ '{:10000000000}'.format('x') }}",
    "a format's precision": "{{ '{:.1000000000f}'.format(1.5) }}",
    "a width that is given": "{{ '{:{}}'.format('x', '9999999999') }}",
    "a width in per cent": "{{ '%10000000000d' % 1 }}",
    "a width in a filter": "{{ '%10000000000d'|format(1) }}",
    "a width that is a star": "{{ '%*d' % (10**10, 1) }}",
    "an argument many times": "{% set x = 'x' * 100000 %}{{ ('{0}' * 10000).format(x) }}",
    "a key many times": "{% set x = 'x' * 100000 %}{{ ('%(a)s' * 10000) % {'a': x} }}",
    "format_map": "{% set x = 'x' * 100000 %}{{ ('{a}' * 10000).format_map({'a': x}) }}",
    "replaced": "{{ ('x' * 100000)|replace('x', 'y' * 100000) }}",
    "replaced by a method": "{{ ('x' * 100000).replace('', 'y' * 100000) }}",
    "translated": "{{ ('x' * 100000).translate({120: 'y' * 100000}) }}",
    "joined": "{{ range(99999)|join('x' * 100000) }}",
    "joined by a method": "{{ ('x' * 100000).join('y' * 100000) }}",
    "joined while it is made": "{{ range(99999)|map('string')|join('x' * 100000) }}",
    "indented": "{{ ('\\n' * 100000)|indent(100000, blank=true) }}",
    "indented by text": "{{ ('\\n' * 100000)|indent('x' * 100000, blank=true) }}",
    "JSON's indent": "{{ messages|tojson(indent=10**10) }}",
    "a batch": "{{ messages|batch(10**9, 'x')|list|length }}",
    "slices": "{{ messages|slice(10**9)|list|length }}",
    "URLs": "{{ ('é' * 4000000)|urlencode }}",
    "added to itself": twice("x", "x + x"),
    "added on both sides": twice("x", "(x + x) + (x + x)"),
    "joined to itself": twice("x", "x ~ x"),
    "a block of itself": "{% set x = 'abcdefgh' %}" + "{% set x %}{{ x }}{{ x }}{% endset %}" * 60 + "{{ x|length }}",
    "a sum in a block": "{% set x = 'abcdefgh' %}" + "{% set x %}{{ x + x }}{% endset %}" * 60 + "{{ x|length }}",
    "lists of itself": twice("x", "[x, x]"),
    "tuples of itself": twice("x", "(x, x)"),
    "dictionaries of itself": twice("x", "{'a': x, 'b': x}"),
    "a list of itself written": twice("x", "[x, x]", 15) + "{{ x }}" * 99,
    "lists added": "{% set x = [1] %}" + "{% set x = x + x %}" * 60,
    "slices kept": "{% set ns = namespace(x=[]) %}{% set x = 'x' * 1000000 %}{% for i in range(9999) %}"
    "{% set ns.x = ns.x + [x[1:]] %}{% endfor %}",
    "a macro of itself": "{% macro m(x) %}{{ x }}{{ x }}{% endmacro %}{% set x = 'abcdefgh' %}"
    + "{% set x = m(x) %}" * 60,
    "a namespace": "{% set ns = namespace(x='abcdefgh') %}{% for i in range(99) %}{% set ns.x = ns.x + ns.x %}"
    "{% endfor %}",
    "a power": "{{ (10 ** (10 ** 8)) % 7 }}",
    "powers multiplied": "{% set x = 10 ** 1000 %}" + "{% set x = x * x %}" * 40 + "{{ x % 7 }}",
    "rounded": "{{ 1.5|round(10**9, 'ceil') }}",
    "lists summed": "{{ (range(99999)|batch(1)|list)|sum(start=[])|length }}",
    "bytes": "{{ (1).to_bytes(10**10, 'big') }}",
    "a date": "{{ strftime_now('%Y' * 1000000) }}",
    "written in a loop": "{% set x = 'x' * 1000000 %}{% for i in range(9999) %}{{ x }}{% endfor %}",
    "written as it stands": "{% for i in range(99999) %}" + "x" * 100_000 + "{% endfor %}",
    "a list written": "{% set x = range(9999)|list %}{% for i in range(99999) %}{{ x }}{% endfor %}",
    "written in a macro": "{% macro m() %}{% for i in range(99999) %}"
    + "x" * 10_000
    + "{% endfor %}{% endmacro %}{{ m() }}",
    "escaped": "{% autoescape true %}{% for i in range(9999) %}{{ '<' * 1000000 }}{% endfor %}{% endautoescape %}",
}
NEVER_ENDS = {
    "nested loops": "{% for a in range(99999) %}{% for b in range(99999) %}{% for c in range(99999) %}"
    "{% endfor %}{% endfor %}{% endfor %}",
    "loops that choose nothing": "{% for a in range(99999) %}{% for b in range(99999) if false %}{% endfor %}"
    "{% endfor %}",
    "loops over filters": "{% for a in range(99999) %}{{ range(99999)|sum }}{% endfor %}",
    "filters that map": "{% for a in range(99999) %}{% set x = range(99999)|map('string')|list %}{% endfor %}",
    "chosen by a test": "{% for a in range(99999) %}{% set x = range(99999)|select('gt', 5)|list %}{% endfor %}",
    "a long attribute": "{{ range(99999)|map(attribute='real.' * 100000 + 'real')|list|length }}",
    "macros that call": "{% macro m(n) %}{% if n %}{{ m(n - 1) }}{{ m(n - 1) }}{% endif %}{% endmacro %}{{ m(60) }}",
    "loops that go deeper": "{% for a in [[1, 2]] recursive %}{{ loop([[1, 2], [3, 4]]) }}{% endfor %}",
    "a macro for ever": "{% macro m() %}{{ m() }}{% endmacro %}{{ m() }}",
    "a block for ever": "{% block b %}{{ self.b() }}{% endblock %}",
    "long comparisons": "{% set x = 'x' * 4000000 %}{% set y = 'x' * 4000000 %}"
    "{% for a in range(99999) %}{% if x == y %}{% endif %}{% endfor %}",
    "long searches": "{% set x = 'x' * 1000000 %}{% for a in range(99999) %}{% if a|string in x %}{% endif %}"
    "{% endfor %}",
    "nested too deeply": "{{ " + "(" * 5000 + "1" + ")" * 5000 + " }}",
    "a long sum": "{{ 1" + " + 1" * 20_000 + " }}",
    "a source that is too long": "x" * 200_001,
}


@pytest.fixture
def small_budget(monkeypatch: pytest.MonkeyPatch) -> None:
    """A budget that is soon used up: the limits are the same, and the tests are fast."""
    monkeypatch.setattr(template_budget, "BASE", 200_000)
    monkeypatch.setattr(template_budget, "PER_LETTER", 0)
    monkeypatch.setattr(template_budget, "LOOK", 10_000)
    monkeypatch.setattr(template_budget, "SECONDS", 0.5)


@pytest.mark.usefixtures("small_budget")
@pytest.mark.parametrize("template", [pytest.param(text, id=name) for name, text in {**GROWS, **NEVER_ENDS}.items()])
def test_a_template_ends_in_a_sentence_before_it_takes_memory_or_time(template: str) -> None:
    began = time.thread_time()
    with pytest.raises(TemplateError):
        render(tokenizer(template), CHAT)
    assert time.thread_time() - began < 5
    tracemalloc.start()  # after the clock: counting memory takes several times as long
    try:
        with pytest.raises(TemplateError):
            render(tokenizer(template), CHAT)
        assert tracemalloc.get_traced_memory()[1] < 60e6
    finally:
        tracemalloc.stop()


def test_with_the_usual_limits_three_nested_loops_end_in_time() -> None:
    began = time.thread_time()
    with pytest.raises(SecurityError, match="far more than this chat needs"):
        render(tokenizer(NEVER_ENDS["nested loops"]), CHAT)
    assert time.thread_time() - began < 5


BENIGN = {
    "a Llama's": "{{ bos_token }}{% for m in messages %}"
    "{% set c = '<h>' + m['role'] + '</h>\n\n' + m['content'] | trim + "
    "'<|end|>' %}{% if loop.first %}{% set c = '!' + c %}{% endif %}{{ c }}{% endfor %}",
    "a Qwen's": "{% set ns = namespace(last=messages|length - 1, open=true) %}{% for m in messages[::-1] %}"
    "{% set i = (messages|length - 1) - loop.index0 %}{% if ns.open and m.role == 'user' %}{% set ns.open = false %}"
    "{% set ns.last = i %}{% endif %}{% endfor %}{{ ns.last }}{% for m in messages %}{% if '</think>' in m.content %}"
    "{{ m.content.split('</think>')[-1].lstrip('\n') }}{% elif not m.content.startswith('No') %}{{ m.content }}"
    "{% endif %}{% endfor %}",
    "built up": "{% set ns = namespace(text='') %}{% for m in messages %}"
    "{% set ns.text = ns.text + m.content + '|' %}"
    "{% endfor %}{{ ns.text }}",
    "answers marked": "{% for m in messages %}{% generation %}{% set x = 1 %}{{ m.content }}{% endgeneration %}"
    "{{ x is defined }}{% endfor %}",
    "loops that break off": "{% for m in messages %}{% if loop.index > 1 %}{% break %}{% endif %}{{ m }}"
    "{% continue %}no"
    "{% endfor %}",
    "a loop with a condition": "{% for m in messages if m.role != 'user' %}{{ loop.index }}/{{ loop.length }}"
    "{{ m.content }}"
    "{% else %}none{% endfor %}",
    "a loop that goes deeper": "{% for a in [[1, [2, 3]], 4] recursive %}{{ loop(a) if a is iterable else a }}"
    ";{% endfor %}",
    "macros": "{% macro f(t, d=2) %}[{{ t }}{{ caller() if caller else d }}]{% endmacro %}{{ f('a') }}"
    "{% call f('b') %}c{% endcall %}",
    "a block": "{% set t %}{% for m in messages %}{{ m.role }},{% endfor %}{% endset %}{{ t|upper }}{{ t|length }}",
    "JSON": "{{ messages|tojson(indent=2) }}{{ tools|tojson if tools }}{{ {'a': [1, 2.5, none, true]}|tojson }}",
    "filters": "{{ messages|map(attribute='role')|join(', ') }}"
    "{{ messages|selectattr('role', 'equalto', 'user')|list }}"
    "{{ [3, 1, 2]|sort|first }}{{ [1, 2]|sum }}{{ 'a\nb'|indent(2) }}{{ '%s-%d'|format('x', 3) }}{{ ' a '|trim }}"
    "{{ messages|rejectattr('role', 'equalto', 'user')|map(attribute='content')|first }}{{ 'aXb'.replace('X', '-') }}"
    "{{ x|default('none', true) }}{{ {'b': 1, 'a': 2}|dictsort }}{{ {'b': 1}|items|list }}{{ '3'|int + 1 }}",
    "operators": "{{ 3 % 2 }}{{ 2 ** 3 }}{{ '-' * 5 }}{{ [1] + [2] }}{{ 7 // 2 }}{{ -3 }}{{ 'a' ~ 1 ~ none }}"
    "{{ (1, 2) }}"
    "{{ 'a' in ['a'] }}{{ messages[0].role in messages[0] }}{{ '%s' % 'x' }}{{ 1 < 2 < 3 }}{{ [0, 1, 2, 3][1:3] }}",
    "escaped": "{% autoescape true %}{{ '<' + '&'|safe }}{{ '<' ~ 'x' }}{{ '<b>' }}{% endautoescape %}{{ '<' }}",
    "methods": "{{ 'a,b'.split(',') }}{{ '{}-{:>4}'.format('x', 3) }}{{ 'Ab'.title() }}{{ messages[0].items()|list }}"
    "{{ messages[0].get('role') }}{{ 'x'.center(5) }}{{ 'ab'.join(['1', '2']) }}",
    "dictionaries": "{{ dict(a=1) }}{{ dict.fromkeys(['k'], 2) }}{{ {'x': messages[0].content} }}"
    "{{ dict([('a', 1)])['a'] }}",
    "reasoning": "{% for m in messages %}{{ m.reasoning_content }}{{ m.thinking }}{% endfor %}",
    "nothing": "{{ nothing }}{{ none }}{{ messages[9] }}{{ 1.0 }}{{ 10 ** 30 }}",
    "two terms of its own": "{% for m in messages %}{{ m.role + m.content + m.role + m.content + m.role + 'x' }}"
    "{% endfor %}",
}
CHATS = [
    CHAT,
    [{"role": "user", "content": "<think>a</think>\n\nb", "name": None}],
    [*CHAT, {"role": "user", "content": "100000000000000%"}, {"role": "assistant", "content": "x", "thinking": "why"}],
]
TOOLS = [{"type": "function", "function": {"name": "f", "parameters": {"type": "object"}}}]


@pytest.mark.parametrize("template", [pytest.param(text, id=name) for name, text in BENIGN.items()])
def test_a_usual_template_renders_as_in_transformers(template: str) -> None:
    one = tokenizer(template)
    for chats, tools, reply in ((CHATS, None, False), (CHATS, TOOLS, True), (CHATS[:1], [], False)):
        wanted = one.apply_chat_template(chats, tools=tools, tokenize=False, add_generation_prompt=reply)
        assert apply_template(one, chats, tools=tools, reply=reply) == wanted


def test_a_long_chat_is_within_the_limits_of_a_template_that_builds_its_text_up() -> None:
    chat = [{"role": "user", "content": "x" * 800}] * 500
    assert len(render(tokenizer(BENIGN["built up"]), chat)) == 500 * 801


@pytest.mark.parametrize(
    ("template", "error"),
    [
        ("{{ raise_exception('no system turn') }}", TemplateError),
        ("{{ ''.__class__.__mro__ }}", SecurityError),
        ("{% set ns = namespace() %}{% set ns._x = 1 %}", SecurityError),
        ("{{ namespace(_x=1) }}", SecurityError),
        ("{{ messages.append(1) }}", SecurityError),
        ("{{ lipsum() }}", UndefinedError),
        ("{{ 'x'|urlize }}", TemplateError),
        ("{{ 1 // 0 }}", TemplateError),
        ("{{ 2.0 ** 5000 }}", TemplateError),
        ("{{ '{x}'.format() }}", TemplateError),
        ("{{ '{}'.format() }}", TemplateError),
        ("{{ 1|dictsort }}", TemplateError),
        ("{{ [2] + 1 }}", TemplateError),
        ("{{ 'a'.index('b') }}", TemplateError),
        ("{% for %}", TemplateError),
    ],
)
def test_what_a_template_may_not_do(template: str, error: type[Exception]) -> None:
    with pytest.raises(error):
        render(tokenizer(template), CHAT)


def test_an_object_of_python_reaches_no_template() -> None:
    class Odd(str):
        def danger(self) -> str:
            return "reached"

    template = tokenizer("{{ messages[0].content.danger is defined }}{{ messages[0].x }}{{ messages[0].y }}")
    assert apply_template(template, [[{"role": "user", "content": Odd("a"), "x": object(), "y": (1, Odd("b"))}]]) == [
        "False<object>[1, 'b']"
    ]


def test_a_chat_without_a_message_is_refused() -> None:
    with pytest.raises(ValueError, match="no message"):
        apply_template(tokenizer("x"), [[]])
