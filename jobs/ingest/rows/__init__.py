"""The rows of a dataset: their six forms, messages, tools, images and values, and what is wrong with one. How a file holds them does not
belong here."""
