"""Base models: which the model store has, what each of them is, and which one a name means.

Models that jobs made do not belong here: they are artifacts of their job.
"""
