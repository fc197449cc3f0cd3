"""Finds personal data and secrets by their form. This module returns only kinds and counts, never the text it found."""

from __future__ import annotations

import ipaddress
import re
from collections import Counter
from collections.abc import Callable
from typing import NamedTuple


class Pattern(NamedTuple):
    """The form of one kind of personal data or secret.

    Attributes:
        secret: whether it is a secret; if not, it is personal data.
        hint: something that every match contains. It is faster to search for than `form`.
        form: matches the data.
        valid: a further check of a match, for example of its check digits.
    """

    kind: str
    secret: bool
    hint: re.Pattern[str]
    form: re.Pattern[str]
    valid: Callable[[str], bool] = lambda match: True


def luhn(number: str) -> bool:
    """Whether the check digit of a card number is right (Luhn's algorithm)."""
    digits = [int(letter) for letter in number if letter.isdigit()]
    doubled = [2 * digit - 9 * (digit > 4) for digit in digits[-2::-2]]
    return len(set(digits)) > 1 and (sum(digits[-1::-2]) + sum(doubled)) % 10 == 0


def iban(text: str) -> bool:
    """Whether an IBAN's check digits are right (ISO 7064, modulo 97)."""
    compact = text.replace(" ", "")
    moved = compact[4:] + compact[:4]
    return 15 <= len(compact) <= 34 and int("".join(str(int(letter, 36)) for letter in moved)) % 97 == 1


def public_address(text: str) -> bool:
    """Whether an IP address is public: not private, not local and not reserved for examples."""
    try:
        address = ipaddress.ip_address(text)
    except ValueError:
        return False
    return address.is_global and (address.version == 4 or address in _ASSIGNED)


def _person(address: str) -> bool:
    """Whether the domain of an e-mail address can belong to somebody. RFC 2606 reserves some domains for examples."""
    domain = address.rpartition("@")[2].lower()
    return not re.search(r"(^|\.)(example(\.com|\.net|\.org)?|test|invalid|localhost)$", domain)


def _phone(text: str) -> bool:
    """Whether there are as many digits as a phone number has (at most 15 by E.164)."""
    return 8 <= sum(letter.isdigit() for letter in text) <= 15


_ASSIGNED = ipaddress.ip_network("2000::/3")  # all public IPv6 addresses; others, as `a::b`, are valid but not in use
_KEYS = (  # the prefixes that providers document
    r"\b(?:AKIA|ASIA)[0-9A-Z]{16}\b",
    r"\bgh[pousr]_[A-Za-z0-9]{36,}",
    r"\bgithub_pat_[A-Za-z0-9_]{22,}",
    r"\bglpat-[\w-]{20,}",
    r"\bsk-[A-Za-z0-9_-]{20,}",
    r"\b[sr]k_live_[0-9A-Za-z]{16,}",
    r"\bhf_[A-Za-z0-9]{30,}",
    r"\bxox[abeprs]-[A-Za-z0-9-]{10,}",
    r"\bAIza[0-9A-Za-z_-]{35}",
    r"\bnpm_[A-Za-z0-9]{36}",
    r"\bpypi-[\w-]{50,}",
    r"\bSG\.[\w-]{22}\.[\w-]{43}",
)

PATTERNS = (
    Pattern(
        "API key",
        True,
        re.compile(r"A[KS]IA|gh[pousr]_|pat[_-]|sk[-_]|rk_|hf_|xox|AIza|npm_|pypi-|SG\."),
        re.compile("|".join(_KEYS)),
    ),
    Pattern("private key", True, re.compile("PRIVATE KEY"), re.compile(r"-----BEGIN (?:[A-Z]+ )*PRIVATE KEY")),
    Pattern("access token (JWT)", True, re.compile("eyJ"), re.compile(r"\beyJ[\w-]{10,}\.eyJ[\w-]{10,}\.[\w-]{10,}")),
    Pattern("password in a URL", True, re.compile("://"), re.compile(r"\b[a-z][a-z0-9+.-]*://[^\s/:@]+:[^\s/:@]+@\w")),
    Pattern("e-mail address", False, re.compile("@"), re.compile(r"\b[\w.+-]+@[\w-]+(?:\.[\w-]+)+"), _person),
    Pattern(
        "phone number",
        False,
        re.compile(r"\d{3}"),
        re.compile(
            r"(?<![\w+.])(?:\+\d{1,3}[ .-]?(?:\(\d{1,4}\)[ .-]?)?\d(?:[ .-]?\d){5,12}"
            r"|\(\d{3}\) ?\d{3}[ .-]\d{4}|\d{3}[.-]\d{3}[.-]\d{4})(?![\w-])"
        ),
        _phone,
    ),
    Pattern(
        "IBAN",
        False,
        re.compile(r"[A-Z]{2}\d{2}"),
        re.compile(r"\b[A-Z]{2}\d{2}(?: ?[A-Z0-9]{4}){2,7}(?: ?[A-Z0-9]{1,3})?\b"),
        iban,
    ),
    Pattern(
        "card number",
        False,
        re.compile(r"\d{4}"),
        re.compile(
            r"(?<![\w.+-])(?<!\d )(?:[2-6]\d{3}(?P<gap>[ -]?)\d{4}(?P=gap)\d{4}(?P=gap)\d{4}"
            r"|3[47]\d{2}(?P<gap2>[ -]?)\d{6}(?P=gap2)\d{5})(?![\w-]| \d)"
        ),
        luhn,
    ),
    Pattern(
        "IP address",
        False,
        re.compile(r"\d\.\d|:[0-9a-fA-F]*:"),
        re.compile(r"(?<![\w.:])(?:(?:\d{1,3}\.){3}\d{1,3}|(?:[0-9a-fA-F]{0,4}:){2,7}[0-9a-fA-F]{0,4})(?![\w:]|\.\d)"),
        public_address,
    ),
    Pattern(
        "social security number (US)",
        False,
        re.compile(r"\d-\d"),
        re.compile(r"(?<![\w-])(?!000|666|9)\d{3}-(?!00)\d{2}-(?!0000)\d{4}(?![\w-])"),
    ),
)
SECRETS = frozenset(pattern.kind for pattern in PATTERNS if pattern.secret)


def count_sensitive(text: str) -> Counter[str]:
    """How often each kind occurs in a text."""
    counts: Counter[str] = Counter()
    for pattern in PATTERNS:
        if not pattern.hint.search(text):
            continue
        found = [match.span() for match in pattern.form.finditer(text) if pattern.valid(match[0])]
        if found:
            counts[pattern.kind] += len(found)
        # What is counted is taken out of the text, so that no later pattern counts it again.
        for start, end in reversed(found):
            text = f"{text[:start]} {text[end:]}"
    return counts
