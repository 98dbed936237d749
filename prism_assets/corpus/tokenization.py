"""Conversations as token ids with the training loss mask: the one place that formats examples.

A conversation is written as text in segments, supervised (the assistant's words and the token that ends its
turn) and not (all else), and each segment is tokenised by itself. So the tokens before a completion are the
same in training and when the prompt is given for generation, and no token straddles the boundary.

With a chat template, the segments are cut out of what the template renders; EOS is added at the end where the
template ends a turn with no special token. Without a template, the turns are joined
by the separator and each assistant turn is ended by the EOS token: ``prompt + separator + completion + EOS``,
with BOS in front where the tokenizer adds one by default.
"""

from __future__ import annotations

import contextlib
import re
from collections.abc import Callable, Iterator, Sequence
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np
import pyarrow as pa

from prism_assets.corpus.examples import Example, Message, Reject, messages_to_json, shorten

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
_FIXED_DATE_MACRO = (
    "{% macro strftime_now(format) %}{{ format"
    + "".join(f" | replace('%{directive}', '{value}')" for directive, value in TEMPLATE_DATE.items())
    + " }}{% endmacro %}{{ '' }}"
)
# Templates of models that can reason aloud open the answer with an empty thinking block; others ignore this.
TEMPLATE_ARGUMENTS = {"enable_thinking": False, "date_string": "26 Jul 2024"}
# Stands for the completion where only the prompt is known.
PLACEHOLDER = Message("assistant", "PlaceholderForTheCompletion")

_TOKEN_FIELDS = [("input_ids", pa.list_(pa.int32())), ("loss_mask", pa.list_(pa.bool_()))]
CANDIDATE_SCHEMA = pa.schema(
    [
        ("id", pa.string()),
        ("line", pa.int64()),
        ("record_id", pa.string()),
        ("source", pa.string()),
        ("prompt", pa.string()),
        ("completion", pa.string()),
        ("messages", pa.string()),
        ("rejected", pa.string()),
        ("group", pa.string()),
        ("answers", pa.list_(pa.string())),
        *_TOKEN_FIELDS,
        ("tokens", pa.int32()),
        ("completion_tokens", pa.int32()),
    ]
)
# conversation_id is the id that a candidate of equal content has: the id of a pair covers ``rejected`` too.
TARGET_SCHEMA = pa.schema(
    [
        *CANDIDATE_SCHEMA,
        ("conversation_id", pa.string()),
        *[(f"rejected_{name}", kind) for name, kind in _TOKEN_FIELDS],
    ]
)
REJECTS_SCHEMA = pa.schema(
    [("line", pa.int64()), ("field", pa.string()), ("reason", pa.string()), ("excerpt", pa.string())]
)


class TokenizedExample(NamedTuple):
    """input_ids: int32 [T]; loss_mask: bool [T], True where the token is supervised, never at position 0."""

    input_ids: np.ndarray
    loss_mask: np.ndarray


class TokenizedPair(NamedTuple):
    """A `TokenizedExample` of the preferred completion, and beside it the one of the rejected completion."""

    input_ids: np.ndarray
    loss_mask: np.ndarray
    rejected: TokenizedExample


class Refused(ValueError):
    """An example that cannot be tokenised for training; ``field`` says which part of it is at fault."""

    def __init__(self, reason: str, field: str = "completion"):
        super().__init__(reason)
        self.reason, self.field = reason, field


class UnusableTokenizer(ValueError):
    """A tokenizer or chat template that cannot write training examples; the message gives advice."""


class _Segment(NamedTuple):
    text: str
    supervised: bool
    append_eos: bool = False


