"""Where readings come from: a server's HTTP address.

In: an address. Out: readings, or why there is none, in words.
"""

from __future__ import annotations

import http.client
import json
import time
import urllib.error
import urllib.request

from headrace.observe.top.reading import Reading

TIMEOUT_S = 5.0


class Source:
    """One server. Not for two threads at once."""

    def __init__(self, url: str, api_key: str | None = None) -> None:
        """Raises ValueError for what is no address."""
        self.url = url.rstrip("/").removesuffix("/v1")
        if not self.url.startswith(("http://", "https://")):
            raise ValueError(f"--url {url} is no address of HTTP; give http://HOST:PORT")
        self._headers = {"Authorization": f"Bearer {api_key}"} if api_key else {}

    def read(self) -> Reading:
        """Ask the server how it is. Raises OSError with why it does not say."""
        try:
            cluster = json.loads(self._get("/cluster"))
            if not isinstance(cluster, dict) or not cluster.keys() >= {"workers", "state"}:
                raise ValueError
            return Reading.of(time.monotonic(), cluster, self._get("/metrics").decode())
        except urllib.error.HTTPError as error:
            raise OSError(_said(error)) from None
        except urllib.error.URLError as error:
            raise OSError(f"no server answers at {self.url}: {error.reason}") from None
        except TimeoutError:
            raise OSError(f"the server at {self.url} does not answer within {TIMEOUT_S:g} s") from None
        except ConnectionError as error:
            raise OSError(f"the server at {self.url} broke off: {error}") from None
        except (http.client.HTTPException, ValueError):
            raise OSError(
                f"what answers at {self.url} is no Headrace server; give its HTTP address"
            ) from None

    def _get(self, path: str) -> bytes:
        request = urllib.request.Request(self.url + path, headers=self._headers)
        with urllib.request.urlopen(request, timeout=TIMEOUT_S) as answer:
            found: bytes = answer.read()
        return found


def _said(error: urllib.error.HTTPError) -> str:
    try:
        return str(json.load(error)["error"]["message"])
    except (ValueError, KeyError, TypeError):
        return f"{error.url} answered {error.code}"
