"""Datasets: checking and splitting uploaded rows, and the records of what was kept."""