class _Piece(NamedTuple):
    """A rendered stretch without special tokens; its start, and the end of the one behind it, if any."""

    text: str
    start: int
    special_end: int | None


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
        self.chat_template = _resolve_template(tokenizer, template)
        names_the_day = "strftime_now" in (self.chat_template or "")
        self._rendered_template = _FIXED_DATE_MACRO * names_the_day + (self.chat_template or "")
        self._special_tokens = _special_tokens(tokenizer)
        self._special_ids = set(tokenizer.convert_tokens_to_ids(sorted(self._special_tokens)))
        alternatives = sorted(self._special_tokens, key=len, reverse=True)
        self._special_pattern = re.compile("|".join(map(re.escape, alternatives)))
        self._leading_id = self._bos_added_by_default()
        self._anchored = self._adds_a_leading_space()
        self.stop_token_ids = self._stop_token_ids()

    def encode(self, messages: Sequence[Message]) -> TokenizedExample:
        """A conversation that ends in an assistant turn; assistant turns are supervised, their ends included.

        Where it has more than ``max_length`` tokens, the earliest exchanges go first, whole (the system turn
        stays); then the start of the prompt, but for BOS. Raises `Refused` where the last completion alone is
        too long or tokenises to nothing, or where the template cannot say where a completion begins.
        """
        return self._encode(messages, self.max_length)

    def encode_pair(self, messages: Sequence[Message], rejected: str) -> TokenizedPair:
        """A conversation and the same one with ``rejected`` as its completion, under one and the same prompt.

        Too long a prompt is cut for both by what the longer completion needs: else the margin between them
        would compare answers to different prompts.
        """
        other = (*messages[:-1], Message("assistant", rejected))
        self._refuse_special_tokens([*messages, other[-1]])
        lengths = [_last_run(self._tokens(turns).supervised) for turns in (messages, other)]
        room = self.max_length - max(lengths)
        if room < 1:
            longer = ("completion", "rejected")[lengths[1] > lengths[0]]
            raise Refused(self._too_long(max(lengths), self.max_length), longer)
        chosen, second = (
            self._encode(turns, room + length)
            for turns, length in zip((messages, other), lengths, strict=True)
        )
        return TokenizedPair(*chosen, second)

    def encode_prompt(self, messages: Sequence[Message], reserve: int = 1) -> np.ndarray:
        """int32 [T]: the tokens that precede the completion of such a prompt in `encode`, for generation.

        At most ``max_length - reserve``, cut as `encode` cuts before a completion of ``reserve`` tokens.
        """
        messages = tuple(messages)
        self._refuse_special_tokens(messages)
        limit = self.max_length - reserve
        if limit < 1:
            raise ValueError(f"reserve {reserve} leaves no room for a prompt in max_length {self.max_length}")
        while True:
            ids = self._tokens((*messages, PLACEHOLDER), prompt_only=True).ids
            if len(ids) <= limit:
                break
            shorter = _without_earliest_exchange(messages)
            if shorter is None:
                ids = self._cut_front(ids, limit)
                break
            messages = shorter
        if not ids:
            raise Refused("the prompt tokenises to nothing", "prompt")
        return np.asarray(ids, dtype=np.int32)

    def fingerprint_settings(self) -> dict[str, Any]:
        """What decides the tokens beside the tokenizer itself, for the fingerprint of what is tokenised."""
        settings = {"max_length": self.max_length, "template": self.chat_template}
        if self.chat_template is None:
            return settings | {"separator": self.separator}
        return settings | {"arguments": TEMPLATE_ARGUMENTS}

    # --- Length -------------------------------------------------------------------------------------------

    def _encode(self, messages: Sequence[Message], limit: int) -> TokenizedExample:
        messages = tuple(messages)
        if not messages or messages[-1].role != "assistant":
            raise Refused("the conversation does not end in an assistant turn", "messages")
        self._refuse_special_tokens(messages)
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
            raise Refused("the prompt tokenises to nothing", "prompt")
        return TokenizedExample(ids, loss_mask)

    def _cut_prompt(self, tokens: _Tokens, limit: int) -> _Tokens:
        start = tokens.supervised.index(True)
        completion = len(tokens.ids) - start
        if completion > limit - 1:
            raise Refused(self._too_long(completion, limit))
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

    def _tokens(self, messages: Sequence[Message], prompt_only: bool = False) -> _Tokens:
        to_segments = self._plain_segments if self.chat_template is None else self._chat_segments
        segments = to_segments(messages)
        if prompt_only:
            segments = segments[:-1]
        ids: list[int] = []
        supervised: list[bool] = []
        if self.chat_template is None and self._leading_id is not None:
            ids, supervised = [self._leading_id], [False]
        for index, segment in enumerate(segments):
            new = self._token_ids(segment.text, first=index == 0)
            if segment.supervised and self._special_ids.issuperset(new):
                raise Refused(f"tokenises to nothing the tokenizer knows: {shorten(segment.text)!r}")
            if segment.append_eos:
                new = [*new, self.tokenizer.eos_token_id]
            ids += new
            supervised += [segment.supervised] * len(new)
        return _Tokens(ids, supervised)

    def _token_ids(self, text: str, first: bool) -> list[int]:
        if first or not self._anchored:
            return self.tokenizer.encode(text, add_special_tokens=False, verbose=False)
        return self.tokenizer.encode(self.tokenizer.eos_token + text, add_special_tokens=False, verbose=False)[1:]

    def _adds_a_leading_space(self) -> bool:
        """Whether the tokenizer writes a space before the first word (SentencePiece's dummy prefix).

        Such a space would appear at the start of each segment, in the middle of the example. There, segments
        are tokenised behind an EOS token, which is then dropped.
        """
        alone = self.tokenizer.encode("a", add_special_tokens=False)
        behind = self.tokenizer.encode(self.tokenizer.eos_token + "a", add_special_tokens=False)
        return behind[:1] == [self.tokenizer.eos_token_id] and behind[1:] != alone

    def _bos_added_by_default(self) -> int | None:
        bos = self.tokenizer.bos_token_id
        return bos if bos is not None and self.tokenizer.encode("a")[:1] == [bos] else None

    def _refuse_special_tokens(self, messages: Sequence[Message]) -> None:
        """Text such as "</s>" would become a control token, and end the turn or forge another one."""
        for index, message in enumerate(messages):
            found = self._special_pattern.search(message.content)
            if found:
                raise Refused(
                    f"the text holds {found[0]!r}, a special token of the tokenizer; remove or rewrite it",
                    f"messages[{index}].content",
                )

    # --- Plain format -------------------------------------------------------------------------------------

    def _plain_segments(self, messages: Sequence[Message]) -> list[_Segment]:
        segments: list[_Segment] = []
        context = ""
        for index, message in enumerate(messages):
            context += self.separator if index else ""
            if message.role == "assistant":
                segments += [_Segment(context, False), _Segment(message.content, True, append_eos=True)]
                context = ""
            else:
                context += message.content
        return [segment for segment in segments if segment.text]

    # --- Chat templates -----------------------------------------------------------------------------------

    def _chat_segments(self, messages: Sequence[Message]) -> list[_Segment]:
        rendered = self._render(messages)
        segments: list[_Segment] = []
        cursor = 0
        for index, message in enumerate(messages):
            if message.role != "assistant":
                continue
            last = index == len(messages) - 1
            start = self._completion_start(rendered, messages[:index], cursor)
            stop = len(rendered) if last else self._turn_stop(rendered, messages[: index + 1])
            end, ended = self._completion_end(rendered, start, stop, message.content, last)
            segments.append(_Segment(rendered[cursor:start], False))
            segments.append(_Segment(rendered[start:end], True, append_eos=last and not ended))
            cursor = end
        return [segment for segment in segments if segment.text]

    def _completion_start(self, rendered: str, context: Sequence[Message], cursor: int) -> int:
        """Where the assistant's turn after ``context`` begins: behind a prompt that ``rendered`` has."""
        for prompt in self._rendered_prompts(context):
            if len(prompt) >= cursor and rendered.startswith(prompt):
                return len(prompt)
        raise Refused(
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
            with contextlib.suppress(Refused):  # an assistant turn first: no prompt to render
                yield self._render(context, add_generation_prompt=True, **arguments)
        before, found, _ = self._render([*context, PLACEHOLDER]).partition(PLACEHOLDER.content)
        if found:
            yield before.rstrip(" ")  # a space goes with the word that follows it

    def _turn_stop(self, rendered: str, messages: Sequence[Message]) -> int:
        """Where these messages end in ``rendered``; the end of it where the template cannot say."""
        so_far = self._render(messages)
        return len(so_far) if rendered.startswith(so_far) else len(rendered)

    def _completion_end(
        self, rendered: str, start: int, stop: int, content: str, last: bool
    ) -> tuple[int, bool]:
        """Where the supervised text ends, and whether that is behind a token that ends the turn."""
        content = content.strip()
        pieces = list(self._pieces(rendered, start, stop))
        piece = (
            next((piece for piece in pieces if piece.text.strip() == content), None)
            or next((piece for piece in pieces if content in piece.text), None)
            or self._rewritten_piece(pieces, content, last)
        )
        if piece.special_end is not None:
            return piece.special_end, True
        behind = piece.text.find(content) + len(content)
        if last and piece.text[behind:].strip():  # the template ends the turn in words
            behind = len(piece.text.rstrip())
        return piece.start + behind, False

    def _rewritten_piece(self, pieces: list[_Piece], content: str, last: bool) -> _Piece:
        """The words of a turn whose content the template rewrote: it parses a thinking block, say.

        It may spend other white space, and drop the thinking of earlier turns, but not of the completion.
        """
        ended = (piece for piece in pieces if piece.text.strip() and piece.special_end is not None)
        piece = next(ended, None)
        if piece is None or (last and "".join(content.split()) not in "".join(piece.text.split())):
            raise Refused(
                "the chat template leaves out a part of it (a thinking block, perhaps); set "
                "tokenization.template to plain, or to a template that keeps it"
            )
        return piece

    def _pieces(self, rendered: str, start: int, stop: int) -> Iterator[_Piece]:
        for found in self._special_pattern.finditer(rendered, start, stop):
            yield _Piece(rendered[start : found.start()], start, found.end())
            start = found.end()
        yield _Piece(rendered[start:stop], start, None)

    def _render(
        self, messages: Sequence[Message], add_generation_prompt: bool = False, **arguments: Any
    ) -> str:
        from jinja2 import TemplateError

        turns = [message._asdict() for message in messages]
        try:
            return self.tokenizer.apply_chat_template(
                turns,
                chat_template=self._rendered_template,
                tokenize=False,
                add_generation_prompt=add_generation_prompt,
                **(arguments or TEMPLATE_ARGUMENTS),
            )
        except (TemplateError, TypeError, ValueError, LookupError) as error:
            raise Refused(f"the chat template refuses the conversation: {error}", "messages") from None

    def _stop_token_ids(self) -> tuple[int, ...]:
        """EOS and, where the template ends the assistant's turn with another token, that one too."""
        eos = self.tokenizer.eos_token_id
        if self.chat_template is None:
            return (eos,)
        try:
            last = self._tokens((Message("user", "a"), PLACEHOLDER)).ids[-1]
        except Refused as refused:
            raise UnusableTokenizer(
                f"the chat template cannot be used: {refused.reason}; set tokenization.template to plain or "
                "to another template"
            ) from None
        return tuple(dict.fromkeys((eos, last)))


def _resolve_template(tokenizer: PreTrainedTokenizerBase, template: str) -> str | None:
    """The text of the chat template, or None for the plain format."""
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
            f"template is {shorten(template)!r}: it must be auto, chat, plain, or a Jinja template's text"
        )
    return template


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


