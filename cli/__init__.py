"""The command line: a client of the HTTP API like any other, and the way to start a service on this machine.

Here belongs nothing that the API does not offer to other programs as well.
"""

from cli.app import main

__all__ = ["main"]
