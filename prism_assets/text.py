"""Texts on one line, for tables and messages."""


def one_line(text: str, width: int) -> str:
    """`text` with every run of white space as one space, and with its end cut off beyond `width` characters."""
    line = " ".join(text.split())
    return line if len(line) <= width else line[: width - 1] + "…"
