"""The trainers: one file per trainer type, each a function `train(config, context)` that reads top to bottom.

Here belong a trainer type's data, model, loss and evaluation. What all trainers share does not: the loop is in
`jobs/llm/training_loop.py`, the parts that preference trainers share are in `jobs/llm/preference.py`.
"""
