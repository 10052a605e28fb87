"""The fault campaign: what breaks in practice is broken here, often, and what was lost is counted.

`make chaos` runs every row of the table in docs/reliability.md; `python -m tests.chaos NAME…` some. One module a row, each with
`run(size) -> Row`: `full` is the campaign, `short` (tests/chaos/test_short.py, part of `make test`) the same faults, fewer of them.
What belongs here: breaking real parts (processes, files, connections, clocks) from outside and counting afterwards. What does not:
tests of one behaviour, which have folders of their own.
"""
