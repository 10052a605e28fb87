"""Where job records are kept. One line adds a store: name → "module:Class"."""

JOB_STORES = {
    "firestore": "service.adapters.jobstores.firestore.store:FirestoreJobStore",
    "memory": "service.adapters.jobstores.memory:MemoryJobStore",
    "sqlite": "service.adapters.jobstores.sqlite:SqliteJobStore",
}
