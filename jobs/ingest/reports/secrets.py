"""Suspected secrets in texts: private keys, tokens of well-known services, and passwords in URLs.

Every kind has a prefix that its issuer chose so that it can be found, so these are seldom anything else. Placeholders and examples do
not count. What was found is never returned, only its kind.
"""

import base64
import binascii
import json
import re
from typing import NamedTuple

MIN_DIFFERENT_CHARACTERS = 8  # of a token; placeholders have fewer
PLACEHOLDER = re.compile(r"example|placeholder|your[_-]|xxxx|\.\.\.|1234567890|abcdefgh|changeme|redacted|dummy|sample", re.IGNORECASE)
EXAMPLE_JWT_SIGNATURES = frozenset(("SflKxwRJSMeKKF2QT4fwpMeJf36POk6yJV_adQssw5c", "TJVA95OrM7E2cBab30RMHrHDcEfxjoYZgeFONFh7HgQ"))
PLACEHOLDER_PASSWORD = re.compile(
    r"(?:my|your|the|db|some)?[_-]?(?:pass(?:word|wd|phrase)?|pwd|pw|secret|token|key|user|admin|root|test|foo|bar|postgres|guest)\d{0,4}"
    r"|\*+|x+|\.+|[<\[{$%].*",
    re.IGNORECASE,
)
EXAMPLE_HOST = re.compile(
    r"localhost|127\.0\.0\.1|(?:.*\.)?(?:example|test|invalid)(?:\.\w+)?|host(?:name)?|server|db|database|proxy", re.IGNORECASE
)


class SecretForm(NamedTuple):
    """The form of one kind of secret."""

    triggers: tuple[bytes, ...]  # a stored line with this kind has one of them; none for passwords in URLs
    pattern: re.Pattern[str]


FORMS: dict[str, SecretForm] = {
    "private_key": SecretForm(
        (b"PRIVATE KEY",),
        re.compile(r"-----BEGIN (?:[A-Z]{2,9} ){0,2}PRIVATE KEY(?: BLOCK)?-----(?:\s|\\n|\\r|[A-Z][\w-]+:[^\n]*\n)*([A-Za-z0-9+/=]{40,})"),
    ),
    "aws_access_key": SecretForm((b"AKIA", b"ASIA"), re.compile(r"(?<![A-Za-z0-9])((?:AKIA|ASIA)[A-Z2-7]{16})(?![A-Za-z0-9])")),
    "google_api_key": SecretForm((b"AIza",), re.compile(r"(?<![\w-])(AIza[\w-]{35})(?![\w-])")),
    "google_oauth_secret": SecretForm((b"GOCSPX-",), re.compile(r"(?<![\w-])(GOCSPX-[\w-]{28})(?![\w-])")),
    "github_token": SecretForm(
        (b"ghp_", b"gho_", b"ghu_", b"ghs_", b"ghr_", b"github_pat_"),
        re.compile(r"(?<!\w)((?:gh[pousr]_[A-Za-z0-9]{36,255})|(?:github_pat_\w{82}))(?!\w)"),
    ),
    "gitlab_token": SecretForm((b"glpat-",), re.compile(r"(?<![\w-])(glpat-[\w-]{20,64})(?![\w-])")),
    "huggingface_token": SecretForm((b"hf_",), re.compile(r"(?<!\w)(hf_[A-Za-z]{34})(?!\w)")),
    "openai_key": SecretForm((b"T3BlbkFJ",), re.compile(r"(?<![\w-])(sk-[\w-]{10,}T3BlbkFJ[\w-]{20,})")),
    "anthropic_key": SecretForm((b"sk-ant-",), re.compile(r"(?<![\w-])(sk-ant-[a-z]{2,8}\d\d-[\w-]{60,})")),
    "slack_token": SecretForm((b"xox",), re.compile(r"(?<![\w-])(xox[abeprs]-\d{8,}-[A-Za-z0-9-]{16,})")),
    "stripe_key": SecretForm((b"k_live_",), re.compile(r"(?<!\w)([rs]k_live_[A-Za-z0-9]{20,})(?!\w)")),
    "npm_token": SecretForm((b"npm_",), re.compile(r"(?<!\w)(npm_[A-Za-z0-9]{36})(?!\w)")),
    "jwt": SecretForm((b"eyJ",), re.compile(r"(?<![\w-])(eyJ[\w-]{10,}\.eyJ[\w-]{10,}\.[\w-]{20,})")),
    "url_password": SecretForm(
        (), re.compile(r"(?<!\w)[a-z][a-z0-9+.-]{1,20}://[^\s/:@'\"<>{}]{1,64}:([^\s/@'\"`]{6,128})@([\w.-]{3,253})", re.IGNORECASE)
    ),
}
# To find one character is many times faster than to find several, so each of these is looked for where its rarest character occurs.
UNDERSCORED = tuple(trigger for form in FORMS.values() for trigger in form.triggers if b"_" in trigger)
HYPHENATED = (b"PRIVATE KEY", b"T3BlbkFJ", *(trigger for form in FORMS.values() for trigger in form.triggers if b"-" in trigger), b"xox")


def may_have_secrets(line: bytes) -> bool:
    """Whether a stored line of JSON has to be looked at. Quick, as it is asked for every row."""
    return (
        b"AIza" in line
        or b"eyJ" in line
        or (b"IA" in line and (b"AKIA" in line or b"ASIA" in line))
        or (b"_" in line and any(trigger in line for trigger in UNDERSCORED))
        or (b"-" in line and any(trigger in line for trigger in HYPHENATED))
        or (b"@" in line and b"://" in line)
    )


def find_secrets(text: str) -> frozenset[str]:
    """The kinds of secrets in a text."""
    return frozenset(kind for kind, form in FORMS.items() if any(_is_real(kind, match) for match in form.pattern.finditer(text)))


def _is_real(kind: str, match: re.Match[str]) -> bool:
    value = match[1]
    if kind == "url_password":
        return not (PLACEHOLDER_PASSWORD.fullmatch(value) or PLACEHOLDER.search(value) or EXAMPLE_HOST.fullmatch(match[2]))
    if kind == "jwt":
        return _is_jwt(value)
    return len(set(value)) >= MIN_DIFFERENT_CHARACTERS and not PLACEHOLDER.search(value)


def _is_jwt(token: str) -> bool:
    header, _, signature = token.split(".")
    try:
        decoded = json.loads(base64.urlsafe_b64decode(header + "=" * (-len(header) % 4)))
    except (binascii.Error, ValueError):
        return False
    return isinstance(decoded, dict) and "alg" in decoded and signature not in EXAMPLE_JWT_SIGNATURES
