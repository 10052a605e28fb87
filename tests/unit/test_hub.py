"""How the Hub's answers decide whether a request is rejected. Unknown access rejects nothing."""

import pytest

from service.adapters.hub import parse_account
from service.core.errors import InvalidRequest
from service.core.ports import HubAccess, HubAccount
from service.core.validation.hub import check_base_access, check_only_our_commits, check_push_access

WRITER = HubAccount(user="ada", role="write", orgs={"lab": "write", "press": "read"})
READER = HubAccount(user="ada", role="read", orgs={})
FINE_GRAINED = HubAccount(user="ada", role="fineGrained", orgs={"lab": "admin"}, writable=frozenset({"lab", "ada/one"}))


@pytest.mark.parametrize(
    ("access", "param", "message"),
    [
        ("gated", "hf_token", "is gated, and a request without hf_token may not read it"),
        ("absent", "training_config.base_model_id", "does not exist on the Hub, or is private"),
        ("refused", "hf_token", "does not let"),
        ("bad_token", "hf_token", "rejects the hf_token"),
    ],
)
def test_unreadable_base_model_is_rejected_with_hint(access: HubAccess, param: str, message: str) -> None:
    with pytest.raises(InvalidRequest) as excinfo:
        check_base_access("google/gemma-3-270m", access, has_token=False)
    assert (excinfo.value.param, message in excinfo.value.message) == (param, True)
    assert excinfo.value.hint


@pytest.mark.parametrize("access", ["yes", "unknown"])
def test_unknown_access_is_accepted(access: HubAccess) -> None:
    check_base_access("google/gemma-3-270m", access, has_token=True)
    check_push_access("ada/tuned", access, None)


@pytest.mark.parametrize(
    ("repo_id", "access", "account", "message"),
    [
        ("ada/tuned", "bad_token", None, "rejects the hf_token"),
        ("ada/tuned", "refused", None, "may not write to ada/tuned"),
        ("ada/tuned", "refused", READER, "is read-only"),
        ("ada/tuned", "absent", READER, "is read-only"),
        ("grace/tuned", "absent", WRITER, "cannot write to 'grace'"),
        ("press/tuned", "absent", WRITER, "cannot write to 'press'"),
        ("ada/two", "absent", FINE_GRAINED, "fine-grained and may not write to ada/two"),
        ("ada/two", "unknown", FINE_GRAINED, "fine-grained and may not write to ada/two"),
    ],
)
def test_push_without_write_access_is_rejected(repo_id: str, access: HubAccess, account: HubAccount | None, message: str) -> None:
    with pytest.raises(InvalidRequest) as excinfo:
        check_push_access(repo_id, access, account)
    assert message in excinfo.value.message
    assert excinfo.value.param in ("hf_token", "training_config.export_config.hf_repo_id")


@pytest.mark.parametrize(
    ("repo_id", "access", "account"),
    [
        ("ada/tuned", "yes", None),
        ("ada/tuned", "absent", WRITER),
        ("tuned", "absent", WRITER),
        ("lab/tuned", "absent", WRITER),
        ("lab/tuned", "absent", FINE_GRAINED),
        ("ada/one", "absent", FINE_GRAINED),
        ("ada/tuned", "absent", None),
        ("ada/tuned", "absent", HubAccount("ada", "", {})),
    ],
)
def test_push_with_possible_write_access_is_accepted(repo_id: str, access: HubAccess, account: HubAccount | None) -> None:
    check_push_access(repo_id, access, account)


def test_missing_account_fields_do_not_restrict_token() -> None:
    assert parse_account({"name": "ada"}) == HubAccount("ada", "", {})
    assert parse_account({"name": "ada", "auth": {"accessToken": {"role": "fineGrained"}}}).role == ""
    assert parse_account({"name": "ada", "orgs": [{"name": "lab"}]}).orgs == {"lab": "write"}


@pytest.mark.parametrize(("commits", "others"), [(["0", "a", "x"], 1), (["0", "x"], 1), ([], 0)])
def test_repository_with_foreign_commits_is_not_deleted(commits: list[str], others: int) -> None:
    with pytest.raises(InvalidRequest, match=f"{others} commits that are not of this job"):
        check_only_our_commits("ada/tuned", commits, {"a"})
    check_only_our_commits("ada/tuned", ["0", "a"], {"a", "b"})
