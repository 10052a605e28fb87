"""Evaluation beside the loss: generations, text metrics and lm-evaluation-harness tasks.

A model, rows and settings go in, numbers and their reasons come out. Code that trains does not belong here, nor code that knows the job.
`jobs/llm/loss.py` measures the loss on held-out rows.
"""
