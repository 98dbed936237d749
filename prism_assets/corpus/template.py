"""Conversations as text in segments, supervised and not: in the plain format, or cut out of a chat template's text.

The plain format joins the turns by a separator; a chat template renders the whole conversation, and the assistant's
turns are found in what it rendered.
"""

from __future__ import annotations

import contextlib
import json
import re
from collections.abc import Iterator, Mapping, Sequence
from functools import cached_property
from typing import TYPE_CHECKING, Any, NamedTuple, cast

from prism_assets.corpus.records import Message, excerpt_of
from prism_assets.errors import UnusableTokenizer

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

# Some templates write today's date into the system turn, by date_string or strftime_now; the same data would
# give other tokens every day. So the date is fixed, by an argument and by a macro in place of the function.
TEMPLATE_DATE = {
    "d": "26",
    "m": "07",
    "b": "Jul",
    "B": "July",
    "Y": "2024",
    "y": "24",
    "A": "Friday",
    "a": "Fri",
}
FIXED_DATE_MACRO = (
    "{% macro strftime_now(format) %}{{ format"
    + "".join(f" | replace('%{directive}', '{value}')" for directive, value in TEMPLATE_DATE.items())
    + " }}{% endmacro %}{{ '' }}"
)

# Templates of models that can reason aloud open the answer with an empty thinking block; others ignore this.
TEMPLATE_ARGUMENTS = {"enable_thinking": False, "date_string": "26 Jul 2024"}

# Stands for the completion where only the prompt is known.
PLACEHOLDER = Message("assistant", "PlaceholderForTheCompletion")
_PROBE = {role: Message(role, f"PlaceholderForThe{role.title()}") for role in ("system", "user", "tool")}
# Templates that can reason aloud write it themselves where there is none.
_EMPTY_THINKING = re.compile(r"\s*<think>\s*</think>\s*")
_THINKING_START = re.compile(r"\s*<think>\s*")
# Templates read the same thoughts under different names.
_REASONING_NAMES = ("reasoning_content", "reasoning", "thinking")
_MANY_TURNS = 5  # from so many learned turns on, most are found without rendering their prompts
_HEADER_CHARACTERS = 256  # of a turn at most, role and special tokens


class Untokenizable(ValueError):
    """An example that cannot be tokenised for training; ``field`` says which part of it is at fault."""

    def __init__(self, reason: str, field: str = "completion"):
        super().__init__(reason)
        self.reason, self.field = reason, field


class TextSegment(NamedTuple):
    """A stretch of a conversation's text, to be tokenised by itself, then EOS where ``append_eos`` says so."""

    text: str
    supervised: bool
    append_eos: bool = False


def resolve_template(tokenizer: PreTrainedTokenizerBase, template: str) -> str | None:
    """The text of the chat template that a setting asks for, or None for the plain format.

    template: "auto" (the tokenizer's own where it has one, else plain), "chat", "plain", or the text of a Jinja
    template. Raises `UnusableTokenizer` where it is none of these, or "chat" and the tokenizer has no template.
    """
    if template == "plain" or (template == "auto" and not tokenizer.chat_template):
        return None
    if template in ("auto", "chat"):
        if not tokenizer.chat_template:
            raise UnusableTokenizer(
                "the tokenizer has no chat template: set tokenization.template to plain or a template's text"
            )
        return tokenizer.get_chat_template()
    if "{{" not in template and "{%" not in template:
        raise UnusableTokenizer(
            f"template is {excerpt_of(template)!r}: it must be auto, chat, plain, or a Jinja template's text"
        )
    return template


def plain_segments(messages: Sequence[Message], separator: str) -> list[TextSegment]:
    """The turns joined by the separator, each assistant turn ended by EOS; those that are not learned have no loss.

    Raises `Untokenizable` for tools, which this format has no place for.
    """
    segments: list[TextSegment] = []
    context = ""
    for index, message in enumerate(messages):
        if message.extra or message.role in ("tool", "tools"):
            what = ", ".join(json.loads(message.extra)) if message.extra else message.role
            raise Untokenizable(f"the plain format has no place for {what}; set tokenization.template", "messages")
        context += separator if index else ""
        if message.role == "assistant":
            segments += [TextSegment(context, False), TextSegment(message.content, message.learn, append_eos=True)]
            context = ""
        else:
            context += message.content
    return [segment for segment in segments if segment.text]


