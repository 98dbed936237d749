"""Ids and loss masks under the chat templates of known model families, against transformers' own.

Each template is written once, with marks around what the assistant says. Without the marks it is the template that
`Encoder` is given. With ``{% generation %}`` in their place, `apply_chat_template` gives ids and mask to compare with.

What has loss, and so where the marks stand:

- It begins where the prompt for generation ends. A space before the words belongs to them where that prompt ends before
  it. A thinking block that the template itself opens and closes is prompt, one that holds thoughts has loss.
- It ends with the special token that ends the turn. White space after that token has none.
- The row ends with the last token that has loss: what a template writes after it (a newline, another EOS) is left out.
- Where no special token ends a turn, the words are followed by EOS at the end of the row.
"""

import datetime
import json
import os
import re
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers, trainers
from transformers import AutoTokenizer, PreTrainedTokenizerFast
from transformers.utils import chat_template_utils

from prism_assets.corpus.encoder import Encoder
from prism_assets.corpus.records import Message
from prism_assets.corpus.template import Untokenizable

BEGIN, END = "⟦", "⟧"
MODELS = Path(os.environ.get("PRISM_TEST_MODELS", "/tmp/models"))  # folders with the tokenizers of models
SPACE = "\u2581"  # as SentencePiece writes it
ARGUMENTS = {"enable_thinking": False, "date_string": "26 Jul 2024"}


class Family(NamedTuple):
    """A template with its marks, the tokens of its models, and the rows that it cannot write.

    special: names of special tokens, or `AddedToken`s. refusals: by the name of a conversation, what the reason says.
    system, greeting: whether the template writes a system turn, and an assistant's before the user's.
    """

    source: str
    special: tuple[Any, ...]
    refusals: dict[str, str] = {}
    system: bool = True
    greeting: bool = True
    bos: str = "<s>"
    eos: str = "</s>"
    added: tuple[str, ...] = ()  # tokens of the vocabulary that are not special

    @property
    def plain(self):
        return self.source.replace(BEGIN, "").replace(END, "")

    @property
    def marked(self):
        return self.source.replace(BEGIN, "{% generation %}").replace(END, "{% endgeneration %}")


# --- The templates ---------------------------------------------------------------------------------------

