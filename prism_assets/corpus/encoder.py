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
from typing import TYPE_CHECKING, Literal, NamedTuple, cast

import numpy as np

from prism_assets.corpus.records import TEXT_ROLE, Message, excerpt_of
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
    """input_ids: int32 [T]; loss_mask: bool [T], True where the token is supervised, never at position 0; truncated:
    whether `max_length` cost it a part of its prompt."""

    input_ids: np.ndarray
    loss_mask: np.ndarray
    truncated: bool = False


class TokenizedPair(NamedTuple):
    """A `TokenizedExample` of the preferred completion, and beside it the one of the unwanted completion."""

    input_ids: np.ndarray
    loss_mask: np.ndarray
    rejected: TokenizedExample
    truncated: bool = False


_TAG = re.compile(r"</?[A-Za-z][\w-]*>")


class _Tokens(NamedTuple):
    ids: list[int]
    supervised: list[bool]


class Encoder:
    """Writes conversations as tokens, with one tokenizer and one template.

    template: "auto" (the tokenizer's chat template where it has one, else plain), "chat", "plain", or the
    text of a Jinja chat template. max_length: tokens of an example at most, prompt and completion together.
    ``stop_token_ids`` are the tokens that end a completion; ``leading_id`` is BOS, where the tokenizer
    writes it by itself. Raises `UnusableTokenizer` where the tokenizer has no EOS token, or the template does not
    render an exchange.
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
        text = resolve_template(tokenizer, template)
        special_tokens = _control_tokens(tokenizer, text or "")
        self._special_ids = set(cast("list[int]", tokenizer.convert_tokens_to_ids(sorted(special_tokens))))
        self._special_pattern = re.compile("|".join(map(re.escape, sorted(special_tokens, key=len, reverse=True))))
        self._template = None if text is None else ChatTemplate(tokenizer, text, self._special_pattern)
        self.leading_id = self._bos_added_by_default()
        self._leading_space = self._where_a_space_leads()
        self._before_text = self._tokens_at_the_end()
        self.stop_token_ids = self._stop_token_ids()

    @property
    def roles(self) -> tuple[str, ...]:
        """The roles whose turns are written, of system, user, assistant and tool."""
        return ("system", "user", "assistant") if self._template is None else self._template.roles

    @property
    def is_plain(self) -> bool:
        """Whether turns are joined by the separator, with no chat template."""
        return self._template is None

    def encode(self, messages: Sequence[Message]) -> TokenizedExample:
        """A conversation that ends in an assistant turn; assistant turns are supervised, their ends included.

        Where it has more than ``max_length`` tokens, the earliest exchanges go first, whole (the system turn
        stays); then the start of the longest user text. BOS, role headers and the system turn stay. Raises
        `Untokenizable` where what stays is too long or the completion tokenises to nothing, or where the template
        cannot say where an answer begins or ends. Of a text without a prompt see `_encode_text`.
        """
        return self._encode(messages, self.max_length)

    def encode_pair(self, messages: Sequence[Message], rejected: str) -> TokenizedPair:
        """A conversation and the same one with ``rejected`` as its completion, under one and the same prompt.

        Too long a prompt is cut for both by what the longer completion needs: else the margin between them
        would compare answers to different prompts.
        """
        chosen, second = self.encode_options(messages, [rejected], "rejected")
        return TokenizedPair(chosen.input_ids, chosen.loss_mask, second, chosen.truncated or second.truncated)

    def encode_options(
        self, messages: Sequence[Message], others: Sequence[str], field: str = "choices"
    ) -> list[TokenizedExample]:
        """A conversation, and the same one with each of `others` as its completion, all under one and the same prompt.

        Too long a prompt is cut for all by what the longest completion needs. Raises `Untokenizable`, for one of
        `others` naming `field`.
        """
        if _is_text(messages):
            raise Untokenizable("a text without a prompt has no other completion", field)
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
        if _is_text(messages):
            return len(self._text_ids(messages[0].content))
        self._require_no_special_tokens(messages)
        return len(self._tokens(messages).ids)

    def least_length(self, messages: Sequence[Message], rejected: str | None = None) -> int:
        """The smallest ``max_length`` under which `encode`, or with ``rejected`` `encode_pair`, takes a conversation:
        room for its last exchange's completions, its headers and system turn, and one token of each user text. Raises
        `Untokenizable` where none does.
        """
        if _is_text(messages):
            self._encode_text(messages[0].content)
            return 2
        turns = [tuple(messages)]
        if rejected is not None:
            turns.append((*messages[:-1], Message("assistant", rejected)))
        self._require_no_special_tokens([*messages, *(one[-1] for one in turns[1:])])
        last_turns, beside = [], []
        for one in turns:
            while (shorter := _without_earliest_exchange(one)) is not None:
                one = shorter
            tokens = self._tokens(one)
            if tokens.supervised[0]:
                raise Untokenizable("the prompt tokenises to nothing", "prompt")
            last_turns.append(last_run(tokens.supervised))
            # Of a pair, both prompts are cut by what the longer last turn leaves.
            removable = sum(map(len, self._removable(one, tokens)))
            beside.append(len(tokens.ids) - removable - last_turns[-1])
        return max(beside) + max(last_turns)

    def _encode(self, messages: Sequence[Message], limit: int) -> TokenizedExample:
        messages = tuple(messages)
        if _is_text(messages):
            return self._encode_text(messages[0].content)
        if not messages or messages[-1].role != "assistant":
            raise Untokenizable("the conversation does not end in an assistant turn", "messages")
        self._require_no_special_tokens(messages)
        tokens = self._tokens(messages)
        truncated = len(tokens.ids) > limit
        if truncated:
            messages, tokens = self._last_exchanges(messages, tokens, limit)
            tokens = self._cut_prompt(messages, tokens, limit)
        ids = np.asarray(tokens.ids, dtype=np.int32)
        loss_mask = np.asarray(tokens.supervised, dtype=bool)
        if loss_mask[0]:
            raise Untokenizable("the prompt tokenises to nothing", "prompt")
        return TokenizedExample(ids, loss_mask, truncated)

    def _encode_text(self, text: str) -> TokenizedExample:
        """A text without a prompt, as TRL reads it: BOS where the tokenizer writes one, EOS at its end, special tokens
        in it as what they are; all but the first token is supervised. What is beyond ``max_length`` is cut at the end.
        """
        ids = np.asarray(self._text_ids(text), dtype=np.int32)
        truncated = len(ids) > self.max_length
        ids = ids[: self.max_length]
        if len(ids) < 2:
            raise Untokenizable("the text tokenises to nothing", "text")
        return TokenizedExample(ids, np.arange(len(ids)) > 0, truncated)

    def _text_ids(self, text: str) -> list[int]:
        ids = self._token_ids(text)
        if self.leading_id is not None and ids[:1] != [self.leading_id]:
            ids = [self.leading_id, *ids]
        eos = cast("int", self.tokenizer.eos_token_id)
        return ids if ids[-1:] == [eos] else [*ids, eos]

    def _last_exchanges(
        self, messages: tuple[Message, ...], tokens: _Tokens, limit: int
    ) -> tuple[tuple[Message, ...], _Tokens]:
        """The most of a conversation's last exchanges that fit, or the last one alone; found by halves."""
        versions = [messages]
        while (shorter := _without_earliest_exchange(versions[-1])) is not None:
            versions.append(shorter)
        found = {0: tokens}
        low, high = 0, len(versions) - 1  # those up to low are too long
        while high - low > 1:
            middle = (low + high) // 2
            found[middle] = self._tokens(versions[middle])
            low, high = (middle, high) if len(found[middle].ids) > limit else (low, middle)
        return versions[high], found.get(high) or self._tokens(versions[high])

    def _cut_prompt(self, messages: Sequence[Message], tokens: _Tokens, limit: int) -> _Tokens:
        """The same without the first tokens of the longest user text, and of the next one where that is too little."""
        excess = len(tokens.ids) - limit
        if excess <= 0:
            return tokens
        completion = len(tokens.ids) - tokens.supervised.index(True)
        if completion > limit - 1:
            raise Untokenizable(self._too_long(completion, limit))
        gone: set[int] = set()
        for places in sorted(self._removable(messages, tokens), key=len, reverse=True):
            gone.update(places[: excess - len(gone)])
        if len(gone) < excess:
            kept = len(tokens.ids) - len(gone)
            raise Untokenizable(
                f"headers, system turn and completion have {kept} tokens with one of each user text, and max_length "
                f"{self.max_length} leaves room for {limit}; raise max_length",
                "prompt",
            )
        kept = [place for place in range(len(tokens.ids)) if place not in gone]
        return _Tokens([tokens.ids[place] for place in kept], [tokens.supervised[place] for place in kept])

    def _removable(self, messages: Sequence[Message], tokens: _Tokens) -> list[list[int]]:
        """For each text of the user (or a tool) before the first completion the positions of its tokens, but the last
        of them."""
        prompt = next(segment.text for segment in self.segments(messages))
        first = 1 if self._template is None and self.leading_id is not None else 0
        spans = _spans(prompt, messages)
        if not self.tokenizer.is_fast:
            return self._removable_by_parts(prompt, spans, first, tokens)
        found = self.tokenizer(prompt, add_special_tokens=False, return_offsets_mapping=True, verbose=False)
        offsets = cast("list[tuple[int, int]]", found["offset_mapping"])
        return [
            [first + place for place, (a, b) in enumerate(offsets) if start <= a < b <= stop][:-1]
            for start, stop in spans
        ]

    def _removable_by_parts(
        self, prompt: str, spans: Sequence[tuple[int, int]], first: int, tokens: _Tokens
    ) -> list[list[int]]:
        """As `_removable`, for a tokenizer that does not say which characters a token is of: only where the parts of
        the prompt have the tokens that the whole has."""
        found = []
        for start, stop in spans:
            before = len(self._token_ids(prompt[:start])) if start else 0
            inside = self._token_ids(prompt[start:stop], prompt[:start])
            places = range(first + before, first + before + len(inside))
            same = [tokens.ids[place] for place in places if place < len(tokens.ids)] == inside
            found.append(list(places)[:-1] if same else [])
        return found

    def _too_long(self, completion: int, limit: int) -> str:
        return (
            f"the completion alone has {completion} tokens, and max_length {self.max_length} leaves room for "
            f"{limit - 1}; shorten it or raise max_length"
        )

    # --- Segments to tokens -------------------------------------------------------------------------------

    def _tokens(self, messages: Sequence[Message]) -> _Tokens:
        ids: list[int] = []
        supervised: list[bool] = []
        if self._template is None and self.leading_id is not None:
            ids, supervised = [self.leading_id], [False]
        before = ""
        for segment in self.segments(messages):
            new = self._token_ids(segment.text, before)
            before = segment.text
            if segment.supervised and self._special_ids.issuperset(new):
                raise Untokenizable(f"tokenises to nothing the tokenizer knows: {excerpt_of(segment.text)!r}")
            if segment.append_eos:
                new = [*new, self.tokenizer.eos_token_id]
                before = cast("str", self.tokenizer.eos_token)
            ids += new
            supervised += [segment.supervised] * len(new)
        return _Tokens(ids, supervised)

    def segments(self, messages: Sequence[Message]) -> list[TextSegment]:
        """A conversation as text, supervised and not, each to be tokenised by itself. Raises `Untokenizable`."""
        if self._template is None:
            return plain_segments(messages, self.separator)
        return self._template.segments(messages)

    def _token_ids(self, text: str, before: str = "") -> list[int]:
        """The tokens of a text as it has them behind the text ``before``, that one's tokens left out.

        At the start of a text, or of what follows a special token, SentencePiece writes a space before the first word
        (its dummy prefix), and some special tokens take the white space after them (Phi's, by ``rstrip``). A segment
        begins elsewhere, so it is tokenised after something that stands for what is before it, and is then dropped.
        """
        anchor = self._anchor(before) if before else ""
        ids = self.tokenizer.encode(anchor + text, add_special_tokens=False, verbose=False)
        if not anchor:
            return ids
        dropped = self.tokenizer.encode(anchor, add_special_tokens=False, verbose=False)
        if ids[: len(dropped)] == dropped:
            return ids[len(dropped) :]
        return self.tokenizer.encode(text, add_special_tokens=False, verbose=False)

    def _anchor(self, before: str) -> str:
        """What a text is tokenised after, to be tokenised as it is after ``before``."""
        if self._before_text and (found := self._before_text.search(before)):
            return found[0]
        return {"nowhere": "", "first": cast("str", self.tokenizer.eos_token), "each": "\n"}[self._leading_space]

    def _where_a_space_leads(self) -> Literal["nowhere", "first", "each"]:
        """Where the tokenizer writes a space before a word: at the start of a text, or after special tokens too."""
        alone = self.tokenizer.encode("a", add_special_tokens=False)
        eos = cast("str", self.tokenizer.eos_token)
        if self._token_ids_after(eos) not in (None, alone):
            return "first"
        return "nowhere" if self._token_ids_after("\n") in (None, alone) else "each"

    def _token_ids_after(self, anchor: str) -> list[int] | None:
        """The tokens of "a" after an anchor, or None where they share a token."""
        before = self.tokenizer.encode(anchor, add_special_tokens=False)
        ids = self.tokenizer.encode(f"{anchor}a", add_special_tokens=False)
        return ids[len(before) :] if ids[: len(before)] == before else None

    def _tokens_at_the_end(self) -> re.Pattern[str] | None:
        """A pattern that finds, at the end of a text, an added token that shapes what follows it; None without any."""
        added = list(self.tokenizer.added_tokens_decoder.values())
        taking = [re.escape(token.content) + r"\s*" for token in added if token.rstrip]
        plain = [re.escape(token.content) for token in added if not token.rstrip]
        patterns = taking + (plain if self._leading_space == "each" else [])
        return re.compile(f"(?:{'|'.join(patterns)})\\Z") if patterns else None

    def _bos_added_by_default(self) -> int | None:
        bos = cast("int | None", self.tokenizer.bos_token_id)
        return bos if bos is not None and self.tokenizer.encode("a")[:1] == [bos] else None

    def _require_no_special_tokens(self, messages: Sequence[Message]) -> None:
        """Text such as "</s>" would become a control token, and end the turn or forge another one."""
        for index, message in enumerate(messages):
            found = self._special_pattern.search(message.content) or self._special_pattern.search(message.extra)
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


