"""docs/formats.md, made from what reads records: `python -m prism_assets.corpus.formats_page > docs/formats.md`."""

import sys
from collections.abc import Mapping

from prism_assets.corpus.files import COMPRESSIONS, DATA_EXTENSIONS, DELIMITERS
from prism_assets.corpus.formats import LAYOUT_WORDS, RECORD_FIELDS
from prism_assets.corpus.turns import ROLES, SHAREGPT_ROLES, TURN_FIELDS

_BEGINNING = """# Record formats

What files may hold, and what each known field does. Made from the code: `python -m prism_assets.corpus.formats_page`
writes this page. A record that cannot be used is in the table `rejects` with line, field and reason
(`prism sql "SELECT kind, name, line, field, reason FROM rejects"`); a field that is known to no format is named once a
file in the log and in the metadata of `candidates`. What a record holds beside its conversation is kept in the table
`candidate_fields`.

## Files
"""
_FILES = f"""
Files of the inbox, of targets and held-out records may be {", ".join(f"`{one}`" for one in DATA_EXTENSIONS)}.
{", ".join(f"`{one}`" for one in COMPRESSIONS)} are decompressed. `.json` holds an array of objects, or one object a
line. {" and ".join(f"`{one}`" for one in DELIMITERS)} have names in the first line; an empty cell counts as absent, and
arrays of turns are written as JSON text. `.arrow` files are those of `Dataset.save_to_disk`: put the folder into the
inbox. Values of Parquet's and Arrow's type JSON are decoded. Null counts as absent.

Columns of other names are named in the settings: `candidates: {{columns: {{prompt: question, completion: answer}}}}`,
and `targets.<name>.columns` likewise.
"""
_END = """
## What becomes of a conversation

- It ends with the last assistant turn that is learned; what follows is in no loss and is left out.
- What the assistant says before the user does (a greeting) is kept without loss, and left out where the chat template
  refuses it.
- Where the template knows no system turn, its text leads the first user turn (`prism doctor` says which roles the
  template writes).
- A record is rejected where the template leaves out the text of a system, user or tool turn, a call of a tool or the
  last turn's reasoning, or cannot say where an answer begins or ends. The plain format has no place for tools
  and reasoning.
- Where it has more tokens than `tokenization.max_length`, the earliest exchanges go first, then the start of the
  longest user text. Headers, system turn and completion stay. Such rows are counted (`truncated`, check
  `prompts_whole`). Of a text without a prompt the end goes.
"""


def formats_page() -> str:
    """The page."""
    layouts = {", ".join(layout): words for layout, words in LAYOUT_WORDS.items()}
    return "".join(
        (
            _BEGINNING,
            _FILES,
            "\n## Layouts\n\nThe first whose fields are all there is taken.\n\n",
            _table("fields", "what they are", layouts),
            "\n## Fields of a record\n\n",
            _table("field", "what it does", RECORD_FIELDS),
            "\n## Fields of a turn\n\n",
            _table("field", "what it does", TURN_FIELDS),
            "\n## Roles\n\n",
            _table(
                "role", "speaks as", {**SHAREGPT_ROLES, **ROLES, "function_call": "assistant, with a call of a tool"}
            ),
            _END,
        )
    )


def _table(first: str, second: str, rows: Mapping[str, str]) -> str:
    lines = [f"| {first} | {second} |", "|---|---|"]
    lines += [f"| {', '.join(f'`{one}`' for one in names.split(', '))} | {words} |" for names, words in rows.items()]
    return "\n".join(lines) + "\n"


if __name__ == "__main__":
    sys.stdout.write(formats_page())  # of the code, none of it data