ALTERNATE = (
    "{% if (m.role == 'user') != (loop.index0 % 2 == 0) %}"
    "{{ raise_exception('Conversation roles must alternate user/assistant/user/assistant/...') }}{% endif %}"
)
CHATML = (
    "{% for m in messages %}{{ '<|im_start|>' + m.role + '\n' }}{% if m.role == 'assistant' %}"
    "⟦{{ m.content + '<|im_end|>' }}⟧{% else %}{{ m.content + '<|im_end|>' }}{% endif %}{{ '\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)
SMOLLM2 = CHATML.replace(
    "{{ '<|im_start|>' + m.role",
    "{% if loop.first and messages[0].role != 'system' %}{{ '<|im_start|>system\nYou are a helpful AI assistant named "
    "SmolLM, trained by Hugging Face<|im_end|>\n' }}{% endif %}{{ '<|im_start|>' + m.role",
    1,
)
LLAMA3 = (
    "{% for m in messages %}{% if loop.first %}{{ bos_token }}{% endif %}"
    "{{ '<|start_header_id|>' + m.role + '<|end_header_id|>\n\n' }}"
    "{% if m.role == 'assistant' %}⟦{{ m.content | trim + '<|eot_id|>' }}⟧"
    "{% else %}{{ m.content | trim + '<|eot_id|>' }}{% endif %}{% endfor %}"
)
LLAMA3_PROMPT = "{{ '<|start_header_id|>assistant<|end_header_id|>\n\n' }}"
# The system turn is always there, with two dates; tools lead the first user turn; a call has one tool; what a tool
# says is written as JSON.
LLAMA31 = (
    "{{ bos_token }}{% if not date_string is defined %}{% set date_string = strftime_now('%d %b %Y') %}{% endif %}"
    "{% if not tools is defined %}{% set tools = none %}{% endif %}"
    "{% if messages[0].role == 'system' %}{% set system = messages[0].content | trim %}"
    "{% set messages = messages[1:] %}{% else %}{% set system = '' %}{% endif %}"
    "{{ '<|start_header_id|>system<|end_header_id|>\n\n' }}"
    "{% if tools is not none %}{{ 'Environment: ipython\n' }}{% endif %}"
    "{{ 'Cutting Knowledge Date: December 2023\nToday Date: ' + date_string + '\n\n' + system + '<|eot_id|>' }}"
    "{% if tools is not none %}{% set first = messages[0].content | trim %}{% set messages = messages[1:] %}"
    "{{ '<|start_header_id|>user<|end_header_id|>\n\nGiven the following functions, please respond with a JSON for a "
    "function call with its proper arguments that best answers the given prompt.\n\n' }}"
    "{% for t in tools %}{{ t | tojson(indent=4) + '\n\n' }}{% endfor %}{{ first + '<|eot_id|>' }}{% endif %}"
    "{% for m in messages %}{% if m.role in ('tool', 'ipython') %}"
    "{{ '<|start_header_id|>ipython<|end_header_id|>\n\n' + m.content | tojson + '<|eot_id|>' }}"
    "{% elif 'tool_calls' in m %}{% if m.tool_calls | length != 1 %}"
    "{{ raise_exception('This model only supports single tool-calls at once!') }}{% endif %}"
    "{% set call = m.tool_calls[0].function %}{{ '<|start_header_id|>assistant<|end_header_id|>\n\n' }}"
    "⟦{{ '{\"name\": \"' + call.name + '\", \"parameters\": ' + call.arguments | tojson + '}<|eot_id|>' }}⟧"
    "{% elif m.role == 'assistant' %}{{ '<|start_header_id|>assistant<|end_header_id|>\n\n' }}"
    "⟦{{ m.content | trim + '<|eot_id|>' }}⟧"
    "{% else %}{{ '<|start_header_id|>' + m.role + '<|end_header_id|>\n\n' + m.content | trim + '<|eot_id|>' }}"
    "{% endif %}{% endfor %}{% if add_generation_prompt %}" + LLAMA3_PROMPT + "{% endif %}"
)
# Both Qwen: tools in the system turn, results of tools in a user's turn, several of them in one.
QWEN_TOOLS = (
    "{{ '\n\n# Tools\n\nYou may call one or more functions to assist with the user query.\n\n<tools>' }}"
    "{% for t in tools %}{{ '\n' + t | tojson }}{% endfor %}{{ '\n</tools>\n\nFor each function call, return a json "
    "object within <tool_call></tool_call> XML tags.<|im_end|>\n' }}"
)
QWEN_RESULT = (
    "{% elif m.role == 'tool' %}{% if loop.first or messages[loop.index0 - 1].role != 'tool' %}"
    "{{ '<|im_start|>user' }}{% endif %}{{ '\n<tool_response>\n' + m.content + '\n</tool_response>' }}"
    "{% if loop.last or messages[loop.index0 + 1].role != 'tool' %}{{ '<|im_end|>\n' }}{% endif %}"
)
QWEN_CALL = (
    '{{ \'<tool_call>\n{"name": "\' + c.function.name + \'", "arguments": \' + c.function.arguments | tojson + '
    "'}\n</tool_call>' }}"
)
QWEN25_SYSTEM = "You are Qwen, created by Alibaba Cloud. You are a helpful assistant."
QWEN25 = (
    "{% if messages[0].role == 'system' %}{% set system = messages[0].content %}"
    "{% else %}{% set system = '" + QWEN25_SYSTEM + "' %}{% endif %}{{ '<|im_start|>system\n' + system }}"
    "{% if tools %}" + QWEN_TOOLS + "{% else %}{{ '<|im_end|>\n' }}{% endif %}"
    "{% for m in messages %}{% if m.role == 'user' or (m.role == 'system' and not loop.first) %}"
    "{{ '<|im_start|>' + m.role + '\n' + m.content + '<|im_end|>\n' }}"
    "{% elif m.role == 'assistant' and not m.tool_calls %}"
    "{{ '<|im_start|>assistant\n' }}⟦{{ m.content + '<|im_end|>' }}⟧{{ '\n' }}"
    "{% elif m.role == 'assistant' %}{{ '<|im_start|>assistant\n' }}⟦{{ m.content }}"
    "{% for c in m.tool_calls %}{% if m.content or not loop.first %}{{ '\n' }}{% endif %}" + QWEN_CALL + "{% endfor %}"
    "{{ '<|im_end|>' }}⟧{{ '\n' }}" + QWEN_RESULT + "{% endif %}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)
# Turns before the last question lose their thoughts; of those after it the last one has a thinking block, be it empty.
QWEN3 = (
    "{% if tools %}{{ '<|im_start|>system\n' }}"
    "{% if messages[0].role == 'system' %}{{ messages[0].content }}{% endif %}"
    + QWEN_TOOLS
    + "{% elif messages[0].role == 'system' %}{{ '<|im_start|>system\n' + messages[0].content + '<|im_end|>\n' }}"
    "{% endif %}{% set ns = namespace(looking=true, query=messages | length - 1) %}"
    "{% for m in messages[::-1] %}"
    "{% if ns.looking and m.role == 'user' and not (m.content.startswith('<tool_response>')"
    " and m.content.endswith('</tool_response>')) %}{% set ns.looking = false %}"
    "{% set ns.query = messages | length - 1 - loop.index0 %}{% endif %}{% endfor %}"
    "{% for m in messages %}{% set content = m.content %}"
    "{% if m.role == 'user' or (m.role == 'system' and not loop.first) %}"
    "{{ '<|im_start|>' + m.role + '\n' + content + '<|im_end|>\n' }}"
    "{% elif m.role == 'assistant' %}{% set thoughts = '' %}"
    "{% if m.reasoning_content is string %}{% set thoughts = m.reasoning_content %}"
    "{% elif '</think>' in content %}"
    "{% set thoughts = content.split('</think>')[0].rstrip('\n').split('<think>')[-1].lstrip('\n') %}"
    "{% set content = content.split('</think>')[-1].lstrip('\n') %}{% endif %}{{ '<|im_start|>assistant\n' }}"
    "{% if loop.index0 > ns.query and (loop.last or thoughts) %}{% set content = content.lstrip('\n') %}"
    "{% set block = '<think>\n' + thoughts.strip('\n') + '\n</think>\n\n' %}{% else %}{% set block = '' %}{% endif %}"
    "{% if not thoughts.strip('\n') %}{{ block }}{% set block = '' %}{% endif %}⟦{{ block + content }}"
    "{% for c in m.tool_calls or [] %}{% if content or not loop.first %}{{ '\n' }}{% endif %}"
    + QWEN_CALL
    + "{% endfor %}"
    "{{ '<|im_end|>' }}⟧{{ '\n' }}" + QWEN_RESULT + "{% endif %}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}"
    "{% if enable_thinking is defined and enable_thinking is false %}{{ '<think>\n\n</think>\n\n' }}{% endif %}"
    "{% endif %}"
)
GEMMA_TURN = (
    "{{ '<start_of_turn>' + ('model' if m.role == 'assistant' else m.role) + '\n' }}"
    "{% if m.role == 'assistant' %}⟦{{ m.content | trim + '<end_of_turn>' }}⟧"
    "{% else %}{{ lead | default('') if loop.first else '' }}{{ m.content | trim + '<end_of_turn>' }}{% endif %}"
    "{{ '\n' }}"
)
GEMMA_PROMPT = "{% if add_generation_prompt %}{{ '<start_of_turn>model\n' }}{% endif %}"
GEMMA2 = (
    "{{ bos_token }}{% if messages[0].role == 'system' %}{{ raise_exception('System role not supported') }}{% endif %}"
    "{% for m in messages %}" + ALTERNATE + GEMMA_TURN + "{% endfor %}" + GEMMA_PROMPT
)
GEMMA3 = (
    "{{ bos_token }}{% set loop_messages = messages %}{% if messages[0].role == 'system' %}"
    "{% set lead = messages[0].content + '\n\n' %}{% set loop_messages = messages[1:] %}{% endif %}"
    "{% for m in loop_messages %}" + ALTERNATE + GEMMA_TURN + "{% endfor %}" + GEMMA_PROMPT
)
# Written for generation up to [/INST], so the space after it belongs to the answer.
MISTRAL01 = (
    "{{ bos_token }}{% for m in messages %}" + ALTERNATE + "{% if m.role == 'user' %}"
    "{{ '[INST] ' + m.content + ' [/INST]' }}{% elif m.role == 'assistant' %}⟦{{ m.content + eos_token }}⟧{{ ' ' }}"
    "{% else %}{{ raise_exception('Only user and assistant roles are supported!') }}{% endif %}{% endfor %}"
)
MISTRAL02 = (
    "{% if messages[0].role == 'system' %}{% set system = messages[0].content %}{% set turns = messages[1:] %}"
    "{% else %}{% set turns = messages %}{% endif %}{{ bos_token }}{% for m in turns %}"
    + ALTERNATE
    + "{% if m.role == "
    "'user' %}{{ ' [INST] ' }}{% if loop.first and system is defined %}{{ system + '\n\n' }}{% endif %}"
    "{{ m.content + ' [/INST]' }}{% elif m.role == 'assistant' %}⟦{{ ' ' + m.content + eos_token }}⟧"
    "{% else %}{{ raise_exception('Only user and assistant roles are supported!') }}{% endif %}{% endfor %}"
)
# The system text leads the last turn, where that is the user's; tools stand before the last user turn; calls have ids
# of nine characters.
MISTRAL03 = (
    "{% if messages[0].role == 'system' %}{% set system = messages[0].content %}{% set turns = messages[1:] %}"
    "{% else %}{% set turns = messages %}{% endif %}{% if not tools is defined %}{% set tools = none %}{% endif %}"
    "{% set asked = turns | selectattr('role', 'equalto', 'user') | list %}{% set ns = namespace(index=0) %}"
    "{% for m in turns if not (m.role == 'tool' or m.tool_calls is defined) %}"
    "{% if (m.role == 'user') != (ns.index % 2 == 0) %}{{ raise_exception('After the optional system message, "
    "conversation roles must alternate user/assistant/user/assistant/...') }}{% endif %}"
    "{% set ns.index = ns.index + 1 %}{% endfor %}{{ bos_token }}{% for m in turns %}{% if m.role == 'user' %}"
    "{% if tools is not none and m == asked[-1] %}{{ '[AVAILABLE_TOOLS] ' + tools | tojson + '[/AVAILABLE_TOOLS]' }}"
    "{% endif %}{{ '[INST] ' }}{% if loop.last and system is defined %}{{ system + '\n\n' }}{% endif %}"
    "{{ m.content + '[/INST]' }}"
    "{% elif m.tool_calls is defined %}⟦{{ '[TOOL_CALLS] [' }}{% for c in m.tool_calls %}"
    "{% if not c.id is defined or c.id | length != 9 %}"
    "{{ raise_exception('Tool call IDs should be alphanumeric strings with length 9!') }}{% endif %}"
    "{% set call = c.function | tojson %}{{ call[:-1] + ', \"id\": \"' + c.id + '\"}' }}"
    "{{ ', ' if not loop.last else ']' + eos_token }}{% endfor %}⟧"
    "{% elif m.role == 'assistant' %}⟦{{ ' ' + m.content | trim + eos_token }}⟧"
    "{% elif m.role == 'tool' %}{% if not m.tool_call_id is defined or m.tool_call_id | length != 9 %}"
    "{{ raise_exception('Tool call IDs should be alphanumeric strings with length 9!') }}{% endif %}"
    "{{ '[TOOL_RESULTS] {\"content\": ' + m.content + ', \"call_id\": \"' + m.tool_call_id + '\"}[/TOOL_RESULTS]' }}"
    "{% endif %}{% endfor %}"
)
# Generation opens a thinking block that rendered answers do not have; all answers lose theirs. Calls of tools are
# written where the content is null and the arguments are text.
DEEPSEEK_R1 = (
    "{% set ns = namespace(system='', tool=false) %}{% for m in messages if m.role == 'system' %}"
    "{% set ns.system = m.content %}{% endfor %}{{ bos_token + ns.system }}{% for m in messages %}"
    "{% if m.role == 'user' %}{% set ns.tool = false %}{{ '<｜User｜>' + m.content }}{% endif %}"
    "{% if m.role == 'assistant' and m.content is none %}{{ '<｜Assistant｜><｜tool▁calls▁begin｜>' }}"
    "{% for c in m.tool_calls %}{{ c.type + '<｜tool▁sep｜>' + c.function.name + '\n' + c.function.arguments }}"
    "{% endfor %}{{ '<｜tool▁calls▁end｜>' + eos_token }}{% elif m.role == 'assistant' %}{% if ns.tool %}"
    "{{ '<｜tool▁outputs▁end｜>' }}⟦{{ m.content + eos_token }}⟧{% set ns.tool = false %}"
    "{% else %}{{ '<｜Assistant｜>' }}⟦{{ m.content.split('</think>')[-1] + eos_token }}⟧{% endif %}{% endif %}"
    "{% if m.role == 'tool' %}{{ '<｜tool▁outputs▁begin｜>' if not ns.tool else '\n' }}{% set ns.tool = true %}"
    "{{ '<｜tool▁output▁begin｜>' + m.content + '<｜tool▁output▁end｜>' }}{% endif %}{% endfor %}"
    "{% if ns.tool %}{{ '<｜tool▁outputs▁end｜>' }}{% endif %}"
    "{% if add_generation_prompt and not ns.tool %}{{ '<｜Assistant｜><think>\n' }}{% endif %}"
)
PHI3 = (
    "{% for m in messages %}{% if m.role == 'system' and m.content %}{{ '<|system|>\n' + m.content + '<|end|>\n' }}"
    "{% elif m.role == 'user' %}{{ '<|user|>\n' + m.content + '<|end|>\n' }}"
    "{% elif m.role == 'assistant' %}{{ '<|assistant|>\n' }}⟦{{ m.content + '<|end|>' }}⟧{{ '\n' }}{% endif %}"
    "{% endfor %}{% if add_generation_prompt %}{{ '<|assistant|>\n' }}{% else %}{{ eos_token }}{% endif %}"
)
PHI4 = (
    "{% for m in messages %}{% if m.role in ('system', 'user') %}"
    "{{ '<|im_start|>' + m.role + '<|im_sep|>' + m.content + '<|im_end|>' }}{% elif m.role == 'assistant' %}"
    "{{ '<|im_start|>assistant<|im_sep|>' }}⟦{{ m.content + '<|im_end|>' }}⟧{% endif %}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant<|im_sep|>' }}{% endif %}"
)
# Its first version: the user's turn opens the assistant's.
PHI4_FIRST = (
    "{% for m in messages %}{% if m.role == 'system' %}{{ '<|im_start|>system<|im_sep|>' + m.content + '<|im_end|>' }}"
    "{% elif m.role == 'user' %}"
    "{{ '<|im_start|>user<|im_sep|>' + m.content + '<|im_end|><|im_start|>assistant<|im_sep|>' }}"
    "{% elif m.role == 'assistant' %}⟦{{ m.content + '<|im_end|>' }}⟧{% endif %}{% endfor %}"
)
# The roles are words, one token is BOS and EOS.
OLMO2 = (
    "{{ bos_token }}{% for m in messages %}{% if m.role in ('system', 'user') %}"
    "{{ '<|' + m.role + '|>\n' + m.content + '\n' }}{% elif m.role == 'assistant' %}{{ '<|assistant|>\n' }}"
    "⟦{{ m.content + eos_token }}⟧{% if not loop.last %}{{ '\n' }}{% endif %}{% endif %}"
    "{% if loop.last and add_generation_prompt %}{{ '<|assistant|>\n' }}{% endif %}{% endfor %}"
)
# Special tokens within the turn, another end for the last turn than for those before, thoughts in the last turn alone.
GPT_OSS = (
    "{% for m in messages %}{% if m.role == 'assistant' %}{{ '<|start|>assistant' }}"
    "{% if m.tool_calls is defined %}{% set c = m.tool_calls[0].function %}⟦{{ ' to=functions.' + c.name + "
    "'<|channel|>commentary json<|message|>' + m.content + c.arguments | tojson + '<|call|>' }}⟧{% else %}⟦"
    "{% if m.reasoning_content is defined and loop.last %}{{ '<|channel|>analysis<|message|>' + m.reasoning_content + "
    "'<|end|><|start|>assistant' }}{% endif %}{{ '<|channel|>final<|message|>' + m.content }}"
    "{{ '<|return|>' if loop.last else '<|end|>' }}⟧{% endif %}"
    "{% elif m.role == 'tool' %}{{ '<|start|>functions.' + m.name + ' to=assistant<|channel|>commentary<|message|>' + "
    "m.content | tojson + '<|end|>' }}"
    "{% else %}{{ '<|start|>' + m.role + '<|message|>' + m.content + '<|end|>' }}{% endif %}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|start|>assistant' }}{% endif %}"
)

IM, HEADERS = ("<|im_start|>", "<|im_end|>"), ("<|start_header_id|>", "<|end_header_id|>", "<|eot_id|>")
GEMMA = ("<start_of_turn>", "<end_of_turn>")
PHI = ("<|system|>", "<|user|>", "<|assistant|>", "<|end|>")
MISTRAL = ("[INST]", "[/INST]", "[TOOL_CALLS]", "[AVAILABLE_TOOLS]", "[/AVAILABLE_TOOLS]", "[TOOL_RESULTS]")
DEEPSEEK = tuple(f"<｜{name}｜>" for name in ("User", "Assistant", "tool▁outputs▁begin", "tool▁outputs▁end"))
LLAMA3_WITH_CHOICE = LLAMA3 + "{% if add_generation_prompt %}" + LLAMA3_PROMPT + "{% endif %}"

# Why a row is refused. A template that only writes role and content would lose the rest without a word.
NO_CALLS = {
    **dict.fromkeys(("a call", "two calls", "tools and two questions"), "leaves out the definitions of tools"),
    **dict.fromkeys(("words and a call", "calls in two rounds"), "leaves out a part of a call of a tool"),
}
NO_THOUGHTS = {"reasoning": "leaves out its reasoning"}
ROLES_AND_TEXTS = NO_CALLS | NO_THOUGHTS
STRICT = "refuses the conversation: .*roles must alternate"
ALTERNATING = {**dict.fromkeys((*NO_CALLS, "two questions"), STRICT), **NO_THOUGHTS}
LLAMA_CALLS = {"two calls": "single tool-calls", "words and a call": "leaves out a part of a call of a tool"}
THINKING_LAST = ("a thinking block", "thinking in each turn", "the same thoughts again")
THINKING_ALONE = ("thoughts alone before",)  # nothing is left of the turn
FAMILIES = {
    "chatml": Family(CHATML, IM, ROLES_AND_TEXTS),
    "smollm2": Family(SMOLLM2, IM, ROLES_AND_TEXTS),
    "llama3": Family(LLAMA3_WITH_CHOICE, HEADERS, ROLES_AND_TEXTS),
    "llama3, first version": Family(LLAMA3 + LLAMA3_PROMPT, HEADERS, ROLES_AND_TEXTS),
    "llama3.1": Family(LLAMA31, HEADERS, LLAMA_CALLS | NO_THOUGHTS),
    # As Llama 3.2 without a date given: it asks for today's.
    "llama3.2": Family(LLAMA31.replace("not date_string is defined", "true"), HEADERS, LLAMA_CALLS | NO_THOUGHTS),
    "qwen2.5": Family(QWEN25, IM, NO_THOUGHTS, added=("<tool_call>", "</tool_call>")),
    "qwen3": Family(
        QWEN3,
        IM,
        dict.fromkeys(THINKING_ALONE, "leaves out a part of it"),
        added=("<think>", "</think>", "<tool_call>", "</tool_call>"),
    ),
    "gemma2": Family(GEMMA2, GEMMA, ALTERNATING, system=False, greeting=False),
    "gemma3": Family(GEMMA3, GEMMA, ALTERNATING, greeting=False),
    "mistral0.1": Family(MISTRAL01, (), ALTERNATING, system=False, greeting=False),
    "mistral0.2": Family(MISTRAL02, (), ALTERNATING, greeting=False),
    "mistral0.3": Family(
        MISTRAL03,
        MISTRAL,
        {
            **NO_THOUGHTS,
            "two questions": STRICT,
            "words and a call": "leaves out a part of a call of a tool",
            # The tools stand before the last question; for the first answer they stood before the first one.
            "tools and two questions": "renders the prompt differently with its completion than without",
        },
        system=False,
        greeting=False,
    ),
    "deepseek-r1": Family(
        DEEPSEEK_R1,
        DEEPSEEK,
        ROLES_AND_TEXTS | dict.fromkeys((*THINKING_LAST, *THINKING_ALONE), "leaves out a part of it"),
        bos="<｜begin▁of▁sentence｜>",
        eos="<｜end▁of▁sentence｜>",
        added=("<think>", "</think>"),
    ),
    "phi3": Family(PHI3, PHI, ROLES_AND_TEXTS),
    "phi4": Family(PHI4, (*IM, "<|im_sep|>"), ROLES_AND_TEXTS),
    "phi4, first version": Family(PHI4_FIRST, (*IM, "<|im_sep|>"), ROLES_AND_TEXTS),
    "olmo2": Family(OLMO2, (), ROLES_AND_TEXTS, bos="</s>"),
    "gpt-oss": Family(
        GPT_OSS,
        ("<|start|>", "<|channel|>", "<|message|>", "<|end|>", "<|return|>", "<|call|>"),
        {
            "two calls": "leaves out the definitions of tools",
            "a call": "leaves out the definitions of tools",
            "tools and two questions": "leaves out the definitions of tools",
        },
    ),
}


# --- The conversations -----------------------------------------------------------------------------------


def exchanges(*texts):
    """Turns of the user and the assistant in their order."""
    return [{"role": ("user", "assistant")[place % 2], "content": text} for place, text in enumerate(texts)]


def said(content, **more):
    return {"role": "assistant", "content": content} | more


def call(name="add", number="A00000001", **arguments):
    return {"type": "function", "id": number, "function": {"name": name, "arguments": arguments}}


def result(content, number="A00000001"):
    return {"role": "tool", "content": content, "name": "add", "tool_call_id": number}


SYSTEM = [{"role": "system", "content": "Be brief."}]
USER = exchanges("2+2?")
TOOLS = [{"type": "function", "function": {"name": "add", "description": "Adds «a» and b.", "parameters": {"a": {}}}}]
CONVERSATIONS = {
    "one exchange": exchanges("2+2?", "4"),
    "a system turn": SYSTEM + exchanges("2+2?", "4", "3+3?", "6"),
    "three exchanges": exchanges("Hello", "Hi there", "2+2?", "4", "thanks", "Welcome."),
    "five exchanges": SYSTEM + exchanges(*(f"{word} {n}" for n in range(5) for word in ("ask", "tell"))),
    "seven exchanges": exchanges(*(f"{word} {n}" for n in range(7) for word in ("ask", "tell"))),
    "a greeting": [said("Hello!", weight=0), *exchanges("2+2?", "4", "3+3?", "6")],
    "a system turn and a greeting": [*SYSTEM, said("Hello!", weight=0), *exchanges("2+2?", "4")],
    "not learned first": [*USER, said("5", weight=0), *exchanges("sure?", "4")],
    "not learned in the middle": [*exchanges("a", "b"), *USER, said("5", weight=0), *exchanges("sure?", "4")],
    "many not learned": [
        turn | ({"weight": n % 3} if turn["role"] == "assistant" and n % 3 == 0 else {})
        for n, turn in enumerate(exchanges(*(f"{word} {n}" for n in range(7) for word in ("ask", "tell"))))
    ],
    "the same answer, not learned": [
        *exchanges(*["why", "so"] * 5), *exchanges("say a"), said("x", weight=0), *exchanges("a", "x", "a", "x"),
    ],
    "two questions": [*exchanges("first"), *exchanges("second", "4")],
    "all the same": exchanges(*["yes"] * 6),
    "all the same, many": exchanges(*["a"] * 12),
    "parts of each other": exchanges("a", "ab", "abc", "a", "ab", "b"),
    "the user's words said again": exchanges("Say: 4", "Say: 4\nSay: 4", "4", "Say"),
    "headers as words": SYSTEM + exchanges("assistant", "user", "assistant\n", "model\n", "\nsystem\n\n", "assistant"),
    "channels as words": exchanges("final", "final", "analysis", "final", "x", "analysis", "final", "commentary"),
    "template words": exchanges(
        "{{ messages }}{% for m in x %}", "{% generation %}", "[INST ] ### assistant:\n", "<|im_end", "|>", "user\n"
    ),
    "white space": exchanges("  2+2? \n", " \n4\t ", "\n\n3+3?", "6\n\n", " a ", " a "),
    "white space inside": exchanges("a\n\n\nb", "c  d\n\n \ne", "a\tb", "c\r\nd"),
    "other writings": exchanges("Grüße, 世界? 👩‍👩‍👧", "Ça va — «très» 😀", "مرحبا", "e\u0301\u200b x"),
    "signs alone": exchanges("?", ".", "\\n", '"', "'", "{}"),
    "a thinking block": SYSTEM + exchanges("2+2?", "<think>\ntwo and two\n</think>\n\n4"),
    "thinking before": exchanges("2+2?", "<think>\ntwo\n</think>\n\n4", "3+3?", "6"),
    "thinking in each turn": exchanges("2+2?", "<think>\ntwo\n</think>\n\n4", "3+3?", "<think>\nthree\n</think>\n\n6"),
    "the same thoughts again": exchanges(*["2+2?", "<think>\ntwo\n</think>\n\n4"] * 3),
    "thoughts that the user quotes": exchanges("2?", "<think>\nb\n</think>\n\n4", "<think>\nb\n</think>\n\n4?", "6"),
    "thoughts alone before": exchanges("2+2?", "<think>\ntwo\n</think>\n\n", "3+3?", "6"),
    "an empty thinking block": exchanges("2+2?", "<think>\n\n</think>\n\n4", "3+3?", "<think>\n\n</think>\n\n6"),
    "reasoning": [*USER, said("4", reasoning_content="two and two")],
    "reasoning before": [*USER, said("4", reasoning_content="two and two"), *exchanges("3+3?", "6")],
    "reasoning before the same words": [
        *USER, said("final", reasoning_content="two"), *exchanges("final answer?", "final"), *exchanges("4", "4"),
    ],
    "a call": [*USER, said("", tool_calls=[call(a=2, b="two")]), result("4"), said("It is 4")],
    "two calls": [
        *SYSTEM, *USER, said("", tool_calls=[call(a="x"), call(a="y", number="A00000002")]), result("4"),
        result("5", "A00000002"), said("4 and 5"),
    ],
    "words and a call": [*USER, said("Let me see.", tool_calls=[call(a="é")]), result("4"), said("It is 4")],
    "calls in two rounds": [
        *exchanges("hello", "hi"), *USER, said("", tool_calls=[call(a=[1, {"b": "c"}])]), result("4"),
        said("", tool_calls=[call()]), result("4"), said("4"), *exchanges("sure?", "yes"),
    ],
    "tools and two questions": [
        *exchanges("hello", "hi"), *USER, said("", tool_calls=[call()]), result("4"), said("4"),
    ],
}  # fmt: skip
WHITE_SPACE = {"white space"}  # at the edges of what is said, where it merges with what the template writes
WITH_TOOLS = {"a call", "two calls", "tools and two questions"}  # whose tools are defined, too


def as_messages(turns, tools=None):
    """The turns as `Encoder` takes them."""
    made = [Message("tools", json.dumps(tools, ensure_ascii=False))] if tools else []
    for turn in turns:
        extra = {name: value for name, value in turn.items() if name not in ("role", "content", "weight")}
        made.append(
            Message(
                turn["role"],
                turn["content"],
                turn.get("weight", 1) != 0,
                json.dumps(extra, ensure_ascii=False) if extra else "",
            )
        )
    return tuple(made)


# --- Tokenizers made on the spot -------------------------------------------------------------------------


def with_tokens(tokenizer, family):
    """A tokenizer with the special tokens of a family: names, or `AddedToken`s that take white space with them."""
    names = dict.fromkeys(["<pad>", family.bos, family.eos, *family.special])
    tokenizer.add_special_tokens(
        [token if isinstance(token, AddedToken) else AddedToken(token, special=True) for token in names]
    )
    tokenizer.add_tokens([AddedToken(token, special=False, normalized=False) for token in family.added])
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        bos_token=family.bos,
        eos_token=family.eos,
        pad_token="<pad>",
        chat_template=family.plain,
    )


def byte_tokenizer(family):
    """A token for each byte, so that no token can hold two characters."""
    vocabulary = {token: index for index, token in enumerate(sorted(pre_tokenizers.ByteLevel.alphabet()))}
    tokenizer = Tokenizer(models.BPE(vocabulary, []))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    tokenizer.decoder = decoders.ByteLevel()
    return with_tokens(tokenizer, family)


def word_tokenizer(family, style):
    """Words that begin with a space, as SentencePiece has them, and bytes for what it does not know.

    style: how the space gets before the first word: by Metaspace at the start of a text ("first") or after special
    tokens too ("always"), or by the older normalizer, which writes it even before a space ("prepend").
    """
    characters = [chr(code) for code in range(33, 127)]
    spaced = [(SPACE, one) for one in characters] + [(SPACE + "t", "w"), (SPACE + "tw", "o"), (SPACE + "I", "t")]
    pieces = ["<unk>", *(f"<0x{byte:02X}>" for byte in range(256)), SPACE, *characters, *map("".join, spaced)]
    vocabulary = {piece: index for index, piece in enumerate(pieces)}
    tokenizer = Tokenizer(models.BPE(vocabulary, spaced, unk_token="<unk>", byte_fallback=True, fuse_unk=True))
    if style == "prepend":
        tokenizer.normalizer = normalizers.Sequence([normalizers.Prepend(SPACE), normalizers.Replace(" ", SPACE)])
    else:
        tokenizer.pre_tokenizer = pre_tokenizers.Metaspace(SPACE, prepend_scheme=style, split=False)
    return with_tokens(tokenizer, family)


def merging_tokenizer(family):
    """Byte-level BPE with tokens of several characters, trained on the conversations; newlines merge, as in Llama 3."""
    words = Regex(r"[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+")
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [pre_tokenizers.Split(words, "isolated"), pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)]
    )
    tokenizer.decoder = decoders.ByteLevel()
    texts = ["\n\n", "\n\n\n", "\n \n", *(turn["content"] for turns in CONVERSATIONS.values() for turn in turns)] * 9
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(vocab_size=400, initial_alphabet=alphabet, show_progress=False)
    tokenizer.train_from_iterator(texts, trainer)
    return with_tokens(tokenizer, family)


