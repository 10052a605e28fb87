"""Renders API responses as terminal text. Sending requests and parsing options do not belong here."""
