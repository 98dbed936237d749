"""Corpus: from files to tokenised examples.

`inbox` finds the files, `files` and `records` read and validate their records, `encoder` turns them into token ids with
the training loss mask. What is refused on the way is a row of the rejects table with its line, field and reason.
"""
