"""Rows as the text that is tokenised, in parts with and without loss: what a trainer without templates is given."""

from collections.abc import Sequence
from typing import TYPE_CHECKING

from prism_assets.corpus.records import TEXT_ROLE, Message
from prism_assets.corpus.template import TextSegment

if TYPE_CHECKING:
    from prism_assets.corpus.encoder import Encoder


def written_segments(encoder: "Encoder", messages: Sequence[Message]) -> list[TextSegment]:
    """A conversation, or a text, in parts that alternate between no loss and loss, BOS and EOS written out.

    The last part has loss. Each part is to be tokenised by itself, without special tokens being added.
    """
    bos = "" if encoder.leading_id is None else str(encoder.tokenizer.bos_token)
    eos = str(encoder.tokenizer.eos_token)
    if messages[0].role == TEXT_ROLE:
        text = messages[0].content
        start = "" if text.startswith(bos) else bos
        parts = [TextSegment(start, False), TextSegment(text if text.endswith(eos) else text + eos, True)]
    else:
        plain = [TextSegment(bos, False)] if encoder.is_plain else []
        parts = [*plain, *encoder.segments(messages)]
    merged: list[TextSegment] = []
    for part in parts:
        text = part.text + eos * part.append_eos
        if merged and merged[-1].supervised == part.supervised:
            merged[-1] = TextSegment(merged[-1].text + text, part.supervised)
        elif text:
            merged.append(TextSegment(text, part.supervised))
    return merged


def segment_tokens(encoder: "Encoder", segments: Sequence[TextSegment]) -> tuple[list[int], list[bool]]:
    """The tokens of segments, each tokenised by itself as trainers do, and which of them have loss."""
    ids: list[int] = []
    mask: list[bool] = []
    for segment in segments:
        new = encoder.tokenizer.encode(segment.text, add_special_tokens=False, verbose=False)
        ids += new
        mask += [segment.supervised] * len(new)
    return ids, mask
