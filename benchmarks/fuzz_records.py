"""Records for `fuzz`: written from a grammar, most of them wrong in one place, each with what must become of it.

What must become of a record is known from how it was made, without the reader: a conversation is drawn first and
written in one of the layouts, so its turns are known; then at most one thing is done to it (`CHANGES`), of which
docs/formats.md says what it means.
"""

from __future__ import annotations

import json
import random
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from typing import Any, Literal, NamedTuple

Verdict = Literal["good", "bad", "either"]

# Texts are drawn from these: alphabets, quotes, delimiters, line ends, what other formats give a meaning.
WORDS = (
    *("add", "two", "words,", 'a "quoted" one', "it's", "tab\there", "line\nbreak", "break\r\nof Windows"),
    *("back\\slash", "naïve", "Größe", "текст", "漢字かな", "שלום", "مرحبا", "🙂👩\u200d👧", "e\u0301", "\u2028"),
    *("\u00a0", "\u202e", "\ufeff", "\u200b", "\x1b[31m", "\x7f", "{", "[1, 2]", "NaN", "null", "-0", "1e999"),
    *("#", "'", "`", "|", ";", "</div>", "%s", "{{ x }}"),
)
SPACES = ("", " ", "\n", "\t \n", "\u2003", "\u00a0", "\r\n")
NOT_TEXT: tuple[Any, ...] = (0, 5, -1.5, True, False, {}, {"a": 1}, [], [1], ["a"], [[]], [None])
NOT_TURNS: tuple[Any, ...] = (5, True, {}, {"role": "user"}, [], [1], ["a"], [[]], [None], "hello", "[1, 2", "[]")
ODD_ROLES: tuple[Any, ...] = ("User", "bot", "", " ", "assistant ", "ASSISTANT", "tools", None, 5, True, [], {})
ODD_ROLES += ("\ud800",)
ANYTHING: tuple[Any, ...] = (
    *(None, 0, -1, 1.5, 1e308, True, "", "x", [], {}, [1, "a", None], {"a": {"b": [1, {"c": None}]}}, "2024-01-01"),
    *(float("nan"), float("inf"), -float("inf"), "\ud800", {"\udfff": "\ud800"}, "a" * 3000, 2**70, [[[[[[]]]]]]),
)
ODD_NAMES = ("", " ", "\x00", "a" * 3000, "prompt\u200b", "Prompt ", "fields", "line", "\ud800", "__class__", "a.b")


class Raw:
    """JSON text that is written as it stands."""

    def __init__(self, text: str) -> None:
        self.text = text


def to_json(value: Any, spaced: bool = False, ascii_only: bool = True) -> str:
    """The JSON text of a value, numbers that are not finite and `Raw` included."""
    comma, colon = (", ", ": ") if spaced else (",", ":")
    if isinstance(value, Raw):
        return value.text
    if isinstance(value, dict):
        pairs = (f"{to_json(name)}{colon}{to_json(one, spaced, ascii_only)}" for name, one in value.items())
        return "{" + comma.join(pairs) + "}"
    if isinstance(value, list):
        return "[" + comma.join(to_json(one, spaced, ascii_only) for one in value) + "]"
    if isinstance(value, str) and not is_unicode(value):
        return json.dumps(value)
    return json.dumps(value, ensure_ascii=ascii_only)


class Turn(NamedTuple):
    """A turn as it must come out; of the definitions of tools the text is left out."""

    role: str
    text: str
    learned: bool = True


@dataclass(frozen=True)
class Given:
    """A record and what must become of it: "good" is an example with these turns, "bad" a reject, "either" one of both.

    value: what is written: an object, or `Raw` for what is none. what: what was done to it. inside: texts that the
    example holds apart from its turns' contents (thoughts, calls). in_table: the verdict where a typed table holds it.
    """

    value: Any
    what: str
    verdict: Verdict
    turns: tuple[Turn, ...] = ()
    rejected: str | None = None
    inside: tuple[str, ...] = ()
    in_table: Verdict | None = None


@dataclass
class Draft:
    """A good record that is to be changed in one place."""

    value: dict[str, Any]
    turns: list[Turn]
    needed: tuple[str, ...]  # fields without which it is no record
    arrays: tuple[str, ...] = ()  # those of them that are arrays of turns
    written: list[dict[str, Any]] = field(default_factory=list)  # the turns in them, beside `turns`
    rejected: str | None = None
    what: str = "as it should be"
    inside: tuple[str, ...] = ()

    def good(self, **changes: Any) -> Given:
        """The record, which must become an example with its turns."""
        turns = learned_part(self.turns)
        if turns is None:
            return self.bad()
        return replace(Given(self.value, self.what, "good", turns, self.rejected, self.inside), **changes)

    def bad(self, **changes: Any) -> Given:
        """The record, which must become a reject."""
        return replace(Given(self.value, self.what, "bad"), **changes)

    def either(self) -> Given:
        """The record, of which only is asked that it is counted."""
        return Given(self.value, self.what, "either")