def _last_run(supervised: list[bool]) -> int:
    """Length of the run of True at the end."""
    return len(supervised) - max((i for i, value in enumerate(supervised) if not value), default=-1) - 1


def completion_tokens(example: TokenizedExample | TokenizedPair) -> int:
    """Number of supervised tokens, EOS included."""
    return int(np.count_nonzero(example.loss_mask))


def prompt_tokens(example: TokenizedExample | TokenizedPair) -> np.ndarray:
    """int32 [T]: the tokens before the last completion, as a prompt for generation."""
    supervised = example.loss_mask.tolist()
    return example.input_ids[: len(supervised) - _last_run(supervised)]


def encode_all(
    examples: Sequence[Example], encoder: Encoder, progress: Callable[[int, int], None] | None = None
) -> tuple[list[TokenizedExample | TokenizedPair | None], list[Reject]]:
    """Tokenises each example; a refused one is None in the list and a reject. Pairs become `TokenizedPair`.

    progress is called with (done, total) after each example.
    """
    tokenized: list[TokenizedExample | TokenizedPair | None] = []
    rejects: list[Reject] = []
    for done, example in enumerate(examples, start=1):
        try:
            if example.rejected is None:
                tokenized.append(encoder.encode(example.messages))
            else:
                tokenized.append(encoder.encode_pair(example.messages, example.rejected))
        except Refused as refused:
            tokenized.append(None)
            rejects.append(Reject(example.line, refused.field, refused.reason, shorten(example.prompt_text)))
        if progress:
            progress(done, len(examples))
    return tokenized, rejects


