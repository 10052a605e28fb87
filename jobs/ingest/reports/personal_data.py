"""Suspected personal data in texts: e-mail addresses, phone and card numbers, IBANs, US social security numbers and IP addresses.

Rather a few are missed than many named that are none: numbers count only with their checksum or by the rules of their country, and
examples from documentation do not count. What was found is never returned, only its kind.
"""

import ipaddress
import re
from collections.abc import Callable
from typing import NamedTuple

EMAIL = re.compile(
    r"(?<![\w.+-])([a-z0-9][\w.+-]{0,63})@((?:[a-z0-9](?:[a-z0-9-]{0,61}[a-z0-9])?\.){1,5}([a-z]{2,24}))(?![\w-])", re.IGNORECASE
)
# Countries have two letters. Others are more often code, such as array@other.transpose.
COMMON_DOMAINS = re.compile(
    "com|org|net|edu|gov|mil|int|info|biz|name|pro|app|dev|cloud|online|shop|site|tech|store|agency|group|health|work|[a-z]{2}"
)
RESERVED_DOMAIN = re.compile(
    r"(^|\.)(example|test|domain|(your|my)?(company|domain)|email|mail|acme|foo|bar)\.[a-z]+$|\.(example|test|invalid|localhost|local)$"
)
IMPERSONAL_NAME = re.compile("git|user|username|name|you|your|(you|your)[.]name|email|example|test|foo|bar|no-?reply|someone")

PHONE = re.compile(
    r"(?<![\w.+/-])(?:\+[1-9]\d{0,2}[ .-]?(?:\(\d{1,5}\)[ .-]?)?\d[\d .-]{5,14}\d|\(\d{3}\) ?\d{3}-\d{4}|\d{3}-\d{3}-\d{4})(?![\w-]|\.\d)"
)
FICTIONAL_PHONE = re.compile(r"\b555[ .-]?01\d\d$")

CARD = re.compile(r"(?<![\w.-])(?:\d{4}([ -])\d{4}\1\d{4}\1\d{4}|3[47]\d{2}([ -])\d{6}\2\d{5}|\d{15,16})(?![\w-]|\.\d)")
CARD_ISSUER = re.compile(r"4\d{15}|5[1-5]\d{14}|2[2-7]\d{14}|3[47]\d{13}|6(?:011|5\d\d)\d{12}")
# Digits in one run are more often an id, so these words must be near.
CARD_CONTEXT = re.compile(r"card|visa|master|amex|american express|credit|debit|payment|karte|tarjeta|carte|carta", re.IGNORECASE)
CARD_CONTEXT_CHARACTERS = 80
TEST_CARDS = re.compile(
    "4242424242424242|4111111111111111|4012888888881881|4000056655665556|5555555555554444|5105105105105100|2223003122003222"
    "|378282246310005|371449635398431|6011111111111117|6011000990139424"
)

IBAN = re.compile(r"(?<!\w)[A-Z]{2}\d{2}(?: ?[A-Z0-9]{4}){2,7}(?: ?[A-Z0-9]{1,3})?(?!\w)")
EXAMPLE_IBANS = frozenset(("DE89370400440532013000", "GB82WEST12345698765432", "GB29NWBK60161331926819", "FR1420041010050500013M02606"))

SSN = re.compile(r"(?<![\w-])\d{3}-\d{2}-\d{4}(?![\w-])")
EXAMPLE_SSNS = frozenset(("123-45-6789", "987-65-4321", "111-11-1111", "222-22-2222", "333-33-3333"))

IPV4 = re.compile(r"(?<![\w.-])(?:\d{1,3}\.){3}\d{1,3}(?![\w-]|\.\d)")
IPV6 = re.compile(r"(?<![\w:.])(?:[0-9a-f]{0,4}:){4,7}[0-9a-f]{1,4}(?![\w:])", re.IGNORECASE)
IPV6_GROUP_DIGITS = 4
MIN_IPV4_DIGITS = 8  # shorter ones are more often numbers of versions and sections
PUBLIC_RESOLVERS = frozenset(("8.8.8.8", "8.8.4.4", "208.67.222.222", "208.67.220.220", "149.112.112.112"))

DIGIT = re.compile(r"\d")


def find_personal_data(text: str) -> frozenset[str]:
    """The kinds of personal data in a text."""
    detectors = (EMAIL_DETECTOR, *DETECTORS) if DIGIT.search(text) else (EMAIL_DETECTOR,)
    return frozenset(
        detector.kind
        for detector in detectors
        if detector.needed in text and any(detector.is_real(match) for match in detector.pattern.finditer(text))
    )


def _is_email(match: re.Match[str]) -> bool:
    name, domain, top = match[1].lower(), match[2].lower(), match[3].lower()
    return COMMON_DOMAINS.fullmatch(top) is not None and not IMPERSONAL_NAME.fullmatch(name) and not RESERVED_DOMAIN.search(domain)


def _is_phone(match: re.Match[str]) -> bool:
    import phonenumbers

    text = match[0]
    if FICTIONAL_PHONE.search(text):
        return False
    try:
        number = phonenumbers.parse(text, None if text.startswith("+") else "US")
    except phonenumbers.NumberParseException:
        return False
    return phonenumbers.is_valid_number(number)


def _is_card(match: re.Match[str]) -> bool:
    from stdnum import luhn

    digits = re.sub(r"\D", "", match[0])
    if not CARD_ISSUER.fullmatch(digits) or TEST_CARDS.fullmatch(digits) or len(set(digits)) < 4 or not luhn.is_valid(digits):
        return False
    if match[0] != digits:
        return True
    before = match.string[max(0, match.start() - CARD_CONTEXT_CHARACTERS) : match.start()]
    return CARD_CONTEXT.search(before) is not None


def _is_iban(match: re.Match[str]) -> bool:
    from stdnum import iban

    compact = match[0].replace(" ", "")
    return compact not in EXAMPLE_IBANS and bool(iban.is_valid(compact))


def _is_ssn(match: re.Match[str]) -> bool:
    from stdnum.us import ssn

    return match[0] not in EXAMPLE_SSNS and bool(ssn.is_valid(match[0]))


def _is_ip_address(match: re.Match[str]) -> bool:
    try:
        address = ipaddress.ip_address(match[0])
    except ValueError:
        return False
    if not address.is_global or address.is_multicast or match[0] in PUBLIC_RESOLVERS:
        return False
    if address.version == 6:
        return match[0][0] in "23" and len(match[0].split(":")[0]) == IPV6_GROUP_DIGITS  # the addresses that are given to networks
    return sum(map(str.isdigit, match[0])) >= MIN_IPV4_DIGITS


class Detector(NamedTuple):
    """How one kind of personal data is found."""

    kind: str
    needed: str  # a character that it has
    pattern: re.Pattern[str]
    is_real: Callable[[re.Match[str]], bool]


DETECTORS = (
    Detector("phone", "", PHONE, _is_phone),
    Detector("credit_card", "", CARD, _is_card),
    Detector("iban", "", IBAN, _is_iban),
    Detector("us_ssn", "-", SSN, _is_ssn),
    Detector("ip_address", ".", IPV4, _is_ip_address),
    Detector("ip_address", ":", IPV6, _is_ip_address),
)
EMAIL_DETECTOR = Detector("email", "@", EMAIL, _is_email)
