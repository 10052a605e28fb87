"""What a training takes: memory, time, disk and money. The only estimator, for the service and the jobs.

One file per family, beside `disk` and `prices`, which families share. Pure functions over plain numbers belong here, and their
coefficients as named constants with their origin. Reading files, asking a device and deciding what follows from an estimate do not. It
imports the standard library only, not even pydantic.
"""
