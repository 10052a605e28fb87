"""The `tunesmith` command line: a client of the HTTP API, and the way to start a service or a chat on this machine.

What belongs here: commands, and how their answers look in a terminal. What does not: anything that the HTTP API does not offer to other
programs. `service` and `jobs` are started as processes and never imported.
"""
