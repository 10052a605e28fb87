"""Marks in the model bucket that say which deployment launched a job, so that several deployments can share a bucket.

deployments/{deployment_id}/jobs/{job_id}.json   when the job was last launched

The mark of a job is written before anything else of it, and outlives the job's deletion: an attempt that nobody could reach may write
files after that. A cleanup deletes only files of jobs that have the deployment's own mark, and at last the mark.
"""

import json
from collections.abc import Iterator
from dataclasses import dataclass
from datetime import datetime

from storage import NoSuchObject, ObjectStore


@dataclass(frozen=True)
class JobMarks:
    """The marks of one deployment."""

    models: ObjectStore
    deployment_id: str

    def write(self, job_id: str, now: datetime) -> None:
        """Mark a job that is about to be launched. Raises StorageError."""
        self.models.write(self._key(job_id), json.dumps({"launched_at": now.isoformat()}).encode())

    def find_launch(self, job_id: str) -> datetime | None:
        """When this deployment last launched the job; None if it never did, or if the mark is not readable. Raises StorageError."""
        try:
            return datetime.fromisoformat(json.loads(self.models.read(self._key(job_id)))["launched_at"])
        except (NoSuchObject, ValueError, KeyError, TypeError):
            return None

    def delete(self, job_id: str) -> None:
        """Delete the mark of a job. Raises StorageError."""
        self.models.delete(self._key(job_id))

    def iter_job_ids(self) -> Iterator[str]:
        """The marked jobs, whether or not they still exist. Raises StorageError."""
        prefix = self._key("").removesuffix(".json")
        for stored in self.models.iter_objects(prefix):
            yield stored.key.removeprefix(prefix).removesuffix(".json")

    def _key(self, job_id: str) -> str:
        return f"deployments/{self.deployment_id}/jobs/{job_id}.json"
