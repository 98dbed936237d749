"""Corpus: from files to tokenised examples.

``inbox`` finds the files, ``examples`` reads and validates their records, ``tokenization`` turns them into
token ids with the training loss mask. What is refused on the way is a row of the rejects table with its line,
field and reason.
"""
