"""Where attempts run. One line adds a compute: name → "module:Class"."""

LAUNCHERS = {
    "local": "service.adapters.launchers.local:LocalLauncher",
    "cloud-run": "service.adapters.launchers.cloud_run.launcher:CloudRunLauncher",
}