def learned_part(turns: list[Turn]) -> tuple[Turn, ...] | None:
    """What is kept of a conversation: up to the last assistant turn that is learned, greetings not learned; None where
    nothing is learned."""
    if [turn.role for turn in turns] == ["text"]:
        return tuple(turns)
    kept, last, asked = [], None, False
    for index, turn in enumerate(turns):
        asked = asked or turn.role == "user"
        learned = turn.learned and (turn.role != "assistant" or asked)
        kept.append(turn._replace(learned=learned))
        if turn.role == "assistant" and learned:
            last = index
    return None if last is None else tuple(kept[: last + 1])


class Grammar:
    """Draws the records of one file.

    kind: what they are for. pairs: whether the file holds pairs of a wanted and an unwanted completion. exchanges:
    whether all have the layout of a prompt and a completion. first: the number of the first text, so that two grammars
    share none.
    """

    def __init__(
        self, rng: random.Random, kind: str, pairs: bool = False, exchanges: bool = False, first: int = 0
    ) -> None:
        self.rng, self.kind = rng, kind
        self._layouts = (_exchange,) if exchanges else _PAIRS if pairs else _PLAIN
        self._texts = first

    def text(self, most: int = 6) -> str:
        """A text unlike all others of the file."""
        self._texts += 1
        words = [self.rng.choice(WORDS) for _ in range(self.rng.randint(0, most))]
        words.insert(self.rng.randint(0, len(words)), f"no. {self._texts}")
        return " ".join(words)

    def record(self, share_good: float = 0.35) -> Given:
        """A record, changed in one place but for a share of them."""
        draft = self.draft()
        found = None
        if self.rng.random() >= share_good:
            made = self.rng.choice(CHANGES)
            draft.what = made.__name__
            found = made(self, draft)
        if found is None:  # nothing is changed, or the change does not go with this layout
            draft.what = "as it should be"
            found = draft.good()
        if self.kind == "candidate" and {"unsafe", "chosen"} & set(draft.needed):
            return replace(found, verdict="bad", in_table=None)  # for targets alone
        return found

    def draft(self) -> Draft:
        """A good record in one of the layouts; a pair's of candidates is none."""
        return self.rng.choice(self._layouts)(self)

    def conversation(self) -> list[Turn]:
        """Turns in their usual order."""
        turns = [Turn("system", self.text())] if self.rng.random() < 0.3 else []
        for _ in range(self.rng.choice((1, 1, 1, 2, 3))):
            turns += [Turn("user", self.text()), Turn("assistant", self.text())]
        return turns

    def written(self, turns: list[Turn], sharegpt: bool) -> list[dict[str, Any]]:
        """Turns as one of the two styles writes them."""
        if sharegpt:
            names = {"user": "human", "assistant": "gpt"}
            return [{"from": names.get(turn.role, turn.role), "value": turn.text} for turn in turns]
        return [{"role": turn.role, "content": turn.text} for turn in turns]


# -- layouts ------------------------------------------------------------------------------------------------------


def _exchange(grammar: Grammar) -> Draft:
    prompt, completion = grammar.text(), grammar.text()
    turns = [Turn("user", prompt), Turn("assistant", completion)]
    return Draft({"prompt": prompt, "completion": completion}, turns, ("prompt", "completion"))


def _exchange_of_turns(grammar: Grammar) -> Draft:
    turns = grammar.conversation()
    written = grammar.written(turns, sharegpt=False)
    value = {"prompt": written[:-1], "completion": written[-1:]}
    return Draft(value, turns, ("prompt", "completion"), ("prompt", "completion"), written)


def _conversation(grammar: Grammar) -> Draft:
    name = grammar.rng.choice(("messages", "conversations"))
    turns = grammar.conversation()
    written = grammar.written(turns, sharegpt=grammar.rng.random() < 0.5)
    return Draft({name: written}, turns, (name,), (name,), written)


def _alpaca(grammar: Grammar) -> Draft:
    instruction, output = grammar.text(), grammar.text()
    value, prompt = {"instruction": instruction, "output": output}, instruction
    name = grammar.rng.choice(("input", "context", ""))
    if name:
        value[name] = grammar.rng.choice((grammar.text(), "", grammar.text()))
        prompt = f"{instruction}\n\n{value[name]}" if value[name] else instruction
    return Draft(value, [Turn("user", prompt), Turn("assistant", output)], ("instruction", "output"))


