import json

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import (
    AddedToken,
    Regex,
    Tokenizer,
    decoders,
    models,
    pre_tokenizers,
    processors,
)
from transformers import PreTrainedTokenizerFast

from prism_assets.corpus.encoder import Encoder, TokenizedExample
from prism_assets.corpus.records import Example, Message
from prism_assets.corpus.template import Untokenizable
from prism_assets.corpus.token_tables import (
    CANDIDATE_SCHEMA,
    TARGET_SCHEMA,
    completion_tokens,
    encode_all,
    from_table,
    prompt_tokens,
    rejected_from_table,
    to_table,
)
from prism_assets.errors import UnusableTokenizer

CHATML = (
    "{% for m in messages %}{{ '<|im_start|>' + m.role + '\n' + m.content + '<|im_end|>\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)
LLAMA3 = (
    "{{ bos_token }}{% for m in messages %}{{ '<|start_header_id|>' + m.role + '<|end_header_id|>\n\n'"
    " + m.content | trim + '<|eot_id|>' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|start_header_id|>assistant<|end_header_id|>\n\n' }}{% endif %}"
)
LLAMA2 = (
    "{% for m in messages %}{% if m.role == 'user' %}{{ bos_token + '[INST] ' + m.content + ' [/INST]' }}"
    "{% elif m.role == 'assistant' %}{{ ' ' + m.content + ' ' + eos_token }}"
    "{% else %}{{ raise_exception('no system turn') }}{% endif %}{% endfor %}"
)
# No token ends a turn.
WORDS = (
    "{% for m in messages %}{{ '### ' + m.role + ':\n' + m.content + '\n\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '### assistant:\n' }}{% endif %}"
)
# As Qwen3: the last turn gets a thinking block, earlier turns lose theirs; generation may skip the thinking.
QWEN3 = (
    "{% for m in messages %}{% set c = m.content.split('</think>')[-1].lstrip('\n') %}"
    "{{ '<|im_start|>' + m.role + '\n' }}"
    "{% if m.role == 'assistant' and loop.last %}{{ '<think>\n' }}"
    "{% if '</think>' in m.content %}{{ m.content.split('</think>')[0].split('<think>')[-1].strip('\n') }}"
    "{% endif %}"
    "{{ '\n</think>\n\n' + c }}{% elif m.role == 'assistant' %}{{ c }}{% else %}{{ m.content }}{% endif %}"
    "{{ '<|im_end|>\n' }}{% endfor %}{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}"
    "{% if enable_thinking is defined and enable_thinking is false %}{{ '<think>\n\n</think>\n\n' }}"
    "{% endif %}{% endif %}"
)
# As DeepSeek-R1: generation opens a thinking block that rendered answers lack; answers lose their thinking.
DEEPSEEK = (
    "{{ bos_token }}{% for m in messages %}{% if m.role == 'user' %}{{ '<|user|>' + m.content }}"
    "{% else %}{{ '<|assistant|>' + m.content.split('</think>')[-1] + eos_token }}{% endif %}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|assistant|><think>\n' }}{% endif %}"
)
# As gpt-oss: special tokens inside the turn, and another end for the last turn than for those before.
CHANNELS = (
    "{% for m in messages %}{% if m.role == 'assistant' %}{{ '<|start|>assistant<|channel|>final<|message|>'"
    " + m.content + ('<|return|>' if loop.last else '<|end|>') }}"
    "{% else %}{{ '<|start|>' + m.role + '<|message|>' + m.content + '<|end|>' }}{% endif %}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|start|>assistant' }}{% endif %}"
)
SPECIAL = [
    "<s>", "</s>", "<pad>", "<unk>", "<|im_start|>", "<|im_end|>", "<|start_header_id|>", "<|end_header_id|>",
    "<|eot_id|>", "<|user|>", "<|assistant|>", "<|start|>", "<|channel|>", "<|message|>", "<|return|>",
    "<|end|>",
]  # fmt: skip
EXCHANGE = (Message("user", "Add 1 and 2."), Message("assistant", "It is 3"))
CONVERSATION = (
    Message("system", "Be brief."),
    Message("user", "Hello"),
    Message("assistant", "Hi there"),
    Message("user", "2+2?"),
    Message("assistant", "4"),
)


def character_tokenizer(bos_by_default=True, **options):
    """One token a character: BOS 0, EOS 1, and the printable characters from 16 on."""
    characters = [chr(code) for code in range(32, 127)] + ["\n"]
    vocabulary = {token: index for index, token in enumerate([*SPECIAL, *characters])}
    tokenizer = Tokenizer(models.WordLevel(vocabulary, unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.Split(Regex(r"[\s\S]"), behavior="isolated")
    tokenizer.decoder = decoders.Fuse()
    if bos_by_default:
        tokenizer.post_processor = processors.TemplateProcessing(single="<s> $A", special_tokens=[("<s>", 0)])
    tokenizer.add_special_tokens([AddedToken(token, special=True) for token in SPECIAL])
    names = {"bos_token": "<s>", "eos_token": "</s>", "pad_token": "<pad>", "unk_token": "<unk>"} | options
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, **names)


def byte_tokenizer(**options):
    """Byte-level BPE, in which every text has tokens; "</s>" ends, nothing is added by default."""
    vocabulary = {token: index for index, token in enumerate(sorted(pre_tokenizers.ByteLevel.alphabet()))}
    vocabulary |= {pair: 256 + i for i, pair in enumerate(["Ġa", "ab", "Ċa"])}
    merges = [("Ġ", "a"), ("a", "b"), ("Ċ", "a")]
    tokenizer = Tokenizer(models.BPE(vocabulary, merges))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    tokenizer.decoder = decoders.ByteLevel()
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token="</s>", **options)


def characters(tokenizer, text):
    return [tokenizer.convert_tokens_to_ids(character) for character in text]


def supervised_texts(tokenizer, example):
    """The supervised stretches, decoded."""
    edges = np.flatnonzero(np.diff(np.concatenate([[0], example.loss_mask.astype(int), [0]])))
    runs = [example.input_ids[a:b].tolist() for a, b in edges.reshape(-1, 2)]
    return [tokenizer.decode(run, skip_special_tokens=False, clean_up_tokenization_spaces=False) for run in runs]


def text(tokenizer, ids):
    return tokenizer.decode(ids.tolist(), skip_special_tokens=False, clean_up_tokenization_spaces=False)


def check(tokenizer, example):
    assert example.input_ids.dtype == np.int32 and example.loss_mask.dtype == bool
    assert example.input_ids.shape == example.loss_mask.shape and example.input_ids.ndim == 1
    assert not example.loss_mask[0] and example.loss_mask[-1]


# --- Plain format ----------------------------------------------------------------------------------------


def test_plain_exchange_by_hand():
    tokenizer = character_tokenizer()
    example = Encoder(tokenizer, max_length=100, separator=" = ").encode(
        (Message("user", "1+2"), Message("assistant", "3"))
    )
    check(tokenizer, example)
    # "!" is the 17th character from the space, which has id 16.
    assert example.input_ids.tolist() == [0, 33, 27, 34, 16, 45, 16, 35, 1]
    assert example.loss_mask.tolist() == [False] * 7 + [True, True]
    assert completion_tokens(example) == 2


def test_no_bos_where_the_tokenizer_adds_none():
    tokenizer = character_tokenizer(bos_by_default=False)
    example = Encoder(tokenizer, max_length=100).encode(EXCHANGE)
    assert text(tokenizer, example.input_ids) == "Add 1 and 2.\nIt is 3</s>"


def test_plain_conversation_is_supervised_on_all_assistant_turns():
    tokenizer = character_tokenizer()
    example = Encoder(tokenizer, max_length=100).encode(CONVERSATION)
    assert text(tokenizer, example.input_ids) == "<s>Be brief.\nHello\nHi there</s>\n2+2?\n4</s>"
    assert supervised_texts(tokenizer, example) == ["Hi there</s>", "4</s>"]


def test_no_token_straddles_the_boundary_of_the_completion():
    tokenizer = byte_tokenizer()
    example = Encoder(tokenizer, max_length=100).encode((Message("user", "x"), Message("assistant", "ac")))
    merged = tokenizer.encode("x\nac", add_special_tokens=False)
    assert tokenizer.convert_tokens_to_ids("Ċa") in merged  # tokenised as a whole, one token is half prompt
    assert supervised_texts(tokenizer, example) == ["ac</s>"]
    assert prompt_tokens(example).tolist() == example.input_ids[:-3].tolist()


def test_a_dummy_prefix_space_is_not_written_into_the_middle_of_an_example():
    pieces = ["<unk>", "<s>", "</s>", "▁", "▁a", "a", "b", "\n"]
    bpe = Tokenizer(models.BPE({piece: i for i, piece in enumerate(pieces)}, [("▁", "a")], unk_token="<unk>"))
    bpe.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme="first", split=False)
    bpe.add_special_tokens(["<s>", "</s>"])
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=bpe, bos_token="<s>", eos_token="</s>", unk_token="<unk>")
    example = Encoder(tokenizer, max_length=20).encode((Message("user", "ab"), Message("assistant", "ab")))
    whole = tokenizer.encode("ab\nab</s>", add_special_tokens=False)
    assert tokenizer.convert_ids_to_tokens(whole) == ["▁a", "b", "\n", "a", "b", "</s>"]
    assert example.input_ids.tolist() == whole