# --- What is expected ------------------------------------------------------------------------------------


def runs(mask):
    """The stretches of True, as pairs of positions."""
    edges = np.flatnonzero(np.diff(np.concatenate([[0], np.asarray(mask, dtype=int), [0]])))
    return [(int(start), int(stop)) for start, stop in edges.reshape(-1, 2)]


def marked(tokenizer, family, turns, tools=None):
    """Ids and mask as transformers gives them, without loss on turns of weight 0, up to the last one with loss."""
    handed = [{name: value for name, value in turn.items() if name != "weight"} for turn in turns]
    out = tokenizer.apply_chat_template(
        handed,
        tools=tools,
        chat_template=family.marked,
        return_dict=True,
        return_assistant_tokens_mask=True,
        **ARGUMENTS,
    )
    plain = tokenizer.apply_chat_template(handed, tools=tools, return_dict=False, **ARGUMENTS)
    assert out["input_ids"] == plain
    spoken = [turn for turn in turns if turn["role"] == "assistant"]
    found = runs(out["assistant_masks"])
    assert len(found) == len(spoken)
    mask = np.zeros(len(plain), dtype=bool)
    for (start, stop), turn in zip(found, spoken, strict=True):
        mask[start:stop] = turn.get("weight", 1) != 0
    stop = runs(mask)[-1][1]
    return plain[:stop], mask[:stop].tolist()


