"""What is found in the rows that were kept: token lengths, languages, near-duplicates, personal data and secrets.

`build.py` joins them; `warnings.py` says in words what a person should know. Nothing here changes or drops a row, or keeps what was found
in one.
"""
