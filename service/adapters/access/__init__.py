"""Access stores: where API keys and the audit log are kept. Each stands beside the job store of the same name."""

# One line adds a store: name → "module:Class".
ACCESS_STORES = {
    "firestore": "service.adapters.access.firestore:FirestoreAccessStore",
    "memory": "service.adapters.access.memory:MemoryAccessStore",
    "sqlite": "service.adapters.access.sqlite:SqliteAccessStore",
}
MAX_LISTED_KEYS = 1000