# --- Chat templates --------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("template", "prompt", "completions"),
    [
        (
            CHATML,
            "<|im_start|>system\nBe brief.<|im_end|>\n<|im_start|>user\nHello<|im_end|>\n"
            "<|im_start|>assistant\n"
            "Hi there<|im_end|>\n<|im_start|>user\n2+2?<|im_end|>\n<|im_start|>assistant\n",
            ["Hi there<|im_end|>", "4<|im_end|>"],
        ),
        (
            LLAMA3,
            "<s><|start_header_id|>system<|end_header_id|>\n\nBe brief.<|eot_id|>"
            "<|start_header_id|>user<|end_header_id|>\n\nHello<|eot_id|>"
            "<|start_header_id|>assistant<|end_header_id|>\n\nHi there<|eot_id|>"
            "<|start_header_id|>user<|end_header_id|>\n\n2+2?<|eot_id|>"
            "<|start_header_id|>assistant<|end_header_id|>\n\n",
            ["Hi there<|eot_id|>", "4<|eot_id|>"],
        ),
        (
            WORDS,
            "### system:\nBe brief.\n\n### user:\nHello\n\n### assistant:\nHi there\n\n### user:\n2+2?\n\n"
            "### assistant:\n",
            ["Hi there", "4</s>"],
        ),
        (
            QWEN3,
            "<|im_start|>system\nBe brief.<|im_end|>\n<|im_start|>user\nHello<|im_end|>\n"
            "<|im_start|>assistant\n"
            "Hi there<|im_end|>\n<|im_start|>user\n2+2?<|im_end|>\n"
            "<|im_start|>assistant\n<think>\n\n</think>\n\n",
            ["Hi there<|im_end|>", "4<|im_end|>"],
        ),
        (
            CHANNELS,
            "<|start|>system<|message|>Be brief.<|end|><|start|>user<|message|>Hello<|end|><|start|>assistant"
            "<|channel|>final<|message|>Hi there<|end|><|start|>user<|message|>2+2?<|end|><|start|>assistant",
            ["<|channel|>final<|message|>Hi there<|end|>", "<|channel|>final<|message|>4<|return|>"],
        ),
    ],
    ids=["chatml", "llama3", "words", "qwen3", "channels"],
)
@pytest.mark.parametrize("given_as", ["the tokenizer's", "text"])
def test_chat_templates_supervise_assistant_turns_and_their_ends(template, prompt, completions, given_as):
    own = given_as == "the tokenizer's"
    tokenizer = character_tokenizer(chat_template=template if own else None)
    encoder = Encoder(tokenizer, max_length=1000, template="auto" if own else template)
    example = encoder.encode(CONVERSATION)
    check(tokenizer, example)
    assert text(tokenizer, example.input_ids) == prompt + completions[-1]
    assert supervised_texts(tokenizer, example) == completions
    assert text(tokenizer, prompt_tokens(example)) == prompt


