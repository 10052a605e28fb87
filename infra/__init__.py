"""Deployment, local emulators, the demo with its model and data, and the installation of llama.cpp.

Nothing here is imported by the service, the jobs or the command line.
"""
