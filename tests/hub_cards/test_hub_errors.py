"""Errors of the Hub in one line: nothing in it gives access to anything."""

import pytest

from delta_llava.redaction import scrub
from modeling_delta_llava.hub import one_line

SIGNED = (
    "X-Amz-Algorithm=AWS4-HMAC-SHA256&X-Amz-Credential=AKIA%2F20260101&X-Amz-Date=20260101T000000Z&X-Amz-Expires=900"
    "&X-Amz-SignedHeaders=host&X-Amz-Signature=0123456789abcdef"
)


@pytest.mark.parametrize(
    "text",
    [
        "Client error '403 Forbidden' for url 'https://bucket.s3.us-east-1.amazonaws.com/a/b?{}'",
        "PUT https://bucket.s3.us-east-1.amazonaws.com/a/b?{} failed",
        'see "http://127.0.0.1:8000/lfs/0a?partNumber=1&{}"\nfor more',
        "https://user.hf.co/x?{} and https://user.hf.co/y?{}",
    ],
)
def test_signed_addresses_lose_their_query(text):
    for line in (
        scrub(text.format(SIGNED, SIGNED)),
        one_line(OSError(text.format(SIGNED, SIGNED)), "uploading", "a/b"),
    ):
        assert "X-Amz" not in line
        assert "0123456789abcdef" not in line
        assert text.split("?")[0].split("://")[1] in line


def test_tokens_are_replaced(monkeypatch):
    monkeypatch.setenv("HF_TOKEN", "of-another-form")
    assert scrub(f"with of-another-form and hf_{'a' * 34}") == "with <token> and <token>"
