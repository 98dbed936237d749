"""The template that rows were scored under, as one Jinja text that renders the same wherever it is applied."""

import json
from typing import TYPE_CHECKING

from prism_assets.corpus.template import FIXED_DATE_MACRO, TEMPLATE_ARGUMENTS, resolve_template

if TYPE_CHECKING:
    from prism_assets.corpus.encoder import Encoder

# Turns joined by the separator, each of the assistant's ended by EOS: `corpus.template.plain_segments`.
_PLAIN = (
    "{{{{ {start} }}}}"
    "{{% for message in messages %}}"
    "{{% if not loop.first %}}{{{{ {separator} }}}}{{% endif %}}"
    "{{{{ message['content'] }}}}"
    "{{% if message['role'] == 'assistant' %}}{{{{ {end} }}}}{{% endif %}}"
    "{{% endfor %}}"
    "{{% if add_generation_prompt %}}{{{{ {separator} }}}}{{% endif %}}"
)


def template_file(encoder: "Encoder", template: str) -> str:
    """The Jinja text of a setting `tokenization.template`: a tokenizer's own, the setting's, or the plain format's.

    What is handed to a template beside the turns is written into it as a default, and the date is fixed, so that no
    argument has to be passed on.
    """
    text = resolve_template(encoder.tokenizer, template)
    if text is None:
        start = "" if encoder.leading_id is None else encoder.tokenizer.bos_token
        parts = {"start": start, "separator": encoder.separator, "end": encoder.tokenizer.eos_token}
        return _PLAIN.format(**{name: _quoted(str(part)) for name, part in parts.items()})
    defaults = "".join(
        f"{{% if {name} is not defined %}}{{% set {name} = {json.dumps(value)} %}}{{% endif %}}"
        for name, value in TEMPLATE_ARGUMENTS.items()
        if name in text
    )
    # Chat templates are rendered without the line end after a block: the text begins at the start of a line, as before.
    return defaults + "\n" * bool(defaults) + FIXED_DATE_MACRO * ("strftime_now" in text) + text


def _quoted(text: str) -> str:
    """A text as a Jinja literal."""
    return json.dumps(text, ensure_ascii=False)
