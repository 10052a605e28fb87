"""What runs where the compute is: one process works at one attempt of one job, `python -m jobs.run`.

Here belong the trainers, the exporters, the trackers and the way an attempt talks: claim, spec, events, result. Nothing
here knows the service's code, a launcher or a cloud; they meet only as JSON (`schema/`) over HTTP and in the object store
(`storage/`). Heavy libraries are imported inside the functions that use them, so that an attempt speaks at once.
"""
