"""How fast and how small the service is, side by side with servers that keep comparable records.

`make bench` measures everything; `python -m bench NAME…` some. One file a benchmark, each with
`measure(scene) -> list[Figure]`; the rest is what they share. What belongs here: measuring, through HTTP, a service that
is started as a user starts it. What does not: tests (nothing here fails because a machine is slow), and any change to
the service for the sake of a figure.
"""
