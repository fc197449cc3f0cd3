"""Personal data and secrets by their form; what only looks like them is let pass."""

from __future__ import annotations

import pytest

from phinetune.data.check.secrets import PATTERNS, SECRETS, count_sensitive, iban, luhn, public_address

# Put together here, so that no scanner takes this file for a leak.
FOUND: list[tuple[str, str]] = [
    ("e-mail address", "ada@lovelace.org.uk"),
    ("e-mail address", "a.b+c@mail.example-shop.com"),
    ("phone number", "+49 30 1234567"),
    ("phone number", "+44 (20) 7946 0958"),
    ("phone number", "(415) 555-2671"),
    ("phone number", "415-555-2671"),
    ("card number", "4111 1111 1111 1111"),
    ("card number", "378282246310005"),
    ("IBAN", "DE89 3704 0044 0532 0130 00"),
    ("IBAN", "GB82WEST12345698765432"),
    ("IP address", "8.8.8.8"),
    ("IP address", "2001:4860:4860::8888"),
    ("social security number (US)", "078-05-1120"),
    ("API key", "AKIA" + "Q3RZ7PLM5TXK2WVB"),
    ("API key", "ghp_" + "a1B2" * 9),
    ("API key", "github_pat_" + "a1B2" * 8),
    ("API key", "sk-" + "proj-a1B2c3D4e5F6g7H8"),
    ("API key", "hf_" + "a1B2" * 9),
    ("API key", "xoxb-" + "123456789012-abc"),
    ("API key", "AIza" + "a1B2c" * 7),
    ("API key", "sk_live_" + "a1B2" * 5),
    ("private key", "-----BEGIN " + "RSA PRIVATE KEY-----"),
    ("private key", "-----BEGIN " + "PRIVATE KEY-----"),
    ("access token (JWT)", "eyJhbGciOiJIUzI1NiJ9" + ".eyJzdWIiOiIxMjM0NTYifQ." + "a1B2c3D4e5F6"),
    ("password in a URL", "postgres://app:" + "hunter22@db.internal/x"),
]
PASSED = [
    "you@example.com, me@mail.example.org and x@y.test",
    "a @ b, @handle, user@host",
    "Call 112. The year 2024-03-15, 12:30:45, pages 100-200.",
    "order 1234 5678 9012 3456",  # no Luhn number
    "1111 1111 1111 1111",
    "DE89 3704 0044 0532 0130 01",
    "127.0.0.1, 192.168.1.1, 10.0.0.7, 203.0.113.9 and 999.1.1.1",
    "version 1.2.3.4.5 and section 3.1",
    "::1, fe80::1, std::vector and a::b",
    "000-12-3456 and 123-00-4567",
    "sk-short, ghp_short, AKIA, task-force-of-the-northern-district",
    "-----BEGIN PUBLIC KEY-----",
    "https://example.org:8080/a@b and git@host",
    "eyJ.eyJ.abc",
]


@pytest.mark.parametrize(("kind", "text"), FOUND, ids=[f"{kind} {i}" for i, (kind, _) in enumerate(FOUND)])
def test_what_has_the_form_is_counted(kind: str, text: str) -> None:
    assert count_sensitive(f"It is {text}, I think.") == {kind: 1}
    assert count_sensitive(f"{text}\n{text}") == {kind: 2}


@pytest.mark.parametrize("text", PASSED)
def test_what_only_looks_like_it_passes(text: str) -> None:
    assert count_sensitive(text) == {}


def test_check_digits_are_checked() -> None:
    assert luhn("4111 1111 1111 1111")
    assert not luhn("4111 1111 1111 1112")
    assert iban("GB82 WEST 1234 5698 7654 32")
    assert not iban("GB82 WEST 1234 5698 7654 33")
    assert public_address("1.1.1.1")
    assert not public_address("1.1.1")


def test_every_kind_is_tried_here() -> None:
    assert {pattern.kind for pattern in PATTERNS} == {kind for kind, _ in FOUND}
    assert {"API key", "private key", "access token (JWT)", "password in a URL"} == SECRETS