class ChatTemplate:
    """A Jinja chat template, and where the assistant's turns lie in what it renders.

    text: the template. special_tokens: a pattern that finds each special token of the tokenizer.
    """

    def __init__(self, tokenizer: PreTrainedTokenizerBase, text: str, special_tokens: re.Pattern[str]):
        self.tokenizer = tokenizer
        self._special_tokens = special_tokens
        names_the_day = "strftime_now" in text
        self._text = FIXED_DATE_MACRO * names_the_day + text

    @cached_property
    def knows_system(self) -> bool:
        """Whether the template writes a system turn."""
        return self._writes((_PROBE["system"], _PROBE["user"], PLACEHOLDER), "system")

    @cached_property
    def roles(self) -> tuple[str, ...]:
        """The roles whose turns the template writes, of system, user, assistant and tool."""
        call = {"type": "function", "function": {"name": "f", "arguments": {}}}
        called = Message("assistant", "", extra=json.dumps({"tool_calls": [call]}))
        tool = (_PROBE["user"], called, _PROBE["tool"]._replace(extra='{"name": "f"}'), PLACEHOLDER)
        found = {"system": self.knows_system, "user": True, "assistant": True, "tool": self._writes(tool, "tool")}
        return tuple(role for role, written in found.items() if written)

    def _writes(self, messages: Sequence[Message], role: str) -> bool:
        with contextlib.suppress(Untokenizable):
            return _PROBE[role].content in self._render(messages)
        return False

    def segments(self, messages: Sequence[Message]) -> list[TextSegment]:
        """The rendered conversation; the assistant's learned turns are supervised, with the special token that ends
        them.

        Where the template knows no system turn, its text leads the first user turn. A greeting that the template
        refuses is left out. Raises `Untokenizable` where the template raises an error for the conversation, leaves out
        the text of a turn, or cannot say where an answer begins or ends.
        """
        messages = self._with_system(tuple(messages))
        try:
            rendered = self._render(messages)
        except Untokenizable:
            messages, before = _without_greeting(messages), messages
            if messages == before:
                raise
            rendered = self._render(messages)
        learned = [index for index, message in enumerate(messages) if message.role == "assistant" and message.learn]
        opening = self._common_opening(rendered, messages, learned)
        segments: list[TextSegment] = []
        cursor = 0
        for index in learned:
            last = index == len(messages) - 1
            place = None if last or opening is None else self._quick_place(rendered, messages, index, cursor, opening)
            start, end, ended = place or self._place(rendered, messages, index, cursor)
            segments.append(TextSegment(rendered[cursor:start], False))
            segments.append(TextSegment(rendered[start:end], True, append_eos=last and not ended))
            cursor = end
        _require_texts(messages, "".join(segment.text for segment in segments if not segment.supervised))
        return [segment for segment in segments if segment.text]

    def _with_system(self, messages: tuple[Message, ...]) -> tuple[Message, ...]:
        """The conversation with its system turn in the first user turn, where the template knows no other place."""
        first = next((index for index, message in enumerate(messages) if message.role == "system"), None)
        if first is None or self.knows_system:
            return messages
        rest = list(messages[:first] + messages[first + 1 :])
        user = next((index for index, message in enumerate(rest) if message.role == "user"), None)
        text = messages[first].content.strip()
        if text and user is not None:
            rest[user] = rest[user]._replace(content=f"{text}\n\n{rest[user].content}")
        return tuple(rest)

    def _place(self, rendered: str, messages: Sequence[Message], index: int, cursor: int) -> tuple[int, int, bool]:
        """Where the turn at an index begins and ends in ``rendered``, and whether a token ends it."""
        last = index == len(messages) - 1
        message = messages[index]
        start = self._completion_start(rendered, messages[:index], cursor)
        extra = json.loads(message.extra) if message.extra else {}
        if "tool_calls" in extra:
            end, ended = self._calls_end(rendered, start, messages[: index + 1], last)
            _require_calls(extra["tool_calls"], message.content, rendered[start:end])
        else:
            end, ended = self._answer_end(rendered, start, messages, index)
        thoughts = extra.get("reasoning_content", "")
        if last and _squeezed(thoughts) not in _squeezed(rendered[start:end]):
            raise Untokenizable("the chat template leaves out its reasoning", f"messages[{index}].reasoning_content")
        return start, end, ended

    @cached_property
    def _usual_opening(self) -> str | None:
        """What stands between a user's words and the assistant's, where that is one text in the middle of a
        conversation."""
        names = [f"PlaceholderForTurn{number}End" for number in range(6)]
        messages = [Message(role, name) for role, name in zip(("user", "assistant") * 3, names, strict=True)]
        with contextlib.suppress(Untokenizable):
            rendered = self._render(messages)
            parts = [rendered.partition(names[at])[2].partition(names[at + 1]) for at in (0, 2)]
            if parts[0][:2] == (parts[1][0], names[1]) and parts[1][1]:
                return parts[0][0]
        return None

    def _common_opening(self, rendered: str, messages: Sequence[Message], learned: Sequence[int]) -> str | None:
        """The usual opening, where a conversation is long and has it; else None.

        Rendering the prompt of every turn costs the square of their number.
        """
        opening = self._usual_opening if len(learned) >= _MANY_TURNS else None
        if opening is None:
            return None
        for index in (learned[0], learned[-2]):
            start = self._completion_start(rendered, messages[:index], 0)
            if not rendered[:start].endswith(opening):
                return None
        return opening

    def _quick_place(
        self, rendered: str, messages: Sequence[Message], index: int, cursor: int, opening: str
    ) -> tuple[int, int, bool] | None:
        """As `_place`, where the turn follows the user's words as it does elsewhere; None where it does not."""
        message, words = messages[index], messages[index - 1].content.strip()
        if index > 1 and not (messages[index - 2].role == "assistant" and messages[index - 2].learn):
            return None  # the cursor stands before other turns, and they may have the same words
        if _THINKING_START.match(message.content):
            return None  # the prompt for generation may hold a part of it
        at = rendered.find(words + opening, cursor) if words and opening and not message.extra else -1
        # The first opening has to be the one: words with a space at their end may be those of a later turn without it.
        if at < 0 or at - cursor > _HEADER_CHARACTERS or rendered.find(opening, cursor) != at + len(words):
            return None
        start = at + len(words) + len(opening)
        special = self._special_after(rendered, start)
        if special is None or rendered[start : special.start()].strip() != message.content.strip():
            return None
        return start, special.end(), True

    def _calls_end(self, rendered: str, start: int, messages: Sequence[Message], last: bool) -> tuple[int, bool]:
        """Where a turn with calls of tools ends, which a template writes in words of its own."""
        stop = len(rendered) if last else self._turn_stop(rendered, start, messages)
        if not last and stop == len(rendered):
            raise Untokenizable("the chat template does not say where a turn with calls of tools ends", "messages")
        *_, special = [None, *self._special_tokens.finditer(rendered, start, stop)]
        if special is not None and not rendered[special.end() : stop].strip():
            return special.end(), True
        return start + len(rendered[start:stop].rstrip()), False

    def _completion_start(self, rendered: str, context: Sequence[Message], cursor: int) -> int:
        """Where the assistant's turn after ``context`` begins: after a prompt that ``rendered`` begins with."""
        for prompt in self._rendered_prompts(context):
            if len(prompt) >= cursor and rendered.startswith(prompt):
                return len(prompt)
        raise Untokenizable(
            "the chat template renders the prompt differently with its completion than without; set "
            "tokenization.template to plain, or to a template that only appends",
            "messages",
        )

    def _rendered_prompts(self, context: Sequence[Message]) -> Iterator[str]:
        """Prompts as the template may give them for generation, the preferred one first.

        Several, for templates that are not prefix-stable: Qwen3 drops the thinking block from all but the
        last turn; DeepSeek-R1 opens one for generation that is not in the rendered answer.
        """
        for arguments in (TEMPLATE_ARGUMENTS, TEMPLATE_ARGUMENTS | {"enable_thinking": True}):
            with contextlib.suppress(Untokenizable):  # an assistant turn first: no prompt to render
                yield self._render(context, add_generation_prompt=True, **arguments)
        before, found, _ = self._render([*context, PLACEHOLDER]).partition(PLACEHOLDER.content)
        if found:
            yield before.rstrip(" ")  # a space goes with the word that follows it

    def _turn_stop(self, rendered: str, start: int, messages: Sequence[Message]) -> int:
        """Where the turn at ``start``, the last of these messages, ends in ``rendered``; the end of it where the
        template cannot say."""
        so_far = self._render(messages)
        if rendered.startswith(so_far):
            return len(so_far)
        special = self._special_after(rendered, start)
        return special.end() if special else len(rendered)

    def _special_after(self, rendered: str, start: int) -> re.Match[str] | None:
        """The first special token from ``start`` on, if it is the one that ends a turn: others may stand within one."""
        special = self._special_tokens.search(rendered, start)
        return special if special and special[0] == self._end_of_turn else None

    @cached_property
    def _closing(self) -> str:
        """What the template writes after the words of the last answer."""
        return self._render((_PROBE["user"], PLACEHOLDER)).partition(PLACEHOLDER.content)[2]

    @cached_property
    def _end_of_turn(self) -> str | None:
        """The special token that stands right after the words of the last answer; None where there is none."""
        special = self._special_tokens.match(self._closing.lstrip())
        return special[0] if special else None

    def _answer_end(self, rendered: str, start: int, messages: Sequence[Message], index: int) -> tuple[int, bool]:
        """Where the supervised text of the turn at an index ends, and whether a token that ends the turn does."""
        last = index == len(messages) - 1
        words_end, stop = self._words_end(rendered, start, messages, index)
        _require_answer(messages[index].content.strip(), rendered[:start], rendered[start:words_end], last)
        special = self._special_tokens.search(rendered, words_end, stop)
        if special is not None:
            return special.end(), True
        return start + len(rendered[start:stop].rstrip()), False  # the template may end the turn in words

    def _words_end(self, rendered: str, start: int, messages: Sequence[Message], index: int) -> tuple[int, int]:
        """Where the words of the turn at an index end in ``rendered``, and where the turn does.

        While a turn is the last one, what the template writes after its words is known. Raises `Untokenizable`.
        """
        last = index == len(messages) - 1
        so_far = rendered if last else self._render(messages[: index + 1])
        words_end = len(so_far) - len(self._closing)
        if so_far.endswith(self._closing) and start <= words_end and rendered.startswith(so_far[:words_end]):
            if rendered.startswith(so_far):
                return words_end, len(so_far)
            # It ends in another way when it is not the last one.
            special = self._special_tokens.search(rendered, words_end)
            ended = special is not None and not rendered[words_end : special.start()].strip()
            return words_end, special.end() if special and ended else words_end
        special = self._special_after(rendered, start)  # as Qwen3's, with a thinking block while it is the last
        if special is None and self._end_of_turn and not last:
            special = self._end_by_words(rendered, start, messages[index].content, messages[index + 1].content)
        if special is None:
            raise Untokenizable("the chat template does not say where an assistant's turn ends", "messages")
        return special.start(), special.end()

    def _end_by_words(self, rendered: str, start: int, content: str, following: str) -> re.Match[str] | None:
        """The special token right after the words of a turn that has others before them, as gpt-oss' channels have;
        None where they are not found before what the next turn says."""
        found = None
        for special in self._special_tokens.finditer(rendered, start):
            text = rendered[start : special.start()].strip()
            if not following.strip() or following.strip() in text:
                break
            if text and text in (content.strip(), content.rpartition("</think>")[2].strip()):
                found = special
            start = special.end()
        return found

    def _render(self, messages: Sequence[Message], add_generation_prompt: bool = False, **arguments: Any) -> str:
        from jinja2 import TemplateError

        tools = [json.loads(message.content) for message in messages if message.role == "tools"]
        turns = [_turn_for_template(message) for message in messages if message.role != "tools"]
        try:
            rendered = self.tokenizer.apply_chat_template(
                turns,
                tools=tools[0] if tools else None,
                chat_template=self._text,
                tokenize=False,
                add_generation_prompt=add_generation_prompt,
                **(arguments or TEMPLATE_ARGUMENTS),
            )
        except (TemplateError, TypeError, ValueError, LookupError) as error:
            raise Untokenizable(f"the chat template refuses the conversation: {error}", "messages") from None
        for tool in tools[0] if tools else ():
            name = tool.get("function", tool).get("name", "")
            if str(name) not in cast("str", rendered):
                raise Untokenizable("the chat template leaves out the definitions of tools", "tools")
        return cast("str", rendered)  # text, as it is not tokenised


