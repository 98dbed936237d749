"""Conversations as text in segments, supervised and not: in the plain format, or cut out of a chat template's text.

The plain format joins the turns by a separator; a chat template renders the whole conversation, and the assistant's
turns are found in what it rendered.
"""

from __future__ import annotations

import contextlib
import re
from collections.abc import Iterator, Sequence
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


class _Piece(NamedTuple):
    """A rendered stretch without special tokens; its start, and the end of the special token after it, if any."""

    text: str
    start: int
    special_end: int | None


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
    """The turns joined by the separator, each assistant turn ended by EOS."""
    segments: list[TextSegment] = []
    context = ""
    for index, message in enumerate(messages):
        context += separator if index else ""
        if message.role == "assistant":
            segments += [TextSegment(context, False), TextSegment(message.content, True, append_eos=True)]
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

    def segments(self, messages: Sequence[Message]) -> list[TextSegment]:
        """The rendered conversation; assistant turns are supervised, with the special token that ends them.

        Raises `Untokenizable` where the template raises an error for the conversation, cannot say where a completion
        begins, or leaves out a part of the last one.
        """
        rendered = self._render(messages)
        segments: list[TextSegment] = []
        cursor = 0
        for index, message in enumerate(messages):
            if message.role != "assistant":
                continue
            last = index == len(messages) - 1
            start = self._completion_start(rendered, messages[:index], cursor)
            stop = len(rendered) if last else self._turn_stop(rendered, messages[: index + 1])
            end, ended = self._completion_end(rendered, start, stop, message.content, last)
            segments.append(TextSegment(rendered[cursor:start], False))
            segments.append(TextSegment(rendered[start:end], True, append_eos=last and not ended))
            cursor = end
        return [segment for segment in segments if segment.text]

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

    def _turn_stop(self, rendered: str, messages: Sequence[Message]) -> int:
        """Where these messages end in ``rendered``; the end of it where the template cannot say."""
        so_far = self._render(messages)
        return len(so_far) if rendered.startswith(so_far) else len(rendered)

    def _completion_end(self, rendered: str, start: int, stop: int, content: str, last: bool) -> tuple[int, bool]:
        """Where the supervised text ends, and whether that is after a token that ends the turn."""
        content = content.strip()
        pieces = list(self._pieces(rendered, start, stop))
        piece = (
            next((piece for piece in pieces if piece.text.strip() == content), None)
            or next((piece for piece in pieces if content in piece.text), None)
            or self._rewritten_piece(pieces, content, last)
        )
        if piece.special_end is not None:
            return piece.special_end, True
        end = piece.text.find(content) + len(content)
        if last and piece.text[end:].strip():  # the template ends the turn in words
            end = len(piece.text.rstrip())
        return piece.start + end, False

    def _rewritten_piece(self, pieces: list[_Piece], content: str, last: bool) -> _Piece:
        """The words of a turn whose content the template rewrote: it parses a thinking block, say.

        It may write other white space, and drop the thinking of earlier turns, but not of the completion.
        """
        ended = (piece for piece in pieces if piece.text.strip() and piece.special_end is not None)
        piece = next(ended, None)
        if piece is None or (last and "".join(content.split()) not in "".join(piece.text.split())):
            raise Untokenizable(
                "the chat template leaves out a part of it (a thinking block, perhaps); set "
                "tokenization.template to plain, or to a template that keeps it"
            )
        return piece

    def _pieces(self, rendered: str, start: int, stop: int) -> Iterator[_Piece]:
        for found in self._special_tokens.finditer(rendered, start, stop):
            yield _Piece(rendered[start : found.start()], start, found.end())
            start = found.end()
        yield _Piece(rendered[start:stop], start, None)

    def _render(self, messages: Sequence[Message], add_generation_prompt: bool = False, **arguments: Any) -> str:
        from jinja2 import TemplateError

        turns = [message._asdict() for message in messages]
        try:
            rendered = self.tokenizer.apply_chat_template(
                turns,
                chat_template=self._text,
                tokenize=False,
                add_generation_prompt=add_generation_prompt,
                **(arguments or TEMPLATE_ARGUMENTS),
            )
            return cast("str", rendered)  # text, as it is not tokenised
        except (TemplateError, TypeError, ValueError, LookupError) as error:
            raise Untokenizable(f"the chat template refuses the conversation: {error}", "messages") from None
