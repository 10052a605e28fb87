"""Reads, commits and queries on one Firestore database, bounded by deadlines and retried."""

# pyright: reportMissingTypeStubs=false, reportUnknownMemberType=false, reportUnknownVariableType=false, reportUnknownArgumentType=false
# The library's own annotations are partial; what comes out of documents gets its type where it is read.

import itertools
import random
import time
from collections.abc import Callable, Iterable, Sequence
from typing import Any, TypeAlias, TypeVar

import grpc
from google.api_core import exceptions as google_errors
from google.api_core.retry import Retry
from google.auth.exceptions import DefaultCredentialsError
from google.cloud.firestore import DELETE_FIELD, Client, DocumentReference, DocumentSnapshot, Query, WriteBatch

from service.adapters.jobstores.firestore.errors import (
    AMBIGUOUS_ERRORS,
    WRITE_CONFLICT_ERRORS,
    PreconditionFailed,
    is_database_error,
    translate_error,
)
from service.core.errors import Unavailable
from storage.deadline import MIN_TIMEOUT_S, deadline, remaining_s

CALL_TIMEOUT_S = 10.0  # for a call of the store, unless its caller set a shorter deadline
RPC_TIMEOUT_S = 2.0  # for one RPC: shorter than an API request's 5 s, so that there is time to look for a lost answer
MAX_RECONNECT_BACKOFF_MS = 2000  # gRPC's own 120 s would keep the service away for two minutes after the network is back
INITIAL_BACKOFF_S, MAX_BACKOFF_S = 0.02, 0.5
NO_MESSAGE_LIMIT = [("grpc.max_send_message_length", -1), ("grpc.max_receive_message_length", -1)]  # as the library has it

# None would do for most calls, but a query's stream calls the policy's methods.
NO_RETRIES = Retry(predicate=lambda _: False)

Fields = dict[str, object]
Snapshot: TypeAlias = DocumentSnapshot[DocumentReference]
ReturnT = TypeVar("ReturnT")


class Database:
    """One database in native mode. All threads share one gRPC channel."""

    def __init__(self, project_id: str, database: str) -> None:
        self._project_id = project_id
        self._name = database
        try:
            self.client = _Client(project=project_id, database=database)
        except DefaultCredentialsError as error:
            raise Unavailable(
                "there are no Google credentials for Firestore",
                hint="on Cloud Run they come from the service account; elsewhere, run: gcloud auth application-default login",
            ) from error
        self.client.open()

    def run_with_retry(self, step: Callable[[], ReturnT]) -> ReturnT:
        """Repeat a step until it succeeds, is refused, or the caller's deadline passes.

        A step reads, decides and commits; it must recognize its own earlier commit whose answer was lost.
        """
        with deadline(CALL_TIMEOUT_S):
            for retries in itertools.count():
                try:
                    return step()
                except (PreconditionFailed, *AMBIGUOUS_ERRORS) as error:
                    pause_s = min(INITIAL_BACKOFF_S * 2**retries, MAX_BACKOFF_S) * random.uniform(0.5, 1)  # noqa: S311  # no secret
                    if remaining_s(CALL_TIMEOUT_S) - pause_s <= MIN_TIMEOUT_S:
                        raise translate_error(error, self._project_id, self._name) from error
                    time.sleep(pause_s)
                except google_errors.GoogleAPICallError as error:
                    raise translate_error(error, self._project_id, self._name) from error
        raise AssertionError("the loop ends by returning or raising")

    # --- inside a step -----------------------------------------------------------------------------------------------

    def get(self, doc_ref: DocumentReference, *fields: str) -> Snapshot:
        """A document, or only some of its fields."""
        return doc_ref.get(fields or None, retry=NO_RETRIES, timeout=remaining_s(RPC_TIMEOUT_S))

    def get_all(self, doc_refs: Sequence[DocumentReference], *fields: str) -> list[Snapshot]:
        """Several documents as of one moment, in the order given."""
        snapshots = {
            snapshot.id + snapshot.reference.parent.id: snapshot
            for snapshot in self.client.get_all(list(doc_refs), fields, retry=NO_RETRIES, timeout=remaining_s(RPC_TIMEOUT_S))
        }
        return [snapshots[doc_ref.id + doc_ref.parent.id] for doc_ref in doc_refs]

    def set_if_unchanged(self, batch: WriteBatch, stored: Snapshot, fields: Fields) -> None:
        """Write a document if it is as it was read, or still absent. A field that is None is removed."""
        if stored.exists:
            unchanged = self.client.write_option(last_update_time=stored.update_time)
            batch.update(stored.reference, {name: DELETE_FIELD if value is None else value for name, value in fields.items()}, unchanged)
        else:
            batch.create(stored.reference, {name: value for name, value in fields.items() if value is not None})

    def commit(self, batch: WriteBatch) -> None:
        """Apply all writes or none. Raises PreconditionFailed, or one of AMBIGUOUS_ERRORS, after which they may have been applied."""
        try:
            batch.commit(retry=NO_RETRIES, timeout=remaining_s(RPC_TIMEOUT_S))
        except WRITE_CONFLICT_ERRORS as error:
            if is_database_error(error):
                raise
            raise PreconditionFailed from error

    # --- complete calls ----------------------------------------------------------------------------------------------

    def query(self, query: Query) -> list[Snapshot]:
        """All documents that match a query. Raises Unavailable."""
        return self.run_with_retry(lambda: list(query.get(retry=NO_RETRIES, timeout=remaining_s(RPC_TIMEOUT_S))))

    def delete(self, doc_refs: Iterable[DocumentReference]) -> None:
        """Delete documents in one commit; those that do not exist are ignored. Raises Unavailable."""
        batch = self.client.batch()
        for doc_ref in doc_refs:
            batch.delete(doc_ref)
        self.run_with_retry(lambda: self.commit(batch))

    def close(self) -> None:
        """Close the channel."""
        self.client.close()


class _Client(Client):
    """Google's client over a channel that reconnects soon after the network is back."""

    # The library offers no way to set how long gRPC waits between attempts to connect.
    def _firestore_api_helper(self, transport: Any, client_class: Any, client_module: Any) -> Any:  # noqa: ANN401, ARG002  # the library's own
        if self._firestore_api_internal is None:
            options = [("grpc.keepalive_time_ms", 30_000), ("grpc.max_reconnect_backoff_ms", MAX_RECONNECT_BACKOFF_MS), *NO_MESSAGE_LIMIT]
            if self._emulator_host is not None:
                channel = grpc.insecure_channel(self._emulator_host, options)
            else:
                channel = transport.create_channel(self._target, credentials=self._credentials, options=options)
            self._firestore_api_internal = client_class(transport=transport(host=self._target, channel=channel))
        return self._firestore_api_internal

    def open(self) -> None:
        """Create the channel now, before several threads would each create one."""
        assert self._firestore_api

    def close(self) -> None:
        """Close the channel."""
        self._firestore_api.transport.close()
