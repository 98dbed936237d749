"""What MkDocs needs to know of this repository: pages that lie outside of docs/, and links between all of them.

Links are written as GitHub follows them, from file to file. On the site a link to a page leads to that page; one to
another file of the repository, which the site does not have, stays as its words alone. A link to nothing is left as it
is, so that `mkdocs build --strict` refuses it.
"""

import posixpath
import re
from pathlib import Path
from typing import Any

from mkdocs.structure.files import File, Files

ROOT = Path(__file__).resolve().parent.parent
# A file of the repository -> its page.
OUTSIDE = {
    "CHANGELOG.md": "changelog.md",
    "CONTRIBUTING.md": "contributing.md",
    "benchmarks/README.md": "benchmarks.md",
    **{
        f"examples/{name}/README.md": f"examples/{name}.md"
        for name in ("real_models", "safety_repair", "real_text", "repair_forward", "benchmarks", "notebook")
    },
}
_SOURCES = {page: source for source, page in OUTSIDE.items()}
_LINK = re.compile(r"(?<!!)\[((?:[^\[\]]|\[[^\]]*\])*)\]\(([^()\s]+)\)")


def on_files(files: Files, config: Any) -> Files:
    """Adds the pages from outside of docs/."""
    for source, page in OUTSIDE.items():
        files.append(File.generated(config, page, abs_src_path=str(ROOT / source)))
    return files


def on_page_markdown(markdown: str, page: Any, **_: Any) -> str:
    """Rewrites the links of a page."""
    place = page.file.src_uri
    source = _SOURCES.get(place, f"docs/{place}")
    fences = re.split(r"(^ *```.*?^ *```)", markdown, flags=re.MULTILINE | re.DOTALL)
    return "".join(
        text if text.lstrip().startswith("```") else _LINK.sub(lambda match: _link(match, source, place), text)
        for text in fences
    )


def _link(match: re.Match[str], source: str, place: str) -> str:
    words, target = match[1], match[2]
    path, hash_mark, anchor = target.partition("#")
    if not path or re.match(r"[a-z]+:", target):
        return match[0]
    file = posixpath.normpath(posixpath.join(posixpath.dirname(source), path))
    if (ROOT / file / "README.md").is_file():
        file = f"{file}/README.md"
    if file.startswith("docs/"):
        found = file.removeprefix("docs/")
    elif file in OUTSIDE:
        found = OUTSIDE[file]
    else:
        return words if (ROOT / file).exists() else match[0]
    return f"[{words}]({posixpath.relpath(found, posixpath.dirname(place) or '.')}{hash_mark}{anchor})"
