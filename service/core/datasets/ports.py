"""The port of ingestion: what datasets need from a process beside the service."""

from typing import Protocol

from schema.ingestion import IngestOutcome, IngestTask, TokenLengthsOutcome, TokenLengthsTask


class Ingester(Protocol):
    """Carries out one ingestion beside the service, in a process without secrets, network and credentials."""

    def ingest(self, task: IngestTask, *, timeout_s: float | None = None) -> IngestOutcome:
        """Check, and unless only that is asked for, write the rows of files to the task's output folder.

        Raises IngestTimeout when it is not done in time, InvalidRequest for files that take more memory than is allowed, and Unavailable
        when it cannot be run here.
        """
        ...

    def count_tokens(self, task: TokenLengthsTask, *, timeout_s: float | None = None) -> TokenLengthsOutcome:
        """Count the tokens of a dataset's rows. Raises what `ingest` raises."""
        ...


class IngestTimeout(Exception):
    """The ingestion was ended because it took too long for a request."""
