"""The Cloud Run launcher: attempts run as executions of Cloud Run jobs, one job resource per hardware profile.

Code that is specific to Cloud Run's API belongs here: building the request that starts an attempt (`render`), sending it (`launcher`),
and reading the responses (`errors`, `exit_reasons`). When to launch, retry or cancel is the core's decision and does not belong here.
"""
