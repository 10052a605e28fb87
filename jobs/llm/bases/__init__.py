"""Puts base models into the model store: from the Hub, or from a folder. `python -m jobs.llm.bases --help`; `tunesmith models` runs it.

What trainers do with a base does not belong here.
"""