# -- what a template was given and what it wrote ------------------------------------------------------------------


def _turn_for_template(message: Message) -> dict[str, Any]:
    turn = message.as_turn()
    turn.pop("weight", None)
    if "reasoning_content" in turn:
        turn |= dict.fromkeys(_REASONING_NAMES, turn["reasoning_content"])
    return turn


def _without_greeting(messages: tuple[Message, ...]) -> tuple[Message, ...]:
    """The conversation without what the assistant says before the user does."""
    user = next((index for index, message in enumerate(messages) if message.role == "user"), 0)
    return tuple(message for index, message in enumerate(messages) if index >= user or message.role != "assistant")


def _require_texts(messages: Sequence[Message], written: str) -> None:
    """Raise Untokenizable where a template left out the text of a system, user or tool turn."""
    cursor = 0
    for index, message in enumerate(messages):
        text = message.content.strip()
        if message.role in ("assistant", "tools") or not text:
            continue
        at = written.find(text, cursor)
        if at >= 0:
            cursor = at + len(text)
        elif text not in written and _squeezed(text) not in _squeezed(written) and _escaped(text) not in written:
            raise Untokenizable(
                f"the chat template leaves out the text of a {message.role} turn; set tokenization.template to plain, "
                "or to a template that writes it",
                f"messages[{index}].content",
            )


