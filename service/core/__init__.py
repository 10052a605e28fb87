"""What the service does, in our own words: jobs, datasets, and the rules they follow.

Here belong pure decisions and the ports they need. Here belongs no HTTP, no SQL, no vendor.
"""
