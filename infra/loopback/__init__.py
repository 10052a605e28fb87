"""Google Cloud and S3 on this machine, for tests and `make cloud-local`.

Here belong emulators started by their own programs, and stand-ins that speak the real protocol to the real client libraries. Here
belongs nothing that the service or an attempt imports.
"""