def test_the_space_before_an_answer_belongs_to_it_and_bos_comes_once():
    tokenizer = character_tokenizer(chat_template=LLAMA2)
    example = Encoder(tokenizer, max_length=100).encode(EXCHANGE)
    assert text(tokenizer, example.input_ids) == "<s>[INST] Add 1 and 2. [/INST] It is 3 </s>"
    assert supervised_texts(tokenizer, example) == [" It is 3 </s>"]


def test_thinking_in_a_completion_is_supervised():
    tokenizer = character_tokenizer(chat_template=QWEN3)
    turns = (Message("user", "2+2?"), Message("assistant", "<think>\nadd\n</think>\n\n4"))
    example = Encoder(tokenizer, max_length=1000).encode(turns)
    assert supervised_texts(tokenizer, example) == ["<think>\nadd\n</think>\n\n4<|im_end|>"]
    assert text(tokenizer, prompt_tokens(example)).endswith("<|im_start|>assistant\n")


def test_a_template_that_changes_the_prompt_for_generation():
    tokenizer = character_tokenizer(chat_template=DEEPSEEK)
    encoder = Encoder(tokenizer, max_length=1000)
    example = encoder.encode(CONVERSATION[1:])
    assert supervised_texts(tokenizer, example) == ["Hi there</s>", "4</s>"]
    assert text(tokenizer, prompt_tokens(encoder.encode(CONVERSATION[1:3]))) == "<s><|user|>Hello<|assistant|>"
    with pytest.raises(Untokenizable, match="leaves out a part"):
        encoder.encode((Message("user", "2+2?"), Message("assistant", "<think>add</think>4")))


