"""`s3://bucket/…`: objects of Amazon S3, or with `endpoint_url` of another server that speaks its protocol."""

from contextlib import nullcontext
from typing import TYPE_CHECKING

from jobs.ingest.sources import Downloaded, SourceRequest
from jobs.ingest.sources.objects import download_objects
from jobs.runtime.egress import check_url, guard_connections
from jobs.runtime.errors import JobFailed
from schema.egress import EgressRefused
from schema.sources import BucketSource, parse_source

if TYPE_CHECKING:
    from storage.s3 import S3Store


def download(request: SourceRequest) -> Downloaded:
    """Download every object that the source names. Raises JobFailed."""
    source, endpoint_url = parse_source(request.config.source), request.config.endpoint_url
    assert isinstance(source, BucketSource)
    store = _open_store(request, f"s3://{source.bucket}")
    try:
        # All connections are made by this thread, also those of a redirect.
        guard = guard_connections(check_url(endpoint_url, request.policy), request.policy) if endpoint_url else nullcontext()
        with guard:
            return download_objects(request, source, store)
    except EgressRefused as error:
        raise JobFailed("invalid_config", f"source_credentials.endpoint_url is refused: {error}", error.hint) from error
    finally:
        store.close()


def _open_store(request: SourceRequest, url: str) -> "S3Store":
    import boto3

    from storage.s3 import S3Login, S3Store

    config, secrets = request.config, request.secrets
    if config.rights == "deployment" and boto3.Session().get_credentials() is not None:
        return S3Store(url)
    return S3Store(
        url,
        login=S3Login(
            access_key_id=secrets.get("access_key_id"),
            secret_access_key=secrets.get("secret_access_key"),
            session_token=secrets.get("session_token"),
            endpoint_url=config.endpoint_url,
            region=config.region,
        ),
    )