def to_table(
    examples: Sequence[Example],
    tokenized: Sequence[TokenizedExample | TokenizedPair | None],
    schema: pa.Schema | None = None,
) -> pa.Table:
    """A row for each example that was tokenised (None is left out: it is among the rejects).

    schema: `TARGET_SCHEMA` where there are pairs, else `CANDIDATE_SCHEMA`, unless given.
    """
    rows = zip(examples, tokenized, strict=True)
    kept = [(example, tokens) for example, tokens in rows if tokens is not None]
    if schema is None:
        has_pairs = any(isinstance(tokens, TokenizedPair) for _, tokens in kept)
        schema = TARGET_SCHEMA if has_pairs else CANDIDATE_SCHEMA
    return pa.Table.from_pylist([_row(example, tokens) for example, tokens in kept], schema=schema)


def _row(example: Example, tokens: TokenizedExample | TokenizedPair) -> dict[str, Any]:
    row = {
        "id": example.id,
        "line": example.line,
        "record_id": example.record_id,
        "source": example.source,
        "prompt": example.prompt_text,
        "completion": example.completion_text,
        "messages": messages_to_json(example.messages),
        "rejected": example.rejected,
        "group": example.group,
        "answers": example.answers,
        "input_ids": tokens.input_ids,
        "loss_mask": tokens.loss_mask,
        "tokens": len(tokens.input_ids),
        "completion_tokens": completion_tokens(tokens),
        "conversation_id": example.conversation_id,
    }
    if isinstance(tokens, TokenizedPair):
        row["rejected_input_ids"], row["rejected_loss_mask"] = tokens.rejected
    return row