def test_white_space_that_a_template_trims():
    tokenizer = character_tokenizer(chat_template=LLAMA3)
    example = Encoder(tokenizer, max_length=100).encode((Message("user", "x"), Message("assistant", "\n y \n")))
    assert supervised_texts(tokenizer, example) == ["y<|eot_id|>"]
    kept = Encoder(tokenizer, max_length=100, template=WORDS).encode(
        (Message("user", "x"), Message("assistant", " y \n"))
    )
    assert supervised_texts(tokenizer, kept) == [" y</s>"]


def test_a_template_that_names_the_day_gives_the_same_tokens_every_day():
    template = "\n {{ strftime_now('%A %Y-%m-%d') + ', ' + date_string + '\n' }}" + CHATML
    tokenizer = character_tokenizer(chat_template=template)
    example = Encoder(tokenizer, max_length=100).encode(EXCHANGE)
    assert text(tokenizer, example.input_ids).startswith("\n Friday 2024-07-26, 26 Jul 2024\n<|im_start|>user")


def test_stop_tokens_are_eos_and_the_template_s_end_of_turn():
    tokenizer = character_tokenizer(chat_template=CHATML)
    ids = tokenizer.convert_tokens_to_ids
    assert Encoder(tokenizer, max_length=9).stop_token_ids == (ids("</s>"), ids("<|im_end|>"))
    assert Encoder(tokenizer, max_length=9, template="plain").stop_token_ids == (ids("</s>"),)
    assert Encoder(tokenizer, max_length=9, template=LLAMA2).stop_token_ids == (ids("</s>"),)


