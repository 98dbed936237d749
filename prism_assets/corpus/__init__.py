"""Corpus: from files to tokenised examples.

`inbox` finds the files, `files` and `records` read and validate their records, `encoder` turns them into token ids with
the training loss mask. A record that is not accepted is a row of the rejects table, with its
line, field and reason.
"""
