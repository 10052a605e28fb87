"""What is found in the rows that were kept: token lengths, languages, near-duplicates, personal data and secrets.

Nothing here changes or drops a row.
"""
