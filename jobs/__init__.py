"""What runs on the compute: one process works on one attempt of one job, `python -m jobs.run`.

`runtime/` is what every attempt needs; each other folder is a family of trainers with the exporters of its models. Nothing here imports
the service, a launcher or a cloud SDK: an attempt and the service exchange JSON (`schema/`) over HTTP and objects in a store (`storage/`).
Heavy libraries are imported inside the functions that use them, so that an attempt claims and reports before they are loaded.
"""