def test_a_template_s_refusal_is_passed_on():
    alternating = "{% if messages[1].role == 'user' %}{{ raise_exception('twice') }}{% endif %}" + LLAMA2
    with pytest.raises(Untokenizable, match="twice"):
        Encoder(character_tokenizer(chat_template=alternating), max_length=100).encode(
            (Message("user", "a"), Message("user", "b"), Message("assistant", "c"))
        )


# --- Length ----------------------------------------------------------------------------------------------


def test_too_long_a_prompt_loses_its_start_but_not_bos():
    tokenizer = character_tokenizer()
    example = Encoder(tokenizer, max_length=12).encode(EXCHANGE)
    assert text(tokenizer, example.input_ids) == "<s>2.\nIt is 3</s>"
    assert supervised_texts(tokenizer, example) == ["It is 3</s>"]
    assert text(tokenizer, prompt_tokens(example)) == "<s>2.\n"


@pytest.mark.parametrize("template", ["plain", CHATML, LLAMA3, LLAMA2])
def test_the_completion_is_whole_or_untokenizable_at_every_length(template):
    tokenizer = character_tokenizer()
    full = Encoder(tokenizer, max_length=1000, template=template).encode(EXCHANGE)
    needed = completion_tokens(full)
    user = text(tokenizer, full.input_ids).index("Add 1 and 2.")  # one token a character
    fixed = len(full.input_ids) - len("Add 1 and 2.") + 1
    for length in range(2, len(full.input_ids) + 2):
        encoder = Encoder(tokenizer, max_length=length, template=template)
        if needed > length - 1:
            with pytest.raises(
                Untokenizable, match=f"alone has {needed} tokens, and max_length {length} .* for {length - 1};"
            ):
                encoder.encode(EXCHANGE)
            continue
        if length < fixed:
            with pytest.raises(Untokenizable, match=f"have {fixed} tokens .* leaves room for {length};"):
                encoder.encode(EXCHANGE)
            continue
        example = encoder.encode(EXCHANGE)
        assert example.truncated == (length < len(full.input_ids))
        gone = max(len(full.input_ids) - length, 0)
        whole = full.input_ids.tolist()
        place = len(tokenizer.encode(text(tokenizer, full.input_ids)[:user], add_special_tokens=False))
        assert example.input_ids.tolist() == whole[:place] + whole[place + gone :]
        check(tokenizer, example)
        assert len(example.input_ids) == min(length, len(full.input_ids))
        assert example.input_ids[-needed:].tolist() == full.input_ids[-needed:].tolist()
        assert completion_tokens(example) == needed
        begins_with_bos = full.input_ids[0] == 0
        assert (example.input_ids[0] == 0) == begins_with_bos or length == len(full.input_ids)


@pytest.mark.parametrize("template", ["plain", CHATML, QWEN3])
def test_a_conversation_loses_its_earliest_exchanges_whole_and_keeps_its_system_turn(template):
    tokenizer = character_tokenizer()
    roomy = Encoder(tokenizer, max_length=1000, template=template)
    whole = roomy.encode(CONVERSATION)
    short = roomy.encode((CONVERSATION[0], *CONVERSATION[3:]))
    for length in range(len(short.input_ids), len(whole.input_ids)):
        encoder = Encoder(tokenizer, max_length=length, template=template)
        example = encoder.encode(CONVERSATION)
        assert example.input_ids.tolist() == short.input_ids.tolist()
        assert example.loss_mask.tolist() == short.loss_mask.tolist()
    below = Encoder(tokenizer, max_length=len(short.input_ids) - 1, template=template).encode(CONVERSATION)
    assert text(tokenizer, below.input_ids) == text(tokenizer, short.input_ids).replace("2+2?", "+2?")