def written(family, turns):
    """The turns without what the template has no place for: a greeting is left out, a system text leads the user's."""
    first = next(place for place, turn in enumerate(turns) if turn["role"] == "user")
    if not family.greeting:
        turns = [turn for place, turn in enumerate(turns) if place >= first or turn["role"] != "assistant"]
    if not family.system and turns[0]["role"] == "system":
        system, user, *rest = turns
        turns = [user | {"content": system["content"].strip() + "\n\n" + user["content"]}, *rest]
    return turns


def check(tokenizer, family, turns, tools=None):
    """The encoder's ids and mask of a conversation are those of transformers."""
    example = Encoder(tokenizer, max_length=100_000).encode(as_messages(turns, tools))
    ids, mask = marked(tokenizer, family, written(family, turns), tools)
    same(tokenizer, example, ids, mask)


def same(tokenizer, example, ids, mask):
    """An example has these ids and this mask; texts are compared first, as they say more where they differ."""
    assert tokenizer.decode(example.input_ids.tolist()) == tokenizer.decode(ids)
    assert example.input_ids.tolist() == ids
    found, expected = ([tokenizer.decode(ids[a:b]) for a, b in runs(one)] for one in (example.loss_mask, mask))
    assert found == expected
    assert example.loss_mask.tolist() == mask