def _control_tokens(tokenizer: PreTrainedTokenizerBase, template: str) -> set[str]:
    """The special tokens that could forge a turn or its end: all but tags such as <filename> that are written like
    markup, have no part in the template and are none of the tokenizer's named ones."""
    added = {token.content for token in tokenizer.added_tokens_decoder.values() if token.special}
    named = set(tokenizer.all_special_tokens)
    return named | {token for token in added if token in template or not _TAG.fullmatch(token)}


def _is_text(messages: Sequence[Message]) -> bool:
    return len(messages) == 1 and messages[0].role == TEXT_ROLE


def _spans(prompt: str, messages: Sequence[Message]) -> list[tuple[int, int]]:
    """Where the texts of the user and of tools before the first assistant turn stand in a prompt."""
    spans, cursor = [], 0
    for message in messages:
        if message.role == "assistant" and message.learn:
            break
        text = message.content if message.content in prompt[cursor:] else message.content.strip()
        at = prompt.find(text, cursor)
        if message.role in ("user", "tool") and text and at >= 0:
            spans.append((at, at + len(text)))
            cursor = at + len(text)
    return spans


def _without_earliest_exchange(messages: tuple[Message, ...]) -> tuple[Message, ...] | None:
    """The conversation from its second user turn on, system turns kept; None where there is only one."""
    users = [index for index, message in enumerate(messages) if message.role == "user"]
    if len(users) < 2:
        return None
    system = tuple(message for message in messages[: users[0]] if message.role in ("system", "tools"))
    return system + messages[users[1] :]


def last_run(supervised: list[bool]) -> int:
    """Length of the run of True at the end."""
    return len(supervised) - max((i for i, value in enumerate(supervised) if not value), default=-1) - 1
