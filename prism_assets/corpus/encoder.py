"""Conversations as token ids with the training loss mask: the one place that formats examples.

A conversation is written as text in segments, supervised (the assistant's words and the token that ends its
turn) and not (all else), and each segment is tokenised by itself. So the tokens before a completion are the
same in training and when the prompt is given for generation, and no token straddles the boundary.

With a chat template, the segments are cut out of what the template renders (`template`); EOS is added at the
end where the template ends a turn with no special token. Without a template, the turns are joined
by the separator and each assistant turn is ended by the EOS token: ``prompt + separator + completion + EOS``,
with BOS in front where the tokenizer adds one by default.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from typing import TYPE_CHECKING, NamedTuple, cast

import numpy as np

from prism_assets.corpus.records import Message, excerpt_of
from prism_assets.corpus.template import (
    PLACEHOLDER,
    ChatTemplate,
    TextSegment,
    Untokenizable,
    plain_segments,
    resolve_template,
)
from prism_assets.errors import UnusableTokenizer

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase


class TokenizedExample(NamedTuple):
    """input_ids: int32 [T]; loss_mask: bool [T], True where the token is supervised, never at position 0."""

    input_ids: np.ndarray
    loss_mask: np.ndarray


class TokenizedPair(NamedTuple):
    """A `TokenizedExample` of the preferred completion, and beside it the one of the unwanted completion."""

    input_ids: np.ndarray
    loss_mask: np.ndarray
    rejected: TokenizedExample


class _Tokens(NamedTuple):
    ids: list[int]
    supervised: list[bool]


class Encoder:
    """Writes conversations as tokens, with one tokenizer and one template.

    template: "auto" (the tokenizer's chat template where it has one, else plain), "chat", "plain", or the
    text of a Jinja chat template. max_length: tokens of an example at most, prompt and completion together.
    ``stop_token_ids`` are the tokens that end a completion. Raises `UnusableTokenizer` where the tokenizer
    has no EOS token, or the template does not render an exchange.
    """

    def __init__(
        self,
        tokenizer: PreTrainedTokenizerBase,
        *,
        max_length: int,
        template: str = "auto",
        separator: str = "\n",
    ):
        if max_length < 2:
            raise ValueError(f"max_length is {max_length}; an example has two tokens at least")
        if tokenizer.eos_token_id is None:
            raise UnusableTokenizer(
                "the tokenizer has no EOS token, so a completion would have no end: set eos_token in its "
                "tokenizer_config.json"
            )
        self.tokenizer = tokenizer
        self.max_length = max_length
        self.separator = separator
        special_tokens = _special_tokens(tokenizer)
        self._special_ids = set(cast("list[int]", tokenizer.convert_tokens_to_ids(sorted(special_tokens))))
        self._special_pattern = re.compile("|".join(map(re.escape, sorted(special_tokens, key=len, reverse=True))))
        text = resolve_template(tokenizer, template)
        self._template = None if text is None else ChatTemplate(tokenizer, text, self._special_pattern)
        self._leading_id = self._bos_added_by_default()
        self._anchored = self._adds_a_leading_space()
        self.stop_token_ids = self._stop_token_ids()

    def encode(self, messages: Sequence[Message]) -> TokenizedExample:
        """A conversation that ends in an assistant turn; assistant turns are supervised, their ends included.

        Where it has more than ``max_length`` tokens, the earliest exchanges go first, whole (the system turn
        stays); then the start of the prompt, but for BOS. Raises `Untokenizable` where the last completion alone is
        too long or tokenises to nothing, or where the template cannot say where a completion begins.
        """
        return self._encode(messages, self.max_length)

    def encode_pair(self, messages: Sequence[Message], rejected: str) -> TokenizedPair:
        """A conversation and the same one with ``rejected`` as its completion, under one and the same prompt.

        Too long a prompt is cut for both by what the longer completion needs: else the margin between them
        would compare answers to different prompts.
        """
        chosen, second = self.encode_options(messages, [rejected], "rejected")
        return TokenizedPair(*chosen, second)

    def encode_options(
        self, messages: Sequence[Message], others: Sequence[str], field: str = "choices"
    ) -> list[TokenizedExample]:
        """A conversation, and the same one with each of `others` as its completion, all under one and the same prompt.

        Too long a prompt is cut for all by what the longest completion needs. Raises `Untokenizable`, for one of
        `others` naming `field`.
        """
        versions = [tuple(messages), *((*messages[:-1], Message("assistant", other)) for other in others)]
        self._require_no_special_tokens([*messages, *(turns[-1] for turns in versions[1:])])
        lengths = [last_run(self._tokens(turns).supervised) for turns in versions]
        longest = lengths.index(max(lengths))
        room = self.max_length - lengths[longest]
        if room < 1:
            raise Untokenizable(self._too_long(lengths[longest], self.max_length), field if longest else "completion")
        return [self._encode(turns, room + length) for turns, length in zip(versions, lengths, strict=True)]

    # --- Length -------------------------------------------------------------------------------------------

    def length(self, messages: Sequence[Message]) -> int:
        """Tokens of a conversation before anything of it is cut. Raises `Untokenizable`."""
        self._require_no_special_tokens(messages)
        return len(self._tokens(messages).ids)

    def least_length(self, messages: Sequence[Message], rejected: str | None = None) -> int:
        """The smallest ``max_length`` under which `encode`, or with ``rejected`` `encode_pair`, takes a conversation:
        room for its last exchange's completions and one token of its prompt. Raises `Untokenizable` where none does.
        """
        turns = [tuple(messages)]
        if rejected is not None:
            turns.append((*messages[:-1], Message("assistant", rejected)))
        self._require_no_special_tokens([*messages, *(one[-1] for one in turns[1:])])
        last_turns, beside = [], []
        for one in turns:
            while (shorter := _without_earliest_exchange(one)) is not None:
                one = shorter
            supervised = self._tokens(one).supervised
            if supervised[0]:
                raise Untokenizable("the prompt tokenises to nothing", "prompt")
            last_turns.append(last_run(supervised))
            # Of a pair, both prompts are cut by what the longer last turn leaves.
            beside.append(len(supervised) - supervised.index(True) - last_turns[-1])
        return max(beside) + max(last_turns) + 1

    def _encode(self, messages: Sequence[Message], limit: int) -> TokenizedExample:
        messages = tuple(messages)
        if not messages or messages[-1].role != "assistant":
            raise Untokenizable("the conversation does not end in an assistant turn", "messages")
        self._require_no_special_tokens(messages)
        tokens = self._tokens(messages)
        while len(tokens.ids) > limit:
            shorter = _without_earliest_exchange(messages)
            if shorter is None:
                tokens = self._cut_prompt(tokens, limit)
                break
            messages = shorter
            tokens = self._tokens(messages)
        ids = np.asarray(tokens.ids, dtype=np.int32)
        loss_mask = np.asarray(tokens.supervised, dtype=bool)
        if loss_mask[0]:
            raise Untokenizable("the prompt tokenises to nothing", "prompt")
        return TokenizedExample(ids, loss_mask)

    def _cut_prompt(self, tokens: _Tokens, limit: int) -> _Tokens:
        start = tokens.supervised.index(True)
        completion = len(tokens.ids) - start
        if completion > limit - 1:
            raise Untokenizable(self._too_long(completion, limit))
        prompt = self._cut_front(tokens.ids[:start], limit - completion)
        return _Tokens(prompt + tokens.ids[start:], [False] * len(prompt) + tokens.supervised[start:])

    def _too_long(self, completion: int, limit: int) -> str:
        return (
            f"the completion alone has {completion} tokens, and max_length {self.max_length} leaves room for "
            f"{limit - 1}; shorten it or raise max_length"
        )

    def _cut_front(self, ids: list[int], limit: int) -> list[int]:
        if len(ids) <= limit:
            return ids
        if ids[0] == self.tokenizer.bos_token_id:
            return ids[:1] + ids[len(ids) - limit + 1 :]
        return ids[len(ids) - limit :]

    # --- Segments to tokens -------------------------------------------------------------------------------

    def _tokens(self, messages: Sequence[Message]) -> _Tokens:
        ids: list[int] = []
        supervised: list[bool] = []
        if self._template is None and self._leading_id is not None:
            ids, supervised = [self._leading_id], [False]
        for index, segment in enumerate(self._segments(messages)):
            new = self._token_ids(segment.text, first=index == 0)
            if segment.supervised and self._special_ids.issuperset(new):
                raise Untokenizable(f"tokenises to nothing the tokenizer knows: {excerpt_of(segment.text)!r}")
            if segment.append_eos:
                new = [*new, self.tokenizer.eos_token_id]
            ids += new
            supervised += [segment.supervised] * len(new)
        return _Tokens(ids, supervised)

    def _segments(self, messages: Sequence[Message]) -> list[TextSegment]:
        if self._template is None:
            return plain_segments(messages, self.separator)
        return self._template.segments(messages)

    def _token_ids(self, text: str, first: bool) -> list[int]:
        if first or not self._anchored:
            return self.tokenizer.encode(text, add_special_tokens=False, verbose=False)
        after_eos = cast("str", self.tokenizer.eos_token) + text
        return self.tokenizer.encode(after_eos, add_special_tokens=False, verbose=False)[1:]

    def _adds_a_leading_space(self) -> bool:
        """Whether the tokenizer writes a space before the first word (SentencePiece's dummy prefix).

        Such a space would appear at the start of each segment, in the middle of the example. There, segments
        are tokenised after an EOS token, which is then dropped.
        """
        alone = self.tokenizer.encode("a", add_special_tokens=False)
        after_eos = self.tokenizer.encode(cast("str", self.tokenizer.eos_token) + "a", add_special_tokens=False)
        return after_eos[:1] == [self.tokenizer.eos_token_id] and after_eos[1:] != alone

    def _bos_added_by_default(self) -> int | None:
        bos = cast("int | None", self.tokenizer.bos_token_id)
        return bos if bos is not None and self.tokenizer.encode("a")[:1] == [bos] else None

    def _require_no_special_tokens(self, messages: Sequence[Message]) -> None:
        """Text such as "</s>" would become a control token, and end the turn or forge another one."""
        for index, message in enumerate(messages):
            found = self._special_pattern.search(message.content)
            if found:
                raise Untokenizable(
                    f"the text holds {found[0]!r}, a special token of the tokenizer; remove or rewrite it",
                    f"messages[{index}].content",
                )

    def _stop_token_ids(self) -> tuple[int, ...]:
        """EOS and, where the template ends the assistant's turn with another token, that one too."""
        eos = cast("int", self.tokenizer.eos_token_id)
        if self._template is None:
            return (eos,)
        try:
            last = self._tokens((Message("user", "a"), PLACEHOLDER)).ids[-1]
        except Untokenizable as error:
            raise UnusableTokenizer(
                f"the chat template cannot be used: {error.reason}; set tokenization.template to plain or "
                "to another template"
            ) from None
        return tuple(dict.fromkeys((eos, last)))


def _special_tokens(tokenizer: PreTrainedTokenizerBase) -> set[str]:
    added = {token.content for token in tokenizer.added_tokens_decoder.values() if token.special}
    return added | set(tokenizer.all_special_tokens)


def _without_earliest_exchange(messages: tuple[Message, ...]) -> tuple[Message, ...] | None:
    """The conversation from its second user turn on, system turns kept; None where there is only one."""
    users = [index for index, message in enumerate(messages) if message.role == "user"]
    if len(users) < 2:
        return None
    system = tuple(message for message in messages[: users[0]] if message.role == "system")
    return system + messages[users[1] :]


def last_run(supervised: list[bool]) -> int:
    """Length of the run of True at the end."""
    return len(supervised) - max((i for i, value in enumerate(supervised) if not value), default=-1) - 1