def test_both_completions_of_a_pair_follow_the_same_prompt():
    tokenizer = character_tokenizer()
    for length in (14, 20, 30, 100):
        pair = Encoder(tokenizer, max_length=length).encode_pair(EXCHANGE, "No idea at")
        assert prompt_tokens(pair).tolist() == prompt_tokens(pair.rejected).tolist()
        assert max(len(pair.input_ids), len(pair.rejected.input_ids)) == min(length, 1 + 13 + 11)
        assert supervised_texts(tokenizer, pair) == ["It is 3</s>"]
        assert supervised_texts(tokenizer, pair.rejected) == ["No idea at</s>"]
    with pytest.raises(Untokenizable, match="alone has 11 tokens") as caught:
        Encoder(tokenizer, max_length=11).encode_pair(EXCHANGE, "No idea at")
    assert caught.value.field == "rejected"
    with pytest.raises(Untokenizable, match="alone has 8 tokens") as caught:
        Encoder(tokenizer, max_length=8).encode_pair(EXCHANGE, "No")
    assert caught.value.field == "completion"


# --- Refusals --------------------------------------------------------------------------------------------


def test_a_tokenizer_without_an_end_is_refused_with_advice():
    with pytest.raises(UnusableTokenizer, match="set eos_token"):
        Encoder(character_tokenizer(eos_token=None), max_length=10)


@pytest.mark.parametrize(
    ("template", "message"),
    [
        ("chat", "has no chat template"),
        ("Plain", "must be auto, chat, plain"),
        ("{{ nonsense", "cannot be used"),
        ("{{ messages[0].content }}", "cannot be used"),
        ("{{ raise_exception('never') }}", "never"),
    ],
)
def test_a_template_that_cannot_be_used_is_refused_at_once(template, message):
    with pytest.raises(UnusableTokenizer, match=message):
        Encoder(character_tokenizer(), max_length=10, template=template)


def test_a_conversation_without_a_completion_is_untokenizable():
    with pytest.raises(Untokenizable, match="does not end in an assistant turn"):
        Encoder(character_tokenizer(), max_length=10).encode(EXCHANGE[:1])


def test_no_room_for_an_example():
    with pytest.raises(ValueError, match="max_length is 1"):
        Encoder(character_tokenizer(), max_length=1)


@pytest.mark.parametrize("template", ["plain", CHATML])
def test_text_that_would_become_a_control_token_is_untokenizable(template):
    encoder = Encoder(character_tokenizer(), max_length=100, template=template)
    forged = (Message("user", "x<|im_end|>\n"), Message("assistant", "y"))
    with pytest.raises(Untokenizable, match=r"'<\|im_end\|>', a special token") as caught:
        encoder.encode(forged)
    assert caught.value.field == "messages[0].content"
    with pytest.raises(Untokenizable):
        encoder.encode_pair(EXCHANGE, "</s>")


def without_unknown(tokenizer_vocabulary):
    tokenizer = Tokenizer(models.BPE({c: i for i, c in enumerate(tokenizer_vocabulary)}, []))
    tokenizer.add_special_tokens(["</s>"])
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token="</s>")


def test_what_tokenises_to_nothing_is_untokenizable():
    encoder = Encoder(without_unknown("abc"), max_length=10, separator="")
    for completion in ("é", "éé"):
        with pytest.raises(Untokenizable, match="tokenises to nothing") as caught:
            encoder.encode((Message("user", "a"), Message("assistant", completion)))
        assert caught.value.field == "completion"
    with pytest.raises(Untokenizable, match="the prompt tokenises to nothing") as caught:
        encoder.encode((Message("user", "é"), Message("assistant", "a")))
    assert caught.value.field == "prompt"
    with pytest.raises(Untokenizable, match="tokenises to nothing"):  # all unknown
        Encoder(character_tokenizer(), max_length=10).encode((Message("user", "a"), Message("assistant", "éé")))


# --- Many examples, tables -------------------------------------------------------------------------------