def from_table(table: pa.Table) -> list[TokenizedExample]:
    """The tokens of each row, from the columns input_ids and loss_mask."""
    return _examples(table, "input_ids", "loss_mask")


def rejected_from_table(table: pa.Table) -> list[TokenizedExample]:
    """The rejected completion's tokens of each row; ValueError where a row is a plain target."""
    if "rejected_input_ids" not in table.column_names or table["rejected_input_ids"].null_count:
        raise ValueError("these are plain targets: they have no rejected completions")
    return _examples(table, "rejected_input_ids", "rejected_loss_mask")


def _examples(table: pa.Table, ids_column: str, mask_column: str) -> list[TokenizedExample]:
    ids, masks = _arrays(table[ids_column], np.int32), _arrays(table[mask_column], bool)
    return [TokenizedExample(*tokens) for tokens in zip(ids, masks, strict=True)]


def _arrays(column: pa.ChunkedArray, dtype: type) -> list[np.ndarray]:
    """A list column as one array a row, without a Python object for each token."""
    arrays: list[np.ndarray] = []
    for chunk in column.chunks:
        values = chunk.flatten().to_numpy(zero_copy_only=False).astype(dtype, copy=False)
        ends = np.cumsum(chunk.value_lengths().to_numpy(zero_copy_only=False))[:-1]
        arrays += np.split(values, ends) if len(chunk) else []
    return arrays
