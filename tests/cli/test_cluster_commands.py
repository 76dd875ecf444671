"""`headrace status` and its like, against whatever may answer at an address."""

from __future__ import annotations

import json
import socketserver
import threading
from collections.abc import Iterator
from contextlib import contextmanager

import pytest
from typer.testing import CliRunner

from headrace.cli.app import app
from headrace.worker import WorkerOptions

BLOCKS = {"total": 10, "held": 1, "leased": 0}
WORKER = {
    "id": "[/x]",
    "role": "both",
    "state": "down",
    "why": "lost [bold]there[/nothing]",
    "blocks": BLOCKS,
    **dict.fromkeys(("running", "waiting", "prefills", "step", "heard_s_ago"), 0),
}


@contextmanager
def answering(words: bytes) -> Iterator[str]:
    """The address of a server that says this to everybody."""

    class Handler(socketserver.BaseRequestHandler):
        def handle(self) -> None:
            self.request.recv(65536)
            self.request.sendall(words)

    with socketserver.TCPServer(("127.0.0.1", 0), Handler) as server:
        thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.01})
        thread.start()
        try:
            yield f"http://127.0.0.1:{server.server_address[1]}"
        finally:
            server.shutdown()
            thread.join()


def http(answer: object) -> bytes:
    body = json.dumps(answer).encode()
    return b"HTTP/1.1 200 OK\r\nContent-Length: %d\r\nConnection: close\r\n\r\n%s" % (len(body), body)


def run(*arguments: str) -> tuple[int, str]:
    result = CliRunner().invoke(app, arguments, env={"COLUMNS": None})  # a test runner may have set it
    return result.exit_code, result.output


def test_names_and_reasons_are_no_markup() -> None:
    with answering(http({"state": "ready", "open_sequences": 0, "workers": [WORKER]})) as url:
        code, output = run("status", "--url", url)
    assert code == 0, output
    assert "[/x]" in output
    assert "down: lost [bold]there[/nothing]" in output


def attained(band: str, slo: str, window: str, judged: int, ratio: float | None) -> dict[str, object]:
    burn = None if ratio is None else (1 - ratio) / 0.05
    about = {"class": band, "slo": slo, "window": window, "limit_s": 0.2 if slo == "ttft" else 0.05}
    return {**about, "judged": judged, "attainment": ratio, "burn_rate": burn}


def test_status_says_how_often_each_class_got_what_it_may_expect() -> None:
    attainment = [
        attained("high", "ttft", "5m", 200, 0.8),
        attained("low", "ttft", "5m", 0, None),
        attained("high", "ttft", "1h", 1000, 0.99),
        attained("normal", "tpot", "1h", 7, 1.0),
    ]
    answer = {"state": "ready", "open_sequences": 0, "workers": []}
    slo = {"ttft_s": 0.2, "tpot_s": 0.05, "objective": 0.95}
    with answering(http(answer | {"slo": slo | {"attainment": attainment}})) as url:
        code, output = run("status", "--url", url)
    assert code == 0, output
    assert output.splitlines()[1:4] == [
        "SLO for 0.95 of the requests of each class",
        "  high TTFT within 200 ms: 80.0% of 200 in 5m, burn rate 4; 99.0% of 1000 in 1h, burn rate 0.2",
        "  normal TPOT within 50 ms: 100.0% of 7 in 1h, burn rate 0",
    ]
    with answering(http(answer | {"slo": slo | {"attainment": attainment[1:2]}})) as url:
        assert (
            "SLO for 0.95 of the requests of each class: none in the last hour"
            in run("status", "--url", url)[1]
        )


@pytest.mark.parametrize(
    "words",
    [
        b"\x15\x03\x03\x00\x02\x02\x46",  # TLS: the port where workers join
        b"220 mail.example ready\r\n",
        b"HTTP/1.1 200 OK\r\nContent-Length: 4\r\n\r\nword",
        http([1]),
        http({"fine": True}),
        b"",
    ],
)
@pytest.mark.parametrize("command", [("status",), ("explain", "x"), ("drain", "x")])
def test_what_is_no_headrace_server_is_said_in_one_line(words: bytes, command: tuple[str, ...]) -> None:
    with answering(words) as url:
        code, output = run(*command, "--url", url)
    assert code == 1
    (line,) = output.splitlines()
    assert line.startswith(f"headrace: error: what answers at {url} is no Headrace server")


def test_an_address_without_its_scheme_is_refused() -> None:
    code, output = run("status", "--url", "127.0.0.1:8000")
    assert code == 1
    assert output == ("headrace: error: --url 127.0.0.1:8000 is no address of HTTP; give http://HOST:PORT\n")


def test_a_name_that_no_path_could_hold_is_refused() -> None:
    with pytest.raises(ValueError, match="has no '/' in it, got 'a/b'"):
        WorkerOptions(worker_id="a/b")


@pytest.mark.parametrize(
    "url",
    [
        "http://127.0.0.1:abc",
        "http://a b/",
        "http://[::1",
        "http://",
        "http://127.0.0.1:99999",
        "http://h/\x01",
    ],
)
def test_what_is_no_address_is_said_to_be_none(url: str) -> None:
    code, output = run("status", "--url", url)
    assert code == 1
    assert "is no address of HTTP; give http://HOST:PORT" in output


@pytest.mark.parametrize("key", ["abc\r", "a\nb", "ключ"])
def test_a_key_that_no_header_can_carry_is_not_the_servers_fault(key: str) -> None:
    code, output = run("status", "--url", "http://127.0.0.1:9", "--api-key", key)
    assert code == 1
    assert "the API key (--api-key, HEADRACE_API_KEY) has characters that no header can carry" in output


@pytest.mark.parametrize("command", ["explain", "drain"])
def test_a_name_may_be_any_bytes_but_none(command: str) -> None:
    code, output = run(command, "", "--url", "http://127.0.0.1:9")
    assert code == 1
    assert "is empty; headrace status shows what there is" in output
    missing = b'{"error": {"message": "there is none"}}'
    answer = b"HTTP/1.1 404 Not Found\r\nContent-Length: %d\r\nConnection: close\r\n\r\n%s" % (
        len(missing),
        missing,
    )
    with answering(answer) as url:
        code, output = run(command, "\udcff", "--url", url)
    assert (code, output) == (1, "headrace: error: there is none\n")


def test_workers_join_over_tcp_only_and_have_names() -> None:
    for command in (("gateway", "m", "--port", "0", "--listen"), ("worker", "m", "--join")):
        code, output = run(*command, "unix:/tmp/nobody.sock")
        assert code == 1
        assert "unix:/tmp/nobody.sock: workers join over TCP, and show certificates; give HOST:PORT" in output


def test_a_host_of_another_machine_is_not_mended_by_another_port() -> None:
    code, output = run("serve", "m", "--host", "192.0.2.1", "--port", "0")
    assert code == 1
    assert "choose another --host, an address of this machine" in output
