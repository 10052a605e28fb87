"""What every attempt needs, whatever it trains: claim, context, events, stop signals, checkpoints, artifacts, provenance, trackers.

No family and no ML library belongs here. A family imports the runtime; the runtime finds a family's functions through
the training config (`family.py`).
"""
