"""Google Cloud and S3 on this machine, for tests and `make cloud-local`.

Here belong emulators: programs that are started here, and servers that implement the real protocol for the real client libraries.
Nothing here is imported by the service or an attempt.
"""
