"""From the rows of a dataset to tokens and labels. Here belongs nothing that trains."""