def _text(grammar: Grammar) -> Draft:
    text = grammar.text()
    return Draft({"text": text}, [Turn("text", text)], ("text",))


def _safe_and_unsafe(grammar: Grammar) -> Draft:
    prompt, safe, unsafe = grammar.text(), grammar.text(), grammar.text()
    turns = [Turn("user", prompt), Turn("assistant", safe)]
    names = ("prompt", "safe", "unsafe")
    return Draft({"prompt": prompt, "safe": safe, "unsafe": unsafe}, turns, names, rejected=unsafe)


def _exchange_and_rejected(grammar: Grammar) -> Draft:
    draft = _exchange(grammar)
    draft.value["rejected"] = grammar.text()
    draft.rejected = draft.value["rejected"] if grammar.kind != "candidate" else None
    return draft


def _chosen_and_rejected(grammar: Grammar) -> Draft:
    prompt, chosen, rejected = grammar.text(), grammar.text(), grammar.text()
    turns = [Turn("user", prompt), Turn("assistant", chosen)]
    value = {"prompt": prompt, "chosen": chosen, "rejected": rejected}
    return Draft(value, turns, ("prompt", "chosen", "rejected"), rejected=rejected)


def _chosen_and_rejected_turns(grammar: Grammar) -> Draft:
    turns = grammar.conversation()
    sides = turns, [*turns[:-1], Turn("assistant", grammar.text())]
    chosen, rejected = (grammar.written(side, sharegpt=False) for side in sides)
    value: dict[str, Any] = {"chosen": chosen, "rejected": rejected}
    if grammar.rng.random() < 0.3:
        value = {"prompt": chosen[:-1], "chosen": chosen[-1:], "rejected": rejected[-1:]}
    return Draft(value, turns, ("chosen", "rejected"), ("chosen", "rejected"), rejected=sides[1][-1].text)


_PLAIN = (_exchange, _exchange_of_turns, _conversation, _conversation, _conversation, _alpaca, _text)
_PAIRS = (_safe_and_unsafe, _exchange_and_rejected, _chosen_and_rejected, _chosen_and_rejected_turns)


# -- changes ------------------------------------------------------------------------------------------------------

Change = Callable[[Grammar, Draft], "Given | None"]
CHANGES: list[Change] = []


def change(made: Change) -> Change:
    """Adds a change: it returns what must become of the record, or None where it does not go with the layout."""
    CHANGES.append(made)
    return made


def _set(draft: Draft, name: str, value: Any) -> None:
    draft.value[name] = value


@change
def needed_field_missing(grammar: Grammar, draft: Draft) -> Given:
    """A field without which there is no layout."""
    del draft.value[grammar.rng.choice(draft.needed)]
    return draft.bad()


@change
def needed_field_null(grammar: Grammar, draft: Draft) -> Given:
    """The same as null."""
    _set(draft, grammar.rng.choice(draft.needed), None)
    return draft.bad()


@change
def needed_field_misnamed(grammar: Grammar, draft: Draft) -> Given:
    """Another name for it."""
    name = grammar.rng.choice(draft.needed)
    other = grammar.rng.choice(
        (name.upper(), f" {name}", f"{name} ", name[:-1], f"{name}\x00", f"\ufeff{name}", f"x{name}")
    )
    draft.value[other] = draft.value.pop(name)
    return draft.bad()


@change
def needed_field_of_another_type(grammar: Grammar, draft: Draft) -> Given:
    """Numbers, booleans, objects, arrays."""
    name = grammar.rng.choice(draft.needed)
    conversation = name in draft.arrays and name in ("messages", "conversations")
    _set(draft, name, grammar.rng.choice(NOT_TURNS if conversation else NOT_TEXT))
    return draft.bad()


@change
def needed_text_empty(grammar: Grammar, draft: Draft) -> Given:
    """Nothing, or nothing but white space."""
    name = grammar.rng.choice(draft.needed)
    _set(draft, name, grammar.rng.choice(SPACES))
    if name == "instruction" and (draft.value.get("input") or draft.value.get("context")):
        return draft.either()  # all is in the other field
    return draft.bad()


@change
def needed_text_with_half_a_character(grammar: Grammar, draft: Draft) -> Given | None:
    """A lone surrogate, which UTF-8 cannot hold."""
    if draft.arrays:
        return None
    name = grammar.rng.choice(draft.needed)
    _set(draft, name, draft.value[name] + grammar.rng.choice(("\ud83d", "\udc00 x", "\udfff\ud800")))
    return draft.bad()


@change
def needed_value_no_number(grammar: Grammar, draft: Draft) -> Given:
    """NaN and the infinities, which JSON has not and Python writes."""
    _set(draft, grammar.rng.choice(draft.needed), grammar.rng.choice((float("nan"), float("inf"), -float("inf"))))
    return draft.bad()


