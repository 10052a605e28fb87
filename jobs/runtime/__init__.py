"""What every attempt needs, whatever it trains: claim, context, events, stop signals, checkpoints, artifacts, provenance, trackers.

No family and no ML library belongs here: a family (`jobs/llm`) imports the runtime, never the reverse.
"""
