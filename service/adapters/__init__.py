"""Adapters: implementations of the core's ports, one file or folder per vendor.

Here belongs everything that calls a database, a cloud, a process or the Hub for the core. The core never imports from here.
"""
