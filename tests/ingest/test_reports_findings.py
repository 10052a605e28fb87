"""Personal data and secrets in rows: what is found, what is left alone, and that nothing found is repeated."""

import base64
import json
import os
import random
import string

import pytest

from jobs.ingest.reports.personal_data import find_personal_data
from jobs.ingest.reports.secrets import find_secrets, may_have_secrets
from tests.ingest.report_harness import make_clean_rows, report_on, report_on_answers

ALPHABET = string.ascii_letters + string.digits


def make_token(prefix: str, length: int, alphabet: str = ALPHABET) -> str:
    """A made-up token; written here in full, it would look like a leaked one."""
    return prefix + "".join(random.Random(length).choices(alphabet, k=length))


def make_jwt(header: object, signature: str = "c2lnbmF0dXJlLW9mLWEtdGVzdC10b2tlbg") -> str:
    parts = [base64.urlsafe_b64encode(json.dumps(part).encode()).decode().rstrip("=") for part in (header, {"sub": "42", "admin": True})]
    return ".".join([*parts, signature])


PRIVATE_KEY = "-----BEGIN " + "RSA PRIVATE KEY-----\n" + make_token("", 64) + "\n" + make_token("", 63)

PERSONAL_DATA = {
    "maria.kowalska@web.de": "email",
    "j.smith+news@mail.ucla.edu": "email",
    "Call +49 30 901820 before noon": "phone",
    "or (212) 736-5000": "phone",
    "212-736-5000": "phone",
    "paid with 4532 0151 1283 0366": "credit_card",
    "credit card 4532015112830366": "credit_card",
    "DE44 5001 0517 5407 3249 31": "iban",
    "GB33BUKB20201555555555": "iban",
    "my number is 536-90-4399": "us_ssn",
    "login from 185.220.101.34": "ip_address",
    "2a00:1450:4001:82b:0:0:0:200e": "ip_address",
}
NO_PERSONAL_DATA = [
    "write to user@example.com or jane@test.org",
    "git@github.com:python/cpython.git",
    "result = a@b.transpose(); @app.route",
    "order 4532015112830366 was sent",
    "the test card 4242 4242 4242 4242",
    "4532 0151 1283 0367",
    "DE44 5001 0517 5407 3249 32",
    "SSN: 123-45-6789 or 000-12-3456 or 999-99-9999",
    "version 1.2.3.4, section 10.4.1.2, 192.168.178.101, 127.0.0.1, 8.8.8.8, 203.0.113.195",
    "2001:db8:0:0:0:0:0:1 and fe80::1 and 12:30:45 and std::vector",
    "phone 555-0123, 212-555-0123, (555) 123-4567",
    "2024-05-17 12:30:45, 1234567890, 3.14159265358979",
    "ISBN 978-3-16-148410-0, RFC 2616, 100-200-300",
    "0.4532015112830366",
]
SECRETS = {
    "aws_access_key": make_token("AK" + "IA", 16, string.ascii_uppercase),
    "google_api_key": make_token("AI" + "za", 35),
    "github_token": make_token("gh" + "p_", 36),
    "huggingface_token": make_token("h" + "f_", 34, string.ascii_letters),
    "openai_key": make_token("s" + "k-proj-", 20) + "T3Blbk" + "FJ" + make_token("", 24),
    "anthropic_key": make_token("sk-" + "ant-api03-", 80),
    "slack_token": make_token("xo" + "xb-824613907155-", 24),
    "stripe_key": make_token("sk_" + "live_", 24),
    "gitlab_token": make_token("gl" + "pat-", 20),
    "npm_token": make_token("np" + "m_", 36),
    "google_oauth_secret": make_token("GOC" + "SPX-", 28),
    "private_key": PRIVATE_KEY,
    "jwt": make_jwt({"alg": "HS256", "typ": "JWT"}),
    "url_password": "postgres://billing:" + "tr0ub4dor-9x" + "@db7.corp.net:5432/prod",
}
NO_SECRETS = [
    "AKIA" + "IOSFODNN7EXAMPLE",
    "AKIA" + "XXXXXXXXXXXXXXXX",
    "ghp_" + "x" * 36,
    "-----BEGIN " + "RSA PRIVATE KEY-----\n...\n-----END RSA PRIVATE KEY-----",
    "postgres://user:password@localhost/db, https://user:secret123@example.com, redis://:${REDIS_PASSWORD}@cache.corp.net",
    "mysql://root:changeme-please@db",
    make_jwt({"typ": "nothing"}),
    "hf_" + "your_token_here",
    "sk-your-key-here",
    "see https://docs.python.org/3/library/os.html#os.path and mail a@b.c",
]


