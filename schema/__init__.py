"""The contract between callers, the service and the jobs: plain frozen pydantic values.

Requests, records, specs, events and results belong here. Code that does I/O, depends on a cloud, or needs more than pydantic and the
standard library does not.
"""
