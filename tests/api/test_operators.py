"""Who may do what an operator does: by their key, and by the page that a browser sends a request for."""

from __future__ import annotations

import hashlib
from pathlib import Path

import httpx
import pytest
from api_house import ApiHouse

from headrace.config import ApiKey, ServingOptions, read_keys

DRAIN = "/cluster/workers/none/drain"
"""There is no such worker: 404 is what an operator gets."""


@pytest.mark.parametrize(
    ("headers", "status"),
    [
        ({}, 404),
        ({"Origin": "{url}"}, 404),  # a page of the server itself
        ({"Origin": "https://evil.example"}, 403),
        ({"Origin": "null"}, 403),
        ({"Origin": "http://127.0.0.1:1"}, 403),
        ({"Origin": "http://rebound.example:80", "Host": "rebound.example:80"}, 403),
        ({"Sec-Fetch-Site": "cross-site"}, 403),
        ({"Sec-Fetch-Site": "same-origin"}, 404),
    ],
)
def test_a_page_of_elsewhere_drains_nothing(http: httpx.Client, headers: dict[str, str], status: int) -> None:
    url = str(http.base_url).rstrip("/")
    sent = {name: value.format(url=url) for name, value in headers.items()}
    answer = http.post(DRAIN, headers=sent)
    assert answer.status_code == status, answer.text
    if status == 403:
        assert answer.json()["error"]["code"] == "origin_not_allowed"


def test_pages_of_named_origins_and_only_keys_of_operators() -> None:
    keys = (
        ApiKey("client", hashlib.sha256(b"c").digest()),
        ApiKey("boss", hashlib.sha256(b"b").digest(), operator=True),
    )
    with ApiHouse(serving=ServingOptions(keys=keys, cors_origins=("https://ops.example",))) as house:

        def status(method: str, path: str, key: str, **headers: str) -> int:
            sent = {"Authorization": f"Bearer {key}", **headers}
            return httpx.request(method, house.url + path, headers=sent).status_code

        for method, path in (("POST", DRAIN), ("GET", "/cluster/requests/none")):
            assert status(method, path, "c") == 403
            assert status(method, path, "b") == 404
        assert status("GET", "/cluster", "c") == 200
        assert status("POST", DRAIN, "b", Origin="https://ops.example") == 404
        assert status("POST", DRAIN, "b", Origin="https://evil.example") == 403


def test_the_file_says_whose_key_is_an_operators(tmp_path: Path) -> None:
    path = tmp_path / "keys.toml"
    path.write_text('[[keys]]\nname = "a"\nkey = "a"\n[[keys]]\nname = "b"\nkey = "b"\noperator = true\n')
    assert [key.operator for key in read_keys(path)] == [False, True]
