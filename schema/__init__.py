"""The contract between callers, the service and the jobs: plain frozen pydantic values.

Here belong the request, the record, the spec, the events and the result. Here belongs nothing that does
I/O, knows a cloud, or needs more than pydantic and the standard library.
"""
