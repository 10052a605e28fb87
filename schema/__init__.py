"""The contract between callers, the service and the jobs: plain frozen pydantic values.

Here belong requests, records, specs, events and results. What does I/O, knows a cloud, or needs more than pydantic and the standard
library does not belong here.
"""
