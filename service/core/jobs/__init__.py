"""What can be done with jobs: submit, control, report, reconcile, export, delete.

HTTP, databases and launchers do not belong here: the adapters bring them through the ports.
"""