def test_untokenizable_examples_become_rejects_and_leave_the_others():
    encoder = Encoder(character_tokenizer(), max_length=20)
    examples = [
        Example.create(EXCHANGE, line=4),
        Example.create([Message("user", "p"), Message("assistant", "long " * 10)], line=6),
        Example.create(EXCHANGE, rejected="</s>", line=8),
    ]
    seen = []
    tokenized, rejects = encode_all(examples, encoder, lambda *counts: seen.append(counts))
    assert [tokens is None for tokens in tokenized] == [False, True, True]
    assert [(r.line, r.field) for r in rejects] == [(6, "completion"), (8, "messages[2].content")]
    assert rejects[0].excerpt == "p" and "51 tokens" in rejects[0].reason
    assert seen == [(1, 3), (2, 3), (3, 3)]
    assert to_table(examples, tokenized)["line"].to_pylist() == [4]


def test_a_table_holds_the_examples_and_gives_the_tokens_back():
    encoder = Encoder(character_tokenizer(), max_length=200)
    examples = [
        Example.create(EXCHANGE, line=1, record_id="r", source="s", group="g", answers=("3", "three")),
        Example.create(CONVERSATION, line=2),
    ]
    tokenized, _ = encode_all(examples, encoder)
    table = to_table(examples, tokenized)
    assert table.schema == CANDIDATE_SCHEMA
    first, second = table.to_pylist()
    assert (first["id"], first["record_id"], first["source"], first["group"]) == (
        examples[0].id,
        "r",
        "s",
        "g",
    )
    assert first["answers"] == ["3", "three"] and second["answers"] == [] and second["source"] is None
    assert (first["prompt"], first["completion"], first["rejected"]) == ("Add 1 and 2.", "It is 3", None)
    assert json.loads(second["messages"]) == [{"role": m.role, "content": m.content} for m in CONVERSATION]
    assert first["tokens"] == len(first["input_ids"]) == 1 + 13 + 8 and first["completion_tokens"] == 8
    back = from_table(table)
    assert [type(tokens) for tokens in back] == [TokenizedExample] * 2
    for before, after in zip(tokenized, back, strict=True):
        check(None, after)
        assert before.input_ids.tolist() == after.input_ids.tolist()
        assert before.loss_mask.tolist() == after.loss_mask.tolist()
    with pytest.raises(ValueError, match="plain targets"):
        rejected_from_table(table)


def test_a_table_of_pairs_has_the_unwanted_tokens_and_chunks_and_slices_do_not_matter():
    import pyarrow as pa

    encoder = Encoder(character_tokenizer(), max_length=200)
    examples = [Example.create(EXCHANGE, rejected="no" * (i + 1), line=i) for i in range(5)]
    tokenized, _ = encode_all(examples, encoder)
    table = to_table(examples, tokenized)
    assert table.schema == TARGET_SCHEMA
    assert set(table["conversation_id"].to_pylist()) == {Example.create(EXCHANGE).id}
    pieces = pa.concat_tables([table.slice(3, 2), table.slice(1, 0), table.slice(0, 2)])
    expected = [tokenized[i] for i in (3, 4, 0, 1)]
    for tokens, chosen, rejected in zip(expected, from_table(pieces), rejected_from_table(pieces), strict=True):
        assert tokens.input_ids.tolist() == chosen.input_ids.tolist()
        assert tokens.rejected.input_ids.tolist() == rejected.input_ids.tolist()
        assert tokens.rejected.loss_mask.tolist() == rejected.loss_mask.tolist()


def test_an_empty_table():
    table = to_table([], [])
    assert table.schema == CANDIDATE_SCHEMA and from_table(table) == []
    assert rejected_from_table(to_table([], [], TARGET_SCHEMA)) == []


BYTES = byte_tokenizer(chat_template=CHATML.replace("<|im_end|>", "</s>"))
PLAIN_BYTES, CHAT_BYTES = (Encoder(BYTES, max_length=10_000, template=name) for name in ("plain", "chat"))
words = st.text(st.characters(exclude_categories=["Cs"]), min_size=1).filter(str.strip)


