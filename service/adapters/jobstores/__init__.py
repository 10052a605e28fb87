"""Job stores: where the records of jobs, events and datasets are kept.

Adapters of the JobStore port and the code they share belong here. Rules that hold for every store are in service/core/job_store_rules.py.
"""

# One line adds a store: name → "module:Class".
JOB_STORES = {
    "firestore": "service.adapters.jobstores.firestore.store:FirestoreJobStore",
    "memory": "service.adapters.jobstores.memory:MemoryJobStore",
    "sqlite": "service.adapters.jobstores.sqlite:SqliteJobStore",
}
