"""What of a conversation a template writes and what has loss: turns not learned, tools, thoughts, many turns."""

import json
import time

import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st
from tokenizers import AddedToken

from prism_assets.corpus import template as templates
from prism_assets.corpus.encoder import Encoder
from prism_assets.corpus.records import Message
from prism_assets.corpus.template import Untokenizable
from tests.corpus.test_encoder import CHATML, LLAMA2, LLAMA3, QWEN3, character_tokenizer, supervised_texts, text

# As Gemma 2: no system turn.
GEMMA = (
    "{{ bos_token }}{% for m in messages %}{% if m.role == 'system' %}{{ raise_exception('no system') }}{% endif %}"
    "{{ '<|start|>' + ('model' if m.role == 'assistant' else m.role) + '\n' + m.content | trim + '<|end|>\n' }}"
    "{% endfor %}{% if add_generation_prompt %}{{ '<|start|>model\n' }}{% endif %}"
)
# As Mistral's: the system text stands before the last user turn.
SYSTEM_LAST = (
    "{{ bos_token }}{% set system = messages[0].content if messages[0].role == 'system' else '' %}"
    "{% for m in messages if m.role != 'system' %}{% if m.role == 'user' %}{{ '[INST] ' }}"
    "{% if loop.last or (loop.revindex == 2 and not add_generation_prompt) %}{{ system }}{% endif %}"
    "{{ m.content + ' [/INST]' }}{% else %}{{ ' ' + m.content + eos_token }}{% endif %}{% endfor %}"
)
NO_SYSTEM = CHATML.replace("{% for m in messages %}", "{% for m in messages if m.role != 'system' %}")
# As Qwen2.5: tools in the system turn, calls as JSON in words, results in the user's turn.
TOOLS = (
    "{% if tools %}{{ '<|im_start|>system\n' }}{% for t in tools %}{{ t | tojson + '\n' }}{% endfor %}"
    "{{ '<|im_end|>\n' }}{% endif %}{% for m in messages %}{{ '<|im_start|>' + m.role + '\n' }}"
    "{% if m.reasoning_content is defined %}{{ '<think>' + m.reasoning_content + '</think>' }}{% endif %}"
    "{{ m.content }}{% for c in m.tool_calls or [] %}{{ '\n[call]' + c.function | tojson + '[end]' }}{% endfor %}"
    "{{ '<|im_end|>\n' }}{% endfor %}{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)
USER, ANSWER = Message("user", "2+2?"), Message("assistant", "4")
SYSTEM = Message("system", "Be brief.")
TOOL = {"type": "function", "function": {"name": "add", "parameters": {}}}
CALL = Message(
    "assistant",
    "",
    extra=json.dumps({"tool_calls": [{"type": "function", "function": {"name": "add", "arguments": {"a": "two"}}}]}),
)
RESULT = Message("tool", "4", extra='{"name": "add"}')


def encoder(template, length=2000):
    return Encoder(character_tokenizer(chat_template=template), max_length=length)


def encoded(template, *messages, length=2000):
    one = encoder(template, length)
    example = one.encode(messages)
    return text(one.tokenizer, example.input_ids), supervised_texts(one.tokenizer, example)


@pytest.mark.parametrize("template", [None, CHATML, LLAMA3, GEMMA])
def test_a_turn_that_is_not_learned_is_written_and_has_no_loss(template):
    first = Message("assistant", "wrong", learn=False)
    whole, learned = encoded(template, USER, first, Message("user", "sure?"), ANSWER)
    same, _ = encoded(template, USER, first._replace(learn=True), Message("user", "sure?"), ANSWER)
    assert whole == same and "wrong" in whole
    assert len(learned) == 1 and learned[0].startswith("4")


@pytest.mark.parametrize("template", [GEMMA, NO_SYSTEM])
def test_a_system_text_leads_the_first_user_turn_where_the_template_knows_no_system(template):
    whole, _ = encoded(template, SYSTEM, USER, ANSWER)
    assert "Be brief.\n\n2+2?" in whole
    assert "system" not in encoder(template).roles
    assert encoder(CHATML).roles == ("system", "user", "assistant", "tool")
    assert "system" in encoder(None).roles


def test_a_system_turn_is_written_where_the_template_has_its_place():
    whole, _ = encoded(SYSTEM_LAST, SYSTEM, USER, ANSWER)
    assert "[INST] Be brief.2+2? [/INST]" in whole
    with pytest.raises(Untokenizable):  # the first answer would follow another prompt than in its own turn
        encoder(SYSTEM_LAST).encode((SYSTEM, USER, ANSWER, USER, ANSWER))


def test_a_turn_that_the_template_leaves_out_costs_the_row():
    conversation = (Message("user", "first words"), Message("user", "2+2?"), ANSWER)
    forgetful = CHATML.replace("m.content +", "(m.content if loop.index0 > 0 else '') +")
    with pytest.raises(Untokenizable, match="leaves out the text of a user turn") as caught:
        encoder(forgetful).encode(conversation)
    assert caught.value.field == "messages[0].content"


def test_tools_calls_and_results_go_through_the_template():
    tools = Message("tools", json.dumps([TOOL]))
    whole, learned = encoded(TOOLS, tools, USER, CALL, RESULT, ANSWER)
    assert '"name": "add"' in whole.split("2+2?")[0]
    assert len(learned) == 2 and '"two"' in learned[0] and learned[0].endswith("<|im_end|>")
    assert learned[1] == "4<|im_end|>"
    assert "4" not in learned[0]


def test_what_a_template_or_the_plain_format_has_no_place_for_is_refused():
    tools = Message("tools", json.dumps([TOOL]))
    for template in (CHATML, None):
        for conversation in ((tools, USER, ANSWER), (USER, CALL, RESULT, ANSWER)):
            with pytest.raises(Untokenizable, match="leaves out|no place|refuses"):
                encoder(template).encode(conversation)
    thinking = ANSWER._replace(extra='{"reasoning_content": "two and two"}')
    with pytest.raises(Untokenizable, match="reasoning"):
        encoder(CHATML).encode((USER, thinking))
    assert encoded(TOOLS, USER, thinking)[1] == ["<think>two and two</think>4<|im_end|>"]


def test_an_empty_thinking_block_that_the_template_writes_itself_costs_nothing():
    plain, _ = encoded(QWEN3, USER, ANSWER)
    written, learned = encoded(QWEN3, USER, Message("assistant", "<think>\n\n</think>\n\n4"))
    assert written == plain and learned == ["4<|im_end|>"]


def test_a_greeting_that_a_template_refuses_goes_and_stays_elsewhere():
    greeting = Message("assistant", "Hello!", learn=False)
    strict = LLAMA2.replace(
        "{% for", "{% if messages[0].role != 'user' %}{{ raise_exception('user first') }}{% endif %}{% for"
    )
    assert encoded(strict, greeting, USER, ANSWER) == encoded(strict, USER, ANSWER)
    whole, learned = encoded(CHATML, greeting, USER, ANSWER)
    assert "Hello!" in whole and learned == ["4<|im_end|>"]


def test_a_tag_that_the_tokenizer_calls_special_may_stand_in_a_text():
    tokenizer = character_tokenizer(chat_template=CHATML)
    tokenizer.add_special_tokens({"additional_special_tokens": []})

    tokenizer.add_tokens(
        [AddedToken("<filename>", special=True), AddedToken("<|call|>", special=True)], special_tokens=True
    )
    one = Encoder(tokenizer, max_length=200)
    assert one.encode((Message("user", "open <filename> x"), ANSWER)).loss_mask.sum() == 2
    with pytest.raises(Untokenizable, match="call"):
        one.encode((Message("user", "<|call|>"), ANSWER))


@pytest.mark.parametrize("template", [CHATML, LLAMA3, GEMMA, QWEN3, TOOLS])
def test_headers_and_the_system_turn_stay_where_the_prompt_is_cut(template):
    long = Message("user", "x" * 300 + "end")
    whole, _ = encoded(template, SYSTEM, long, ANSWER)
    length = len(encoder(template).encode((SYSTEM, long, ANSWER)).input_ids)
    for gone in (1, 50, 301):
        cut, learned = encoded(template, SYSTEM, long, ANSWER, length=length - gone)
        assert cut == whole.replace(long.content, long.content[gone:])
        assert learned == encoded(template, SYSTEM, long, ANSWER)[1]
    with pytest.raises(Untokenizable, match="raise max_length"):
        encoder(template, length - 303).encode((SYSTEM, long, ANSWER))


WORDS = st.text("ab \n<>?", min_size=1, max_size=8).filter(str.strip)


@settings(max_examples=40, deadline=None)
@example([("<", "<")] * 3 + [("< ", "<"), ("<", "<")], CHATML, False)
@given(
    st.lists(st.tuples(WORDS, WORDS), min_size=5, max_size=9),
    st.sampled_from([CHATML, LLAMA3, GEMMA, QWEN3, TOOLS]),
    st.booleans(),
)
def test_long_conversations_get_the_segments_that_rendering_every_prompt_gives(turns, template, system):
    messages = [Message(role, words) for turn in turns for role, words in zip(("user", "assistant"), turn, strict=True)]
    messages = (SYSTEM, *messages) if system else tuple(messages)
    one = encoder(template)
    before = templates._MANY_TURNS
    try:
        quick = one._template.segments(messages)
        templates._MANY_TURNS = 10**9
        assert quick == one._template.segments(messages)
    finally:
        templates._MANY_TURNS = before


def test_the_cost_of_a_long_conversation_grows_with_its_length(monkeypatch):
    """160 exchanges over the limit took 25,550 renderings."""
    rendered = []
    render = templates.ChatTemplate._render
    monkeypatch.setattr(
        templates.ChatTemplate,
        "_render",
        lambda self, messages, *a, **k: rendered.append(len(messages)) or render(self, messages, *a, **k),
    )
    one, counts = encoder(CHATML, 1024), []
    for exchanges in (160, 320):
        rendered.clear()
        messages = [
            m for n in range(exchanges) for m in (Message("user", f"{n} and {n}?"), Message("assistant", f"{2 * n}"))
        ]
        started = time.process_time()
        example = one.encode(messages)
        assert example.truncated and time.process_time() - started < 5
        counts.append(sum(rendered))
    assert counts[1] < 3 * counts[0] and counts[0] < 160 * 2 * 60
