"""URLs that a caller may name (a judge, embeddings, MLflow), pointed at what only the service can reach.

A deployment refuses each of them at submit and names the field. The local profile may call a judge on loopback, and never the service
itself.
"""

import socket
from collections.abc import Iterator

import httpx2

from tests.attack.campaign import Row, Size, make_row
from tests.attack.fixtures import World
from tests.attack.hostile_uploads import CanaryServer
from tests.attack.target import Json, run_target
from tests.unit.egress_targets import ALLOWED_URLS, HOSTILE_URLS

EVERY_NTH_IN_SHORT = 4
# How a caller could spell the machine that the service runs on; the service's own port follows.
OWN_HOSTS = (
    *("127.0.0.1", "localhost", "LOCALHOST", "localhost.", "[::1]", "0.0.0.0", "0", "127.1", "127.0.0.2", "2130706433", "0x7f000001"),
    *("[::ffff:127.0.0.1]", "[::]", "0177.0.0.1", "127.0.0.1.", "sub.localhost", socket.gethostname()),
)


def run(size: Size) -> Row:
    """Submit a training for every URL and field."""
    urls = HOSTILE_URLS[:: EVERY_NTH_IN_SHORT if size == "short" else 1]
    problems: list[str] = []
    with CanaryServer() as canary, run_target(slots=1, TUNESMITH_PUBLIC_URL="https://tunesmith.example.com") as target:
        world = World(target.owner())
        for url in (*urls, canary.url):
            problems += _check_url(world, url, refused=True)
        for url in ALLOWED_URLS:
            problems += _check_url(world, url, refused=False)
        problems += [f"the service connected to {hit}" for hit in canary.hits]
    with CanaryServer() as canary, run_target(slots=1) as target:
        world = World(target.owner())
        own_urls = [f"http://{host}:{target.port}/v1" for host in OWN_HOSTS]
        before = target.read_rows()
        for url in own_urls:
            problems += _check_url(world, url, refused=True)
        problems += ["a refused URL changed a record"] if target.read_rows() != before else []
        problems += _check_url(world, canary.url + "/v1", refused=False)  # as a judge on this machine would be
    measured = f"{len(urls) + 1} hostile URLs and {len(own_urls)} spellings of the service itself, in 3 fields each"
    return make_row("SSRF targets", "0 accepted, the field is named", measured, problems)


def _check_url(world: World, url: str, *, refused: bool) -> list[str]:
    problems: list[str] = []
    for field, config, dataset_id in _make_configs(url, world):
        body = world.train_body(training_config=config, processed_dataset_id=dataset_id)
        response = world.owner.request("POST", "/train", json=body)
        if not refused and response.status_code != 201:
            problems.append(f"{field} {url!r}: refused with {response.status_code}, and it is allowed: {response.text[:150]}")
        if refused and response.status_code not in (400, 422):
            problems.append(f"{field} {url[:60]!r}: answered {response.status_code}")
        elif refused and not _names(response, field):
            problems.append(f"{field} {url[:60]!r}: the answer names {response.json()['error']['param']}")
    return problems


def _make_configs(url: str, world: World) -> Iterator[tuple[str, Json, str]]:
    """The field, the training config that has the URL there, and a dataset for it."""
    base: Json = {"base_model_id": "tests/no-model"}
    judge = {"type": "score_model", "name": "judge", "base_url": url, "model": "judge"}
    cosine = {"type": "text_similarity", "name": "near", "metric": "cosine", "embedding_model": "near", "base_url": url}
    yield "base_url", base | {"trainer_type": "grpo", "reward_config": [judge]}, world.prompts_id
    yield "base_url", base | {"trainer_type": "grpo", "reward_config": [cosine]}, world.prompts_id
    yield "tracking_uri", base | {"mlflow_config": {"tracking_uri": url}}, world.dataset_id


def _names(response: httpx2.Response, field: str) -> bool:
    return field in str(response.json()["error"]["param"])
