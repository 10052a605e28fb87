"""The fault campaign injects the faults that occur in practice many times and counts what is lost.

`make chaos` runs every row of the table in docs/reliability.md; `python -m tests.chaos NAME…` runs some. Each row is a module with
`run(size) -> Row`: `full` is the campaign; `short` (tests/chaos/test_short.py, part of `make test`) injects fewer of the same
faults.
What belongs here: code that breaks real parts (processes, files, connections, clocks) from outside and counts the damage. Tests of one
behavior belong in the other folders of tests/.
"""