def by_segments(tokenizer, family, turns, tools=None):
    """Ids and mask where tokens may be of several characters: what is said and what is not, tokenised apart.

    The marks are left in what the template writes, and it is cut there.
    """
    handed = [{name: value for name, value in turn.items() if name != "weight"} for turn in turns]
    text = tokenizer.apply_chat_template(handed, tools=tools, chat_template=family.source, tokenize=False, **ARGUMENTS)
    weights = iter([turn.get("weight", 1) != 0 for turn in turns if turn["role"] == "assistant"])
    segments = [""]  # of the prompt and the assistant in turn, as the encoder has them
    for place, segment in enumerate(re.split(f"{BEGIN}|{END}", text)):
        if place % 2 and next(weights):
            segments += [segment, ""]
        else:
            segments[-1] += segment
    pieces = [tokenizer.encode(segment, add_special_tokens=False) for segment in segments[:-1]]
    mask = [place % 2 == 1 for place, piece in enumerate(pieces) for _ in piece]
    return [token for piece in pieces for token in piece], mask


# --- Tests -----------------------------------------------------------------------------------------------


@pytest.fixture(autouse=True)
def today(monkeypatch):
    """The day that templates are told, which the encoder keeps the same for ever."""

    class Day(datetime.datetime):
        @classmethod
        def now(cls, tz=None):
            return cls(2024, 7, 26)

    monkeypatch.setattr(chat_template_utils, "datetime", Day)


