"""The Firestore job store, for deployments on Google Cloud. Any number of service processes may share one database.

Code that is specific to Firestore belongs here: documents, commits, queries, events and errors. Rules that every job store follows are in
`service/core/job_store_rules.py` and do not belong here.
"""
