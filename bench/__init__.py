"""Benchmarks of the service and the trainer, next to comparable servers and trainers.

`make bench` runs all of them; `python -m bench NAME…` runs some. Each benchmark is one file with
`measure(context) -> list[Measurement]`; the other files are shared. Here belong measurements, over HTTP, of a service that is
started as a user starts it. Tests do not belong here (nothing fails because a machine is slow), nor does any change that the
service would need only to be measured.
"""
