"""The fault campaign injects the faults that occur in practice, many times, and counts what was lost.

`make chaos` runs every row of the table in docs/reliability.md; `python -m tests.chaos NAME…` runs some. Each row is a module with
`run(size) -> Row`: `full` is the campaign, `short` (tests/chaos/test_short.py, part of `make test`) the same faults, fewer of them.
What belongs here: breaking real parts (processes, files, connections, clocks) from outside and counting afterwards. What does not:
tests of one behavior, which have folders of their own.
"""