@change
def needed_value_huge_number(grammar: Grammar, draft: Draft) -> Given:
    """More digits than Python converts."""
    _set(draft, grammar.rng.choice(draft.needed), Raw("9" * grammar.rng.choice((5_000, 60_000))))
    return draft.bad()


@change
def huge_number_beside(grammar: Grammar, draft: Draft) -> Given:
    """The same in a field that is not used."""
    _set(draft, grammar.rng.choice(("id", "source", "score")), Raw("-" + "9" * 5_000))
    return draft.either()


@change
def huge_text(grammar: Grammar, draft: Draft) -> Given | None:
    """A text of a hundred thousand characters."""
    if draft.arrays or "completion" not in draft.needed:
        return None
    draft.value["completion"] += " long" * 20_000
    draft.turns[-1] = draft.turns[-1]._replace(text=draft.value["completion"])
    return draft.good()


@change
def deep_value_beside(grammar: Grammar, draft: Draft) -> Given:
    """Arrays or objects within each other, in a field that is not used."""
    depth = grammar.rng.choice((100, 400, 700, 990, 1_500, 30_000))
    opening, closing = grammar.rng.choice((("[", "]"), ('{"a":', "}"), ('[{"a":', "}]")))
    _set(draft, grammar.rng.choice(("id", "source", "extra")), Raw(f"{opening * depth}1{closing * depth}"))
    return draft.bad(in_table="either")


@change
def deep_json_text(grammar: Grammar, draft: Draft) -> Given:
    """The same as a JSON text, which the depth of the record does not show, in a field whose JSON text is read."""
    depth = grammar.rng.choice((40, 100, 400, 700, 990, 1_500, 30_000))
    opening, closing = grammar.rng.choice((("[", "]"), ('{"a":', "}"), ('[{"a":', "}]")))
    deep = f"{opening * depth}1{closing * depth}"
    name = grammar.rng.choice(("tools", "functions", "history", "messages", "conversations", "system"))
    _set(draft, name, deep if name != "tools" else f'[{{"name": "f", "parameters": {deep}}}]')
    return draft.either()


@change
def key_twice(grammar: Grammar, draft: Draft) -> Given:
    """A name twice in the record's own object."""
    pairs = [f"{to_json(name)}: {to_json(value)}" for name, value in draft.value.items()]
    name = grammar.rng.choice(list(draft.value))
    pairs.insert(grammar.rng.randint(0, len(pairs)), f"{to_json(name)}: {to_json(grammar.text())}")
    return draft.bad(value=Raw("{" + ", ".join(pairs) + "}"))


@change
def half_a_character_as_key_twice(grammar: Grammar, draft: Draft) -> Given:
    """The same with a name that UTF-8 cannot hold."""
    pairs = [f"{to_json(name)}: {to_json(value)}" for name, value in draft.value.items()]
    return draft.bad(value=Raw("{" + ", ".join([*pairs, '"\\ud800": 1', '"\\ud800": 2']) + "}"))


@change
def key_twice_in_a_turn(grammar: Grammar, draft: Draft) -> Given | None:
    """A name twice in the object of a turn."""
    if not draft.written:
        return None
    name = draft.arrays[-1]
    turns = [to_json(turn) for turn in draft.value[name]]
    turns[-1] = f'{{"{grammar.rng.choice(("role", "content", "x"))}": "assistant", {turns[-1][1:]}'
    if turns[-1].startswith('{"x"'):
        turns[-1] = turns[-1].replace('{"x"', '{"x": 1, "x"', 1)
    elif "from" in draft.value[name][-1]:  # then those names are not there yet
        return None
    _set(draft, name, Raw(f"[{', '.join(turns)}]"))
    return draft.bad()


@change
def no_object(grammar: Grammar, draft: Draft) -> Given:
    """Another JSON value in the record's place."""
    return draft.bad(
        value=Raw(grammar.rng.choice(("1", "-0.5", '"text"', "null", "true", "[]", "[[1]]", "NaN", '""', "[{}]")))
    )


