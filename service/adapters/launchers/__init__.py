"""Launchers: where attempts run.

Adapters of the Launcher port belong here. When to launch, retry or cancel is the core's decision.
"""

# One line adds a launcher: name → "module:Class".
LAUNCHERS = {
    "local": "service.adapters.launchers.local:LocalLauncher",
    "cloud-run": "service.adapters.launchers.cloud_run.launcher:CloudRunLauncher",
}
