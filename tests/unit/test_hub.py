"""What the Hub's answers mean for a request, and that a Hub which does not answer means nothing."""

import pytest

from service.adapters.hub import account_of
from service.core.errors import InvalidRequest
from service.core.hub import check_all_ours, refuse_base, refuse_push
from service.core.ports import HubAccess, HubAccount

WRITER = HubAccount(user="ada", role="write", orgs={"lab": "write", "press": "read"})
READER = HubAccount(user="ada", role="read", orgs={})
FINE = HubAccount(user="ada", role="fineGrained", orgs={"lab": "admin"}, writable=frozenset({"lab", "ada/one"}))


@pytest.mark.parametrize(
    ("access", "param", "words"),
    [
        ("gated", "hf_token", "is gated, and a request without hf_token may not read it"),
        ("absent", "training_config.base_model_id", "does not exist on the Hub, or is private"),
        ("refused", "hf_token", "does not let"),
        ("bad_token", "hf_token", "does not know the hf_token"),
    ],
)
def test_a_base_that_cannot_be_read_is_refused_with_what_to_do(access: HubAccess, param: str, words: str) -> None:
    with pytest.raises(InvalidRequest) as refused:
        refuse_base("google/gemma-3-270m", access, has_token=False)
    assert (refused.value.param, words in refused.value.message) == (param, True)
    assert refused.value.hint


@pytest.mark.parametrize("access", ["yes", "unknown"])
def test_unknown_is_not_refused(access: HubAccess) -> None:
    refuse_base("google/gemma-3-270m", access, has_token=True)
    refuse_push("ada/tuned", access, None)


@pytest.mark.parametrize(
    ("repo_id", "access", "account", "words"),
    [
        ("ada/tuned", "bad_token", None, "does not know"),
        ("ada/tuned", "refused", None, "may not write to ada/tuned"),
        ("ada/tuned", "refused", READER, "can only read"),
        ("ada/tuned", "absent", READER, "can only read"),
        ("grace/tuned", "absent", WRITER, "cannot write to 'grace'"),
        ("press/tuned", "absent", WRITER, "cannot write to 'press'"),
        ("ada/two", "absent", FINE, "fine-grained and may not write to ada/two"),
        ("ada/two", "unknown", FINE, "fine-grained and may not write to ada/two"),
    ],
)
def test_a_push_that_would_fail_is_refused(repo_id: str, access: HubAccess, account: HubAccount | None, words: str) -> None:
    with pytest.raises(InvalidRequest) as refused:
        refuse_push(repo_id, access, account)
    assert words in refused.value.message
    assert refused.value.param in ("hf_token", "training_config.export_config.hf_repo_id")


@pytest.mark.parametrize(
    ("repo_id", "access", "account"),
    [
        ("ada/tuned", "yes", None),
        ("ada/tuned", "absent", WRITER),
        ("tuned", "absent", WRITER),
        ("lab/tuned", "absent", WRITER),
        ("lab/tuned", "absent", FINE),
        ("ada/one", "absent", FINE),
        ("ada/tuned", "absent", None),
        ("ada/tuned", "absent", HubAccount("ada", "", {})),
    ],
)
def test_a_push_that_may_work_is_accepted(repo_id: str, access: HubAccess, account: HubAccount | None) -> None:
    refuse_push(repo_id, access, account)


def test_what_the_hub_does_not_tell_is_not_held_against_a_token() -> None:
    assert account_of({"name": "ada"}) == HubAccount("ada", "", {})
    assert account_of({"name": "ada", "auth": {"accessToken": {"role": "fineGrained"}}}).role == ""
    assert account_of({"name": "ada", "orgs": [{"name": "lab"}]}).orgs == {"lab": "write"}


@pytest.mark.parametrize(("commits", "others"), [(["0", "a", "x"], 1), (["0", "x"], 1), ([], 0)])
def test_a_repository_with_anything_else_in_it_is_not_deleted(commits: list[str], others: int) -> None:
    with pytest.raises(InvalidRequest, match=f"{others} commits that are not of this job"):
        check_all_ours("ada/tuned", commits, {"a"})
    check_all_ours("ada/tuned", ["0", "a"], {"a", "b"})
