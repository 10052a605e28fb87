"""Google Cloud and S3 on this machine, for tests and `make cloud-local`.

Here belong launchers of existing emulators, and emulators of our own that serve the real client libraries. Nothing that the service
or an attempt imports belongs here.
"""
