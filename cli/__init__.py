"""The `tunesmith` command line: a client of the HTTP API, and the way to start a service or a chat on this machine.

Commands and the rendering of their output belong here. Features that the HTTP API does not offer to other programs do not. `service` and
`jobs` are started as processes and are never imported.
"""
