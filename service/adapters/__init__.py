"""Adapters: implementations of the core's ports, one file or folder per vendor.

Everything that calls a database, a cloud, a process or the Hub for the core belongs here. The core never imports from here.
"""