@change
def no_json(grammar: Grammar, draft: Draft) -> Given:
    """The text of the object, damaged so that it is none."""
    whole = to_json(draft.value)
    texts = (
        whole[:-1],
        whole[: len(whole) // 2],
        whole[1:],
        whole + "}",
        whole + whole,
        whole + ",",
        whole[:-1] + ",}",
        "{'prompt': 'a', 'completion': 'b'}",
        '{prompt: "a", completion: "b"}',
        '{"prompt": "a" "completion": "b"}',
        '{"prompt": "a\tb", "completion": "b"}',
        '{"prompt": "\\x41", "completion": "b"}',
        '{"prompt": "\\ud8", "completion": "b"}',
        '{"prompt": "a", "completion": "b"} // good',
        '{"prompt": undefined, "completion": "b"}',
        '{"prompt": "a", "completion": 01}',
        "\x00" + whole,
        "\ufeff\ufeff" + whole,
    )
    return draft.bad(value=Raw(grammar.rng.choice(texts)))


@change
def odd_role(grammar: Grammar, draft: Draft) -> Given | None:
    """A role that is none."""
    if not draft.written:
        return None
    turn = grammar.rng.choice(draft.written)
    turn["from" if "from" in turn else "role"] = grammar.rng.choice(ODD_ROLES)
    return draft.bad()


@change
def odd_order(grammar: Grammar, draft: Draft) -> Given | None:
    """Turns in any order, any role: what is kept follows from the roles alone."""
    if len(draft.needed) != 1 or not draft.written:
        return None
    roles = grammar.rng.choices(("system", "user", "assistant", "tool", "developer"), k=grammar.rng.randint(1, 7))
    turns = [Turn(role, grammar.text()) for role in roles]
    draft.turns = [turn._replace(role="system") if turn.role == "developer" else turn for turn in turns]
    _set(draft, draft.needed[0], grammar.written(turns, sharegpt=False))
    return draft.good()


@change
def turn_that_is_none(grammar: Grammar, draft: Draft) -> Given | None:
    """Something else in a turn's place."""
    if not draft.written:
        return None
    turns = draft.value[draft.arrays[-1]]
    position = grammar.rng.randrange(len(turns))
    turns[position] = grammar.rng.choice((None, 5, "hello", [], ["user", "hello"], True))
    return draft.bad()


@change
def turn_lacks_a_field(grammar: Grammar, draft: Draft) -> Given | None:
    """No role, no content, or nothing."""
    if not draft.written:
        return None
    turn = grammar.rng.choice(draft.written)
    del turn[grammar.rng.choice(list(turn))]
    if grammar.rng.random() < 0.2:
        turn.clear()
    return draft.bad()


@change
def content_of_another_type(grammar: Grammar, draft: Draft) -> Given | None:
    """Numbers, objects, arrays of what is no part of a content."""
    if not draft.written:
        return None
    turn = grammar.rng.choice(draft.written)
    odd = (0, 5, True, {}, {"text": "a"}, [1], [None], [[]], [{}], [{"type": "text"}], [{"type": "text", "text": None}])
    odd += (
        [{"type": "image_url", "image_url": {"url": "x"}}],
        [{"type": "text", "text": 5}],
        [{"type": ["text"]}],
        "\udc00",
    )
    turn["value" if "value" in turn else "content"] = grammar.rng.choice(odd)
    return draft.bad()


@change
def content_empty(grammar: Grammar, draft: Draft) -> Given | None:
    """Nothing, or white space: of a user or an assistant no turn; of the system it has a meaning."""
    if not draft.written:
        return None
    index = grammar.rng.randrange(len(draft.written))
    turn, empty = draft.written[index], grammar.rng.choice(SPACES)
    turn["value" if "value" in turn else "content"] = empty
    if draft.turns[index].role != "system":
        return draft.bad()
    draft.turns[index] = draft.turns[index]._replace(text=empty)
    return draft.good()


@change
def content_in_parts(grammar: Grammar, draft: Draft) -> Given | None:
    """An array of parts of type text, which follow each other."""
    if not draft.written:
        return None
    index = grammar.rng.randrange(len(draft.written))
    texts = [grammar.text() for _ in range(grammar.rng.randint(1, 3))]
    parts = [
        grammar.rng.choice(({"type": "text", "text": text}, {"text": text}, {"type": "input_text", "text": text}))
        for text in texts
    ]
    turn = draft.written[index]
    turn["value" if "value" in turn else "content"] = parts
    draft.turns[index] = draft.turns[index]._replace(text="".join(texts))
    return draft.good()


@change
def turns_as_json_text(grammar: Grammar, draft: Draft) -> Given | None:
    """The array as a text, as a table of texts holds it."""
    if len(draft.needed) != 1 or not draft.written:
        return None
    _set(draft, draft.needed[0], grammar.rng.choice(("", " ")) + to_json(draft.written))
    return draft.good()


@change
def turn_not_learned(grammar: Grammar, draft: Draft) -> Given | None:
    """A field that says that a turn is not learned."""
    if not draft.written:
        return None
    index = grammar.rng.randrange(len(draft.written))
    name = grammar.rng.choice(("weight", "train", "training", "trainable", "learn", "loss", "masked"))
    draft.written[index][name] = grammar.rng.choice((True, 1, "true") if name == "masked" else (False, 0, "0", "false"))
    draft.turns[index] = draft.turns[index]._replace(learned=False)
    return draft.good()


@change
def turn_that_says_it_is_learned(grammar: Grammar, draft: Draft) -> Given | None:
    """The same field with yes: of an assistant's turn nothing new, of others' it is refused."""
    if not draft.written:
        return None
    index = grammar.rng.randrange(len(draft.written))
    draft.written[index][grammar.rng.choice(("weight", "train", "loss"))] = grammar.rng.choice((True, 1, "1", "True"))
    return draft.good() if draft.turns[index].role == "assistant" else draft.bad()


@change
def turn_half_learned(grammar: Grammar, draft: Draft) -> Given | None:
    """Neither yes nor no, or both."""
    if not draft.written:
        return None
    turn = grammar.rng.choice(draft.written)
    if grammar.rng.random() < 0.2:
        turn |= {"weight": 0, "train": True}
    else:
        turn[grammar.rng.choice(("weight", "train", "masked"))] = grammar.rng.choice((0.5, 2, -1, "yes", {"a": 1}, [1]))
    return draft.bad()


@change
def turn_with_what_is_not_supported(grammar: Grammar, draft: Draft) -> Given | None:
    """Media, masks of other tools: refused where they say something."""
    if not draft.written:
        return None
    turn = grammar.rng.choice(draft.written)
    name = grammar.rng.choice(("images", "image", "audio", "video", "mask", "train_detail", "train_on_input"))
    value = grammar.rng.choice((["x.png"], "x.png", {"a": 1}, 1, True, [], "", None, {}))
    turn[name] = value
    return draft.bad() if value not in ([], "", None, {}) else draft.good()


@change
def turn_with_unknown_fields(grammar: Grammar, draft: Draft) -> Given | None:
    """Anything under any name: not used."""
    if not draft.written:
        return None
    grammar.rng.choice(draft.written)[f"x {grammar.rng.choice(ODD_NAMES)}"] = grammar.rng.choice(ANYTHING)
    return draft.good()


@change
def thoughts(grammar: Grammar, draft: Draft) -> Given | None:
    """An assistant's thinking; of others it is refused, and two that differ are."""
    if not draft.written:
        return None
    index = grammar.rng.randrange(len(draft.written))
    name = grammar.rng.choice(("reasoning_content", "reasoning", "thinking"))
    thought = grammar.rng.choice((grammar.text(), grammar.text(), 5, ["a"], {"a": 1}, "\ud800"))
    draft.written[index][name] = thought
    if not isinstance(thought, str) or not is_unicode(thought) or draft.turns[index].role != "assistant":
        return draft.bad()
    if grammar.rng.random() < 0.2:
        draft.written[index]["reasoning" if name != "reasoning" else "thinking"] = grammar.text()
        return draft.bad()
    draft.inside = (thought,)
    return draft.good()


@change
def calls(grammar: Grammar, draft: Draft) -> Given | None:
    """Calls of tools, as different programs write them, right and wrong."""
    if not draft.written:
        return None
    assistants = [index for index, turn in enumerate(draft.turns) if turn.role == "assistant"]
    index = grammar.rng.choice(assistants)
    argument = grammar.text()
    arguments: Any = {"x": argument}
    good = grammar.rng.choice((True, True, False))
    if good and grammar.rng.random() < 0.5:
        arguments = to_json(arguments)
    if not good:
        arguments = grammar.rng.choice(
            ("no json", 5, [1], True, '{"x": "\\ud800"}', {"x": "\udc00"}, '{"x": 1, "x": 2}')
        )
    call = {"name": "f", "arguments": arguments}
    if not good and grammar.rng.random() < 0.3:
        call["name"] = grammar.rng.choice(("", None, 5, "\ud800"))
    wrapped = grammar.rng.choice((call, {"id": "c1", "type": "function", "function": call}))
    if grammar.rng.random() < 0.3:
        draft.written[index]["function_call"] = wrapped
    else:
        draft.written[index]["tool_calls"] = grammar.rng.choice(([wrapped], to_json([wrapped])))
    if good and grammar.rng.random() < 0.3:
        name = "value" if "value" in draft.written[index] else "content"
        draft.written[index][name] = grammar.rng.choice(("", None))
        draft.turns[index] = draft.turns[index]._replace(text="")
    draft.inside = (argument,)
    return draft.good() if good else draft.bad()


@change
def calls_of_sharegpt(grammar: Grammar, draft: Draft) -> Given | None:
    """A call and what it gave, as turns of their own."""
    if not draft.written or "from" not in draft.written[0]:
        return None
    seen = grammar.text()
    right = ('{"name": "f", "arguments": {"x": 1}}', '[{"name": "f", "parameters": null}]')
    call = grammar.rng.choice((*right, "f(1)", "", "{}"))
    added = [{"from": "function_call", "value": call}, {"from": "observation", "value": seen}]
    position = len(draft.written) - 1
    draft.written[position:position] = added
    draft.turns[position:position] = [Turn("assistant", ""), Turn("tool", seen)]
    return draft.good() if call in right else draft.bad()


@change
def turn_of_a_tool(grammar: Grammar, draft: Draft) -> Given | None:
    """A tool's turn with its names."""
    if not draft.written or "role" not in draft.written[0]:
        return None
    name = grammar.rng.choice(("f", 5, ["f"], "\ud800", "", None))
    role = grammar.rng.choice(("tool", "function"))
    turn = {"role": role, "content": grammar.text(), "name": name, "tool_call_id": "c1"}
    at = len(draft.value[draft.arrays[0]]) - (draft.arrays[0] != "prompt")
    draft.value[draft.arrays[0]].insert(at, turn)
    draft.turns.insert(at, Turn("tool", turn["content"]))
    return draft.good() if name in ("f", "", None) else draft.bad()


@change
def tool_definitions(grammar: Grammar, draft: Draft) -> Given | None:
    """Definitions of tools, an array or its JSON text, right and wrong."""
    name = grammar.rng.choice(("tools", "functions"))
    tool = {"type": "function", "function": {"name": "f", "parameters": {"x": {"type": "string", "default": None}}}}
    right: tuple[Any, ...] = ([tool], to_json([tool]), [tool, tool])
    nothing: tuple[Any, ...] = ([], {}, "", None)
    wrong: tuple[Any, ...] = (5, True, "a text", [1], ["f"], [None], '["f"]', [[tool]], [{"name": "\ud800"}])
    wrong += ('[{"name": "\\udc00"}]', '[{"name": "f", "name": "g"}]')
    value = grammar.rng.choice((*right, *nothing, *wrong))
    _set(draft, name, value)
    if value in nothing:
        return draft.good()
    if value in wrong or draft.turns[0].role == "text":
        return draft.bad()
    draft.turns.insert(0, Turn("tools", ""))
    return draft.good()


@change
def system_beside(grammar: Grammar, draft: Draft) -> Given:
    """A system turn in a field of its own; refused where there is another one."""
    name = grammar.rng.choice(("system", "system_prompt", "system_message"))
    value = grammar.rng.choice(
        (grammar.text(), grammar.text(), grammar.text(), "", None, [], 5, True, ["a"], {"a": 1}, "\udfff")
    )
    _set(draft, name, value)
    if value in ("", None, []):
        return draft.good()
    if not isinstance(value, str) or value == "\udfff" or draft.turns[0].role == "text":
        return draft.bad()
    systems = [turn.text for turn in draft.turns if turn.role == "system"]
    if systems:
        return draft.bad()
    draft.turns.insert(0, Turn("system", value))
    return draft.good()


@change
def earlier_turns_beside(grammar: Grammar, draft: Draft) -> Given | None:
    """Alpaca's history, right and wrong."""
    if draft.arrays or draft.needed not in (("prompt", "completion"), ("instruction", "output")):
        return None
    pairs = [[grammar.text(), grammar.text()] for _ in range(grammar.rng.randint(1, 3))]
    wrong: tuple[Any, ...] = ("a text", 5, True, [["a"]], [["a", 1]], [["", "b"]], [["a", "b", "c"]], {"a": 1}, ["ab"])
    wrong += ([[None, "b"]], [["a", "\ud800"]], "[1", [[]])
    value = grammar.rng.choice((pairs, pairs, to_json(pairs), [], "", None, *wrong))
    _set(draft, "history", value)
    if value in ([], "", None):
        return draft.good()
    if value in wrong:
        return draft.bad()
    draft.turns[:0] = [Turn(role, text) for pair in pairs for role, text in zip(("user", "assistant"), pair)]
    return draft.good()


@change
def record_not_supported(grammar: Grammar, draft: Draft) -> Given | None:
    """Media, documents and the like: refused where they say something."""
    names = (
        "images",
        "image",
        "videos",
        "video",
        "audios",
        "audio",
        "documents",
        "chat_template_kwargs",
        "context",
        "mask",
    )
    name = grammar.rng.choice(names)
    if name == "context" and "instruction" in draft.value:
        return None
    value = grammar.rng.choice((["x.png"], "x.png", {"a": 1}, 1, True, [], "", None, {}))
    _set(draft, name, value)
    return draft.bad() if value not in ([], "", None, {}) else draft.good()


@change
def record_not_wanted(grammar: Grammar, draft: Draft) -> Given:
    """Fields that say that the completion is not wanted."""
    name = grammar.rng.choice(("label", "kto_tag", "train", "trainable", "weight"))
    unwanted = (False, "false", "False", " FALSE ") + ((0, 0.0) if name in ("kto_tag", "weight") else ())
    harmless = (True, 1, "true", None, "", 1.0, [], {"a": 1})
    value = grammar.rng.choice((*unwanted, *harmless))
    _set(draft, name, value)
    is_unwanted = any(value is one for one in unwanted)
    return draft.bad() if is_unwanted else draft.good()


@change
def names_of_any_kind(grammar: Grammar, draft: Draft) -> Given:
    """Ids, sources and fields that are not used: no value of them costs a record."""
    for _ in range(grammar.rng.randint(1, 3)):
        name = grammar.rng.choice(("id", "source", "id", "source", "score", *(f"x {one}" for one in ODD_NAMES)))
        draft.value[name] = grammar.rng.choice(ANYTHING)
    return draft.good()


@change
def key_twice_deep_inside(grammar: Grammar, draft: Draft) -> Given:
    """A name twice in an object that is not used."""
    _set(draft, "extra", Raw('{"a": [{"b": 1, "b": 2}]}'))
    return draft.bad(in_table="either")


@change
def answers_beside(grammar: Grammar, draft: Draft) -> Given:
    """Accepted answers, which count for targets."""
    name = grammar.rng.choice(("answer", "answers"))
    right: tuple[Any, ...] = ("4", ["4", "four"], 4, 4.0, [4, "4"], [], None)
    wrong: tuple[Any, ...] = ("", " ", {"a": 1}, [{"a": 1}], [""], [None], [[]], True, "\ud800")
    value = grammar.rng.choice((*right, *wrong))
    _set(draft, name, value)
    is_wrong = any(value is one for one in wrong)
    return draft.bad() if is_wrong and grammar.kind != "candidate" else draft.good()


@change
def choices_beside(grammar: Grammar, draft: Draft) -> Given:
    """Completions to choose from, which count for targets."""
    completion = draft.turns[-1].text
    right: tuple[Any, ...] = ([completion, "b"], ["a", completion, 3], None)
    wrong: tuple[Any, ...] = ([], [completion], ["a", "b"], [completion, "b", "b"], [completion, ""], completion, 5)
    wrong += ({"a": 1}, [completion, None], [completion, ["b"]], [completion, "\ud800"])
    number = grammar.rng.randrange(len(right) + len(wrong))
    _set(draft, "choices", (*right, *wrong)[number])
    if draft.turns[0].role == "text" and draft.value["choices"] not in ([], None):
        return draft.bad()
    return draft.bad() if number >= len(right) and grammar.kind != "candidate" else draft.good()


@change
def group_beside(grammar: Grammar, draft: Draft) -> Given:
    """The name of a subtask, which counts for targets."""
    wrong: tuple[Any, ...] = ({"a": 1}, ["a"], True, "\ud800")
    value = grammar.rng.choice(("a", 3, None, *wrong))
    _set(draft, "group", value)
    is_wrong = any(value is one for one in wrong)
    return draft.bad() if is_wrong and grammar.kind != "candidate" else draft.good()


@change
def text_beside_another_layout(grammar: Grammar, draft: Draft) -> Given | None:
    """A text without a prompt that has one after all."""
    if "text" not in draft.needed:
        return None
    name = grammar.rng.choice(("prompt", "instruction", "output", "input", "history", "completion"))
    _set(draft, name, grammar.text())
    return draft.bad()


@change
def rejected_like_the_completion(grammar: Grammar, draft: Draft) -> Given | None:
    """A pair that prefers nothing."""
    name = draft.needed[-1] if draft.needed[-1] in ("unsafe", "rejected") else "rejected" if draft.rejected else None
    if name is None or draft.arrays:
        return None
    _set(draft, name, draft.turns[-1].text)
    return draft.bad()


@change
def pair_that_is_none(grammar: Grammar, draft: Draft) -> Given | None:
    """Sides of different types, of different prompts, or that end with the user."""
    if draft.needed != ("chosen", "rejected"):
        return None
    side = grammar.rng.choice(draft.needed)
    number = grammar.rng.randrange(3)
    if number == 0:
        _set(draft, side, grammar.text())
    elif number == 1:
        _set(draft, side, [*draft.value[side], {"role": "user", "content": grammar.text()}])
    else:
        _set(draft, side, [{"role": "user", "content": grammar.text()}, draft.value[side][-1]])
    return draft.bad()


def is_unicode(text: str) -> bool:
    """Whether UTF-8 can hold a text: it has no lone surrogate."""
    return not any("\ud800" <= character <= "\udfff" for character in text)
