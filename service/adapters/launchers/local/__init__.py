"""The local launcher: attempts run as child processes on the service's own machine.

What finds, starts and ends processes belongs here, and what this machine is: its device and the environments installed on it.
"""
