"""What can be done with jobs: one module per concern, each a small class over one JobRepository.

submit, control, export and queries serve callers; attempts serves attempts; reconcile and launch serve the reconciler; `assembly`
builds them. HTTP, databases and launchers do not belong here: the adapters bring them through the ports.
"""