@pytest.mark.parametrize("about", CONVERSATIONS)
@pytest.mark.parametrize("name", FAMILIES)
def test_ids_and_mask_are_those_of_transformers_or_the_refusal_says_why(name, about):
    family, turns = FAMILIES[name], CONVERSATIONS[about]
    tokenizer, tools = byte_tokenizer(family), TOOLS if about in WITH_TOOLS else None
    if about not in family.refusals:
        check(tokenizer, family, turns, tools)
        return
    with pytest.raises(Untokenizable, match=family.refusals[about]):
        Encoder(tokenizer, max_length=100_000).encode(as_messages(turns, tools))


@pytest.mark.parametrize("name", FAMILIES)
def test_no_token_is_of_two_segments(name):
    """With merges over the border, a whole text has other tokens than its segments: the segments' are taken."""
    family = FAMILIES[name]
    tokenizer, differ = merging_tokenizer(family), 0
    for about, turns in CONVERSATIONS.items():
        if about in family.refusals:
            continue
        tools = TOOLS if about in WITH_TOOLS else None
        example = Encoder(tokenizer, max_length=100_000).encode(as_messages(turns, tools))
        ids, mask = by_segments(tokenizer, family, written(family, turns), tools)
        same(tokenizer, example, ids, mask)
        differ += ids != marked(tokenizer, family, written(family, turns), tools)[0]
    assert (differ > 0) == (name in MERGING)


