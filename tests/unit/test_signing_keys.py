"""Replacing the signing key: what runs goes on, and what was stolen ends when the operator says so."""

import stat
from datetime import timedelta
from pathlib import Path

import pytest

from service.adapters.secrets.signing_keys import KEY_FILE, PREVIOUS_KEYS_FILE, load_signing_keys, rotate_signing_key
from service.core.errors import Unauthorized, Unavailable
from service.core.tokens import LAUNCH_TOKEN_TTL, TokenSigner
from service.settings import Settings
from tests.factories import START
from tests.fakes import FakeClock
from tests.unit.api_harness import get_services, run_test_service

LATER = START + LAUNCH_TOKEN_TTL - timedelta(hours=1)


def test_rotation_keeps_the_replaced_keys_until_their_tokens_expire(tmp_path: Path) -> None:
    first, _ = load_signing_keys(tmp_path, START)
    rotate_signing_key(tmp_path, START)
    second, previous = load_signing_keys(tmp_path, START)
    assert (first != second, previous) == (True, (first,))
    rotate_signing_key(tmp_path, LATER)
    third, previous = load_signing_keys(tmp_path, LATER)
    assert (len({first, second, third}), previous) == (3, (second, first))
    assert load_signing_keys(tmp_path, START + LAUNCH_TOKEN_TTL)[1] == (second,)


def test_key_files_are_private(tmp_path: Path) -> None:
    rotate_signing_key(tmp_path, START)
    assert {stat.S_IMODE((tmp_path / name).stat().st_mode) for name in (KEY_FILE, PREVIOUS_KEYS_FILE)} == {0o600}
    assert sorted(path.name for path in tmp_path.iterdir()) == [KEY_FILE, PREVIOUS_KEYS_FILE]


def test_stolen_key_is_forgotten_on_request(tmp_path: Path) -> None:
    load_signing_keys(tmp_path, START)
    rotate_signing_key(tmp_path, START)
    rotate_signing_key(tmp_path, START, keep_previous=False)
    assert load_signing_keys(tmp_path, START)[1] == ()


def test_damaged_list_of_previous_keys_is_reported(tmp_path: Path) -> None:
    (tmp_path / PREVIOUS_KEYS_FILE).write_text("[{}]")
    with pytest.raises(Unavailable, match=PREVIOUS_KEYS_FILE):
        load_signing_keys(tmp_path, START)


def test_tokens_and_links_survive_a_rotation(tmp_path: Path) -> None:
    with run_test_service(tmp_path) as client:
        tokens = get_services(client).tokens
        launch, attempt, link = tokens.sign_launch_token("j", 1), tokens.sign_attempt_token("j", 1), tokens.sign_file_token("k", "f", 900)
        now = get_services(client).jobs.repository.clock()
    rotate_signing_key(tmp_path, now)
    with run_test_service(tmp_path) as client:
        tokens = get_services(client).tokens
        tokens.verify_launch_token(launch, "j", 1)
        tokens.verify_attempt_token(attempt, "j", 1)
        assert tokens.read_file_token(link) == ("k", "f")
    rotate_signing_key(tmp_path, now, keep_previous=False)
    with run_test_service(tmp_path) as client, pytest.raises(Unauthorized):
        get_services(client).tokens.verify_attempt_token(attempt, "j", 1)


def test_previous_keys_in_the_settings_are_accepted(tmp_path: Path) -> None:
    old = TokenSigner(b"o" * 32, FakeClock())
    settings = {"signing_key": "n" * 32, "signing_key_previous": f"{'x' * 32}, {'o' * 32}"}
    with run_test_service(tmp_path, **settings) as client:
        clock = FakeClock(get_services(client).jobs.repository.clock())
        token = TokenSigner(b"o" * 32, clock).sign_attempt_token("j", 1)
        get_services(client).tokens.verify_attempt_token(token, "j", 1)
        with pytest.raises(Unauthorized):
            old.verify_attempt_token(get_services(client).tokens.sign_attempt_token("j", 1), "j", 1)


@pytest.mark.parametrize(
    "changes", [{"signing_key_previous": "o" * 32}, {"signing_key": "n" * 32, "signing_key_previous": f"{'x' * 32},short"}]
)
def test_incomplete_previous_keys_are_refused(tmp_path: Path, changes: dict[str, str]) -> None:
    with pytest.raises(ValueError, match="TUNESMITH_SIGNING_KEY_PREVIOUS"):
        Settings(home=tmp_path, **changes)  # type: ignore[arg-type]
