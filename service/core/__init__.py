"""What the service does: jobs, datasets, the checks and the state machine they share, and the ports to everything else.

HTTP, SQL and vendor SDKs do not belong here: the API and the adapters have them.
"""