# Those that write white space before an answer and do not trim the answer's own.
MERGING = {"chatml", "smollm2", "qwen2.5", "qwen3", "mistral0.1", "phi3"}


@pytest.mark.parametrize("style", ["first", "always", "prepend"])
@pytest.mark.parametrize("name", FAMILIES)
def test_the_space_that_sentencepiece_writes_stands_where_it_does_in_the_whole_text(name, style):
    family = FAMILIES[name]
    tokenizer = word_tokenizer(family, style)
    for about, turns in CONVERSATIONS.items():
        if about not in family.refusals:
            check(tokenizer, family, turns, TOOLS if about in WITH_TOOLS else None)


@pytest.mark.parametrize(("name", "sides"), [("phi3", "right"), ("phi4", "both"), ("phi4, first version", "both")])
@pytest.mark.parametrize("kind", ["bytes", "first", "always", "prepend"])
def test_white_space_that_a_special_token_takes_is_in_no_token(name, sides, kind):
    """As the tokens of Phi-3 (``rstrip``) and Phi-4 (``lstrip`` too) do: a header takes the start of the words."""
    family = FAMILIES[name]
    taking = [AddedToken(token, special=True, rstrip=True, lstrip=sides == "both") for token in family.special]
    family = family._replace(special=tuple(taking))
    tokenizer = byte_tokenizer(family) if kind == "bytes" else word_tokenizer(family, kind)
    strip = str.strip if sides == "both" else str.lstrip
    for about, turns in CONVERSATIONS.items():
        if about in family.refusals:
            continue
        example = Encoder(tokenizer, max_length=100_000).encode(as_messages(turns))
        stripped = [turn | {"content": strip(turn["content"])} for turn in turns]
        ids, mask = marked(tokenizer, family, stripped)
        assert ids == marked(tokenizer, family, turns)[0][: len(ids)]
        same(tokenizer, example, ids, mask)


@pytest.mark.parametrize(
    ("folder", "names"),
    [("smollm2", ("smollm2", "chatml", "qwen2.5", "qwen3")), ("gemma3_270m", ("gemma2", "gemma3"))],
)
def test_with_the_tokenizer_of_a_model(folder, names):
    path = MODELS / folder
    if not path.is_dir():
        pytest.skip(f"{path} is not there: it holds the tokenizer of a model")
    tokenizer = AutoTokenizer.from_pretrained(path)
    own = tokenizer.chat_template
    for name in names:
        family = FAMILIES[name]
        tokenizer.chat_template = family.plain
        for about, turns in CONVERSATIONS.items():
            if about in family.refusals:
                continue
            tools = TOOLS if about in WITH_TOOLS else None
            example = Encoder(tokenizer, max_length=100_000).encode(as_messages(turns, tools))
            turns = written(family, turns)
            same(tokenizer, example, *by_segments(tokenizer, family, turns, tools))
            # SmolLM2's newlines before a word are tokens of their own in a whole text, as GPT-2's; where a prompt ends
            # in two, as after Qwen3's thinking block, they are one.
            if about not in WHITE_SPACE and (folder, name) != ("smollm2", "qwen3"):
                same(tokenizer, example, *marked(tokenizer, family, turns, tools))
            if name == folder:
                plain, published = (
                    tokenizer.apply_chat_template(turns, chat_template=one, tokenize=False)
                    for one in (family.plain, own)
                )
                assert plain == published


# --- Templates at random ---------------------------------------------------------------------------------


class Pieces(NamedTuple):
    """What a template at random is made of; see `template_of`."""

    header: str  # before a turn, with ROLE for who speaks
    user_end: str
    answer_end: str  # none, words, or a special token
    after: str  # what follows an answer and its end
    trim: bool
    bos: bool
    prompt: str  # how generation begins: "header", without its white space, "opened" or "empty" thinking, or "nothing"
    thoughts: str  # "kept", taken from "earlier" answers, or from "all"
    system: str  # in a turn of its own, in the "user"'s, "refused", or left "out"
    closes: bool  # whether EOS stands at the end of the whole


OPEN, EMPTY = "<think>\n", "<think>\n\n</think>\n\n"
PIECES = st.builds(
    Pieces,
    header=st.sampled_from(
        ["<|im_start|>ROLE\n", "<|ROLE|>", "<|im_start|>ROLE<|user|>", "### ROLE:\n", "ROLE: ", "\n[ROLE] "]
    ),
    user_end=st.sampled_from(["<|im_end|>\n", "<|im_end|>", "\n\n", " [/INST]", ""]),
    answer_end=st.sampled_from(["</s>", "<|im_end|>", "<|im_end|>", "", " ###"]),
    after=st.sampled_from(["", "\n", " ", "\n\n"]),
    trim=st.booleans(),
    bos=st.booleans(),
    prompt=st.sampled_from(["header", "header", "stripped", "opened", "empty", "nothing"]),
    thoughts=st.sampled_from(["kept", "earlier", "all"]),
    system=st.sampled_from(["own", "user", "refused", "out"]),
    closes=st.booleans(),
).filter(lambda pieces: not (pieces.closes and "<" not in pieces.answer_end))