@pytest.mark.parametrize(("text", "kind"), PERSONAL_DATA.items())
def test_personal_data_is_found_by_kind(text: str, kind: str) -> None:
    assert find_personal_data(f"Hello, {text}, thanks.") == {kind}


@pytest.mark.parametrize("text", NO_PERSONAL_DATA)
def test_examples_and_numbers_of_other_meaning_are_no_personal_data(text: str) -> None:
    assert find_personal_data(text) == set()


@pytest.mark.parametrize(("kind", "secret"), SECRETS.items(), ids=SECRETS)
def test_secrets_are_found_by_kind(kind: str, secret: str) -> None:
    text = f'config = "{secret}" # keep'
    assert find_secrets(text) == {kind}
    assert may_have_secrets(json.dumps(text).encode())


@pytest.mark.parametrize("text", NO_SECRETS)
def test_placeholders_are_no_secrets(text: str) -> None:
    assert find_secrets(text) == set()


def test_report_counts_rows_by_kind_and_names_the_first_ones() -> None:
    report = report_on_answers("Ask maria.kowalska@web.de", "It is fine.", "maria.kowalska@web.de, o.berg@kth.se", SECRETS["github_token"])
    assert [(finding.kind, finding.rows, finding.first_rows) for finding in report.personal_data] == [("email", 2, (1, 3))]
    assert [(finding.kind, finding.rows, finding.first_rows) for finding in report.secrets] == [("github_token", 1, (4,))]
    assert report.warnings == (
        "a row seems to have a secret (github_token), which a model can repeat; revoke it, and remove it from the file",
    )


def test_rows_of_the_held_out_split_are_named_apart() -> None:
    held_out = make_clean_rows(60)
    held_out[4]["completion"] = "Ask maria.kowalska@web.de"
    (finding,) = report_on(make_clean_rows()[60:], held_out).personal_data
    assert (finding.rows, finding.first_rows, finding.first_held_out_rows) == (1, (), (5,))


def test_report_never_repeats_what_was_found() -> None:
    report = report_on_answers(*SECRETS.values(), *PERSONAL_DATA).model_dump_json()
    found = ["kowalska", "901820", "4532", "5001", "4399", "185.220", *(secret[10:30] for secret in SECRETS.values())]
    assert [text for text in found if text in report] == []


def test_secrets_are_looked_for_in_rows_outside_the_sample(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("jobs.ingest.reports.build.REPORT_SAMPLE_ROWS", 100)
    rows = make_clean_rows()
    rows[1]["completion"] = f"{SECRETS['github_token']} of maria.kowalska@web.de"
    report = report_on(rows)
    assert report.sampled_rows == 100
    assert ([finding.first_rows for finding in report.secrets], report.personal_data) == ([(2,)], ())
    assert [finding.first_rows for finding in report_on(rows, full_report=True).personal_data] == [(2,)]


def test_a_process_of_its_own_finds_the_same(monkeypatch: pytest.MonkeyPatch) -> None:
    rows = make_clean_rows()
    for number, secret in enumerate(SECRETS.values()):
        rows[number * 7]["completion"] = f"use {secret} for it"
    rows[1]["completion"] = "write to maria.kowalska@web.de"
    expected = report_on(rows)
    assert (len(expected.secrets), len(expected.personal_data)) == (len(SECRETS), 1)
    monkeypatch.setattr("jobs.ingest.reports.finding_scan.MIN_WORKER_BYTES", 0)
    monkeypatch.setattr("threading.active_count", lambda: 1)  # pytest-xdist has a thread that only reads
    assert report_on(rows) == expected


def test_end_of_the_process_that_looks_for_findings_is_an_error(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("jobs.ingest.reports.finding_scan.MIN_WORKER_BYTES", 0)
    monkeypatch.setattr("threading.active_count", lambda: 1)
    monkeypatch.setattr("jobs.ingest.reports.finding_scan.scan_rows", lambda *_: os._exit(3))
    with pytest.raises(RuntimeError, match="ended with code 3"):
        report_on(make_clean_rows())