def _require_answer(content: str, prompt: str, written: str, last: bool) -> None:
    """Raise Untokenizable where a template left out words of an answer.

    It may write other white space, and drop the thinking of earlier answers as long as something is left.
    """
    if content in written:
        return
    # The prompt for generation may end in an empty thinking block, or in the start of one.
    thinking = _EMPTY_THINKING.match(content)
    if not thinking and prompt.rstrip().endswith("<think>"):
        thinking = _THINKING_START.match(content)
    words = content[thinking.end() :] if thinking else content
    if not written.strip() or (last and _squeezed(words) not in _squeezed(written)):
        raise Untokenizable(
            "the chat template leaves out a part of it (a thinking block, perhaps); set "
            "tokenization.template to plain, or to a template that keeps it"
        )


def _require_calls(calls: Sequence[Mapping[str, Any]], content: str, written: str) -> None:
    """Raise Untokenizable where a template left out a call of a tool, a value of its arguments, or the words beside."""
    texts = [content, *(call["function"]["name"] for call in calls)]
    texts += [text for call in calls for text in _leaves(call["function"]["arguments"])]
    for text in texts:
        if text.strip() not in written and _escaped(text) not in written:
            raise Untokenizable("the chat template leaves out a part of a call of a tool", "messages")


def _leaves(value: Any) -> Iterator[str]:
    if isinstance(value, Mapping):
        for name, one in value.items():
            yield str(name)
            yield from _leaves(one)
    elif isinstance(value, (list, tuple)):
        for one in value:
            yield from _leaves(one)
    elif isinstance(value, str):
        yield value


def _escaped(text: str) -> str:
    """A text as JSON writes it within quotes."""
    return json.dumps(text, ensure_ascii=False)[1:-1]


def _squeezed(text: str) -> str:
    return "".join(text.split())
