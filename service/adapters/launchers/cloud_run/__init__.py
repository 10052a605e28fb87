"""The Cloud Run launcher: attempts run as executions of Cloud Run jobs, one job resource per hardware profile.

Here belongs what knows Cloud Run's API: the request that starts an attempt (`render`), sending it (`launcher`), and reading what comes
back (`errors`, `exit_reasons`). When to launch, retry or cancel is the core's decision and does not belong here.
"""
