"""Turns the rows of a dataset into tokens and labels. Code that trains does not belong here."""