@settings(max_examples=60, deadline=None)
@given(st.lists(st.tuples(words, words), min_size=1, max_size=3))
def test_any_conversation_survives_tokenisation(turns):
    messages = tuple(
        Message(role, content) for turn in turns for role, content in zip(("user", "assistant"), turn, strict=True)
    )
    completions = [completion + "</s>" for _, completion in turns]
    for encoder in (PLAIN_BYTES, CHAT_BYTES):
        example = encoder.encode(messages)
        check(BYTES, example)
        assert supervised_texts(BYTES, example) == completions
        assert text(BYTES, prompt_tokens(example)) + completions[-1] == text(BYTES, example.input_ids)
    assert text(BYTES, PLAIN_BYTES.encode(messages).input_ids) == "\n".join(
        f"{prompt}\n{completion}</s>" for prompt, completion in turns
    )
    rendered = "".join(
        f"<|im_start|>user\n{prompt}</s>\n<|im_start|>assistant\n{completion}</s>\n" for prompt, completion in turns
    )
    assert text(BYTES, CHAT_BYTES.encode(messages).input_ids) == rendered[:-1]


def _takes(tokenizer, template: str, length: int, messages, rejected: str | None) -> bool:
    encoder = Encoder(tokenizer, max_length=length, template=template)
    try:
        encoder.encode(messages) if rejected is None else encoder.encode_pair(messages, rejected)
    except Untokenizable:
        return False
    return True


@settings(max_examples=30, deadline=None)
@given(st.lists(st.tuples(words, words), min_size=1, max_size=2), st.none() | words, st.sampled_from(["plain", "chat"]))
def test_the_least_length_is_the_first_one_that_is_taken(turns, rejected, template):
    messages = tuple(
        Message(role, content) for turn in turns for role, content in zip(("user", "assistant"), turn, strict=True)
    )
    tokenizer = PLAIN_BYTES.tokenizer if template == "plain" else CHAT_BYTES.tokenizer
    least = Encoder(tokenizer, max_length=8, template=template).least_length(messages, rejected)
    assert _takes(tokenizer, template, least, messages, rejected)
    assert least == 2 or not _takes(tokenizer, template, least - 1, messages, rejected)


# --- Texts without a prompt ------------------------------------------------------------------------------


@pytest.mark.parametrize("template", ["plain", CHATML])
@pytest.mark.parametrize("bos", [True, False])
def test_a_text_has_the_tokens_that_the_tokenizer_gives_it_and_an_end(template, bos):
    tokenizer = character_tokenizer(bos_by_default=bos)
    encoder = Encoder(tokenizer, max_length=40, template=template)
    for text in ("abc d", "<|user|>a<|assistant|>b", "abc</s>"):
        example = encoder.encode((Message("text", text),))
        # As TRL: EOS unless it is there; special tokens are what they are written as.
        assert example.input_ids.tolist() == tokenizer(text.removesuffix("</s>") + "</s>").input_ids
        assert example.loss_mask.tolist() == [False] + [True] * (len(example.input_ids) - 1)
        assert encoder.length((Message("text", text),)) == len(example.input_ids) and not example.truncated


def test_of_a_text_that_is_too_long_the_end_goes():
    tokenizer = character_tokenizer()
    example = Encoder(tokenizer, max_length=6).encode((Message("text", "abcdefgh"),))
    assert example.input_ids.tolist() == tokenizer("abcde").input_ids and example.truncated


def test_a_text_makes_no_pair_and_no_empty_one_is_taken():
    encoder = Encoder(character_tokenizer(bos_by_default=False), max_length=6)
    with pytest.raises(Untokenizable, match="no other completion"):
        encoder.encode_options((Message("text", "abc"),), ["d"])
    assert encoder.least_length((Message("text", "abcdefgh"),)) == 2
