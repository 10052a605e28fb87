"""How a model is judged beside its loss: what it answers, how good that is, and whether it is good enough to be published.

Nothing here trains, and nothing here knows a job: a model, rows and thresholds go in, numbers with their reasons come out. The
loss on held-out rows is measured where the model is trained.
"""
