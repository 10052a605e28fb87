"""Emulators that more than one contract suite needs."""

from tests.contract.cloud_run_fixture import cloud_run, launcher
from tests.contract.firestore_fixture import firestore_emulator_host, firestore_project
from tests.contract.object_fixtures import cloud_storage_url, new_store, s3_url

__all__ = ["cloud_run", "cloud_storage_url", "firestore_emulator_host", "firestore_project", "launcher", "new_store", "s3_url"]