def template_of(pieces):
    """A template with marks where the module says that loss begins and ends."""
    header, end = (pieces.header.replace("ROLE", "assistant"), pieces.answer_end)
    begins = {
        "header": [header],
        "stripped": [header.rstrip()],
        "opened": [header + OPEN, header.rstrip(" ")],
        "empty": [header + EMPTY, header],
        "nothing": [""],
    }[pieces.prompt]
    # An answer begins after the first of these texts that it is written with.
    starts = ""
    for begin in begins:
        starts += ("{% elif" if starts else "{% if") + f" t.startswith({begin!r}) %}}"
        starts += f"{{{{ t[:{len(begin)}] }}}}⟦{{{{ t[{len(begin)}:] + {end!r} }}}}⟧"
    starts += "{% endif %}"
    if not end:  # white space at the end of the words has no loss
        starts = starts.replace("}}⟧{% e", "}}⟧{{ c[c.rstrip() | length:] }}{% e").replace("t[", "t.rstrip()[")
    thoughts = {
        "kept": "",
        "earlier": "{% if not loop.last %}{% set c = c.split('</think>')[-1] %}{% endif %}",
        "all": "{% set c = c.split('</think>')[-1] %}",
    }[pieces.thoughts]
    system = {
        "own": "",
        "user": "{% if m.role == 'system' %}{% continue %}{% elif loop.index0 == 1 and messages[0].role == 'system' %}"
        "{% set c = messages[0].content + '\n' + c %}{% endif %}",
        "refused": "{% if m.role == 'system' %}{{ raise_exception('no system turn') }}{% endif %}",
        "out": "{% if m.role == 'system' %}{% continue %}{% endif %}",
    }[pieces.system]
    block = f"{{% if loop.last and not '</think>' in c %}}{{% set c = {EMPTY!r} + c %}}{{% endif %}}"
    prompt = {"stripped": header.rstrip(), "opened": header + OPEN, "nothing": ""}.get(pieces.prompt, header)
    asked = f"{{% if enable_thinking is false %}}{{{{ {EMPTY!r} }}}}{{% endif %}}" if pieces.prompt == "empty" else ""
    return (
        f"{'{{ bos_token }}' if pieces.bos else ''}{{% for m in messages %}}{{% set c = m.content %}}"
        f"{'{% set c = c | trim %}' if pieces.trim else ''}{system}{{% if m.role == 'assistant' %}}{thoughts}"
        f"{block if pieces.prompt == 'empty' else ''}{{% set t = {header!r} + c %}}{starts}{{{{ {pieces.after!r} }}}}"
        f"{{% else %}}{{{{ {pieces.header!r}.replace('ROLE', m.role) + c + {pieces.user_end!r} }}}}{{% endif %}}"
        f"{{% endfor %}}{{% if add_generation_prompt %}}{{{{ {prompt!r} }}}}{asked}"
        f"{'{% else %}{{ eos_token }}' if pieces.closes else ''}{{% endif %}}"
    )


PARTS = ["a", "b", "ab", "user", "assistant", " ", "\n", "### ", "[/INST]", "assistant: ", "### user:\n", "e", "'"]
THOUGHTS = [EMPTY, "<think>\na\n</think>\n\n", "<think>b</think>"]
TEXTS = st.lists(st.sampled_from(PARTS), min_size=1, max_size=4).map("".join).filter(str.strip)
ANSWERS = st.tuples(st.sampled_from(["", "", "", *THOUGHTS]), TEXTS).map("".join)


@st.composite
def conversations(draw):
    """One to seven exchanges that use few words, so that many are the same; some answers are not learned."""
    turns = [{"role": "system", "content": draw(TEXTS)}] if draw(st.booleans()) else []
    said_before = []
    for _ in range(draw(st.integers(1, 7))):
        user = draw(st.one_of(TEXTS, st.sampled_from(said_before)) if said_before else TEXTS)
        turns += [{"role": "user", "content": user}, said(draw(ANSWERS), weight=draw(st.integers(0, 3)))]
        said_before.append(turns[-1]["content"])
    turns[-1]["weight"] = 1
    return turns


def deserved(reason, pieces, turns):
    """Whether a template and a conversation do not fit each other for this reason."""
    learned = [turn["content"] for turn in turns if turn["role"] == "assistant" and turn["weight"]]
    if "leaves out a part of it" in reason:
        return pieces.thoughts == "all" and re.search(r"<think>.*\w.*</think>", learned[-1], re.S)
    if "does not say where an assistant's turn ends" in reason:
        # While it is the last one, it is written otherwise, and no special token tells its end from the next header.
        otherwise = pieces.prompt == "empty" or pieces.thoughts == "earlier"
        no_token = "<" not in pieces.answer_end or (pieces.prompt == "nothing" and pieces.header.startswith("<"))
        return otherwise and no_token and len(learned) > 1
    return False


@settings(max_examples=100, deadline=None, derandomize=True, database=None)
@given(PIECES, conversations())
def test_templates_and_conversations_at_random(pieces, turns):
    special = ("<|im_start|>", "<|im_end|>", "<|system|>", "<|user|>", "<|assistant|>")
    family = Family(template_of(pieces), special, system=pieces.system in ("own", "user"))
    tokenizer = byte_tokenizer(family)
    try:
        example = Encoder(tokenizer, max_length=100_000).encode(as_messages(turns))
    except Untokenizable as error:
        assert deserved(error.reason, pieces, turns), error.reason
        return
    ids, mask = marked(tokenizer, family, written(family, turns))
    if "<" not in pieces.answer_end:
        ids, mask = [*ids, tokenizer.eos_token_id], [*mask, True]
    same(tokenizer, example, ids, mask)


PUBLISHED = {  # files of trl/chat_templates
    "llama3": "llama3",
    "llama3.1": "llama3_1",
    "qwen2.5": "qwen2_5",
    "qwen3": "qwen3",
    "gemma2": "gemma",
    "gemma3": "gemma3",
    "deepseek-r1": "deepseek_r1_distill",
    "phi3": "phi3_5",
}


@pytest.mark.parametrize("name", PUBLISHED)
def test_the_templates_here_write_what_the_published_ones_write(name):
    """But for the advice about tools, which is shorter here."""
    folder = pytest.importorskip("trl").__path__[0]
    published = Path(folder, "chat_templates", f"{PUBLISHED[name]}.jinja")
    if not published.is_file():
        pytest.skip(f"this version of trl has no {published.name}")
    family = FAMILIES[name]
    tokenizer = byte_tokenizer(family)
    for about, turns in CONVERSATIONS.items():
        if about in family.refusals:
            continue
        turns = written(family, turns)
        for shown, prompt in ((turns, False), (turns[:-1], True)):
            ours, theirs = (
                tokenizer.apply_chat_template(
                    shown, chat_template=text, tokenize=False, add_generation_prompt=prompt, **ARGUMENTS
                )
                for text in (family.plain, published.read_text())
            )
            assert ours == theirs, about
