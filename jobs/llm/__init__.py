"""The family of language-model trainers: data, models, losses, trainers, evaluation, graders, exporters.

Code that every family needs belongs in `jobs/runtime`.
"""
