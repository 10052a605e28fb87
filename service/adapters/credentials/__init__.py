"""Credentials with which attempts reach the object stores.

Adapters of the CredentialIssuer port belong here, one file per vendor. What an attempt may reach is not decided here.
"""
