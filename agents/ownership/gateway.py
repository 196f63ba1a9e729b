"""etcd's JSON gateway: one question, asked of each endpoint in turn until one gives an answer.

Law: knows keys and values, no records. It says of a question that failed whether it may have taken effect all the
same; it repeats only questions of which a repetition changes nothing, which all of `agents.ownership.etcd`'s are.

Source: https://etcd.io/docs/v3.4/dev-guide/api_grpc_gateway/ (keys and values in base64, numbers as strings).
"""

from __future__ import annotations

import json
import ssl
from typing import Final

import anyio
import httpx

from agents.ownership.place import EtcdPlace
from migrate.errors import NotRecorded, StorageFailed

__all__ = ["Gateway"]

# A record is 1 KiB at most, in base64, and no question asks for more than a few; anything longer is no etcd of ours.
MAX_ANSWER_BYTES: Final = 64 << 10
# Of a server's own words, in a sentence.
MAX_WORDS: Final = 200
# What etcd answers when it looked at a question and did nothing: malformed, not allowed, no space left.
_REFUSALS: Final = frozenset({400, 401, 403, 404, 413, 429})


class Gateway:
    """Questions to one etcd. Its connections belong to the event loop that asked first; `aclose` ends them."""

    def __init__(self, place: EtcdPlace) -> None:
        self._place = place
        self._client: httpx.AsyncClient | None = None
        # The endpoint that answered last is asked first.
        self._first = 0

    async def aclose(self) -> None:
        """Close the connections. May be called twice."""
        client, self._client = self._client, None
        if client is not None:
            await client.aclose()

    async def txn(self, question: dict[str, object]) -> dict[str, object]:
        """Ask /v3/kv/txn; a repetition of the question must change nothing.

        Raises:
            NotRecorded: no endpoint did it, and none will.
            StorageFailed: no endpoint gave an answer, and one may have done it.
        """
        failures: list[str] = []
        may_be_done = False
        endpoints = self._place.endpoints
        for number in range(len(endpoints)):
            at = (self._first + number) % len(endpoints)
            try:
                answer = await self._ask(endpoints[at], question)
            except _Unanswered as exc:
                failures.append(f"{endpoints[at]}: {exc}")
                may_be_done = may_be_done or exc.may_be_done
            else:
                self._first = at
                return answer
        words = "etcd gave no answer: " + "; ".join(failures)
        raise StorageFailed(words) if may_be_done else NotRecorded(words)

    async def _ask(self, endpoint: str, question: dict[str, object]) -> dict[str, object]:
        try:
            with anyio.fail_after(self._place.timeout_s):
                return await self._post(f"{endpoint}/v3/kv/txn", question)
        except TimeoutError as exc:
            raise _Unanswered(f"no answer within {self._place.timeout_s:g} s", may_be_done=True) from exc
        except (httpx.ConnectError, httpx.ConnectTimeout, httpx.PoolTimeout) as exc:
            raise _Unanswered(_words(exc), may_be_done=False) from exc
        except (httpx.HTTPError, ssl.SSLError) as exc:
            # With TLS 1.3 a server refuses a client's certificate only after the first bytes were sent to it.
            raise _Unanswered(_words(exc), may_be_done=True) from exc

    async def _post(self, url: str, question: dict[str, object]) -> dict[str, object]:
        client = self._connected()
        asked = json.dumps(question).encode()
        request = client.build_request("POST", url, content=asked)
        request.stream = _Body(asked)
        content, size = b"", 0
        response = await client.send(request, stream=True)
        try:
            # To its end or the deadline: httpx leaves generators behind where one stops in the middle.
            async for part in response.aiter_bytes():
                size += len(part)
                content += part[: MAX_ANSWER_BYTES - len(content)]
        finally:
            await response.aclose()
        status = response.status_code
        if size > MAX_ANSWER_BYTES:
            raise _Unanswered(f"answered {status} with more than {MAX_ANSWER_BYTES} bytes", may_be_done=True)
        try:
            answer = json.loads(content)
        except (ValueError, RecursionError) as exc:
            raise _Unanswered(f"answered {status}, and no JSON", may_be_done=True) from exc
        if not isinstance(answer, dict):
            raise _Unanswered(f"answered {status}, and no JSON object", may_be_done=True)
        if status != 200:
            reason = str(answer.get("error", ""))[:MAX_WORDS]
            raise _Unanswered(f"answered {status} ({reason})", may_be_done=status not in _REFUSALS)
        return answer

    def _connected(self) -> httpx.AsyncClient:
        if self._client is None:
            self._client = httpx.AsyncClient(
                verify=self._tls() if self._place.endpoints[0].startswith("https:") else False,
                timeout=self._place.timeout_s,
                # The way to what decides who runs a guest is not taken from the environment.
                trust_env=False,
            )
        return self._client

    def _tls(self) -> ssl.SSLContext:
        place = self._place
        try:
            context = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
            context.minimum_version = ssl.TLSVersion.TLSv1_2
            if place.ca is None:
                context.load_default_certs()
            else:
                context.load_verify_locations(place.ca)
            if place.certificate is not None:
                context.load_cert_chain(place.certificate, place.key)
        except (ssl.SSLError, OSError) as exc:
            raise NotRecorded(f"the certificates for etcd cannot be loaded: {exc}") from exc
        return context


class _Body(httpx.AsyncByteStream):
    """What is sent, as one part: httpx's own is a generator, which nobody closes when sending fails."""

    def __init__(self, content: bytes) -> None:
        self._parts = [content]

    def __aiter__(self) -> _Body:
        return self

    async def __anext__(self) -> bytes:
        if not self._parts:
            raise StopAsyncIteration
        return self._parts.pop()


class _Unanswered(Exception):
    """One endpoint gave no answer to go by."""

    def __init__(self, words: str, *, may_be_done: bool) -> None:
        super().__init__(words)
        self.may_be_done = may_be_done


def _words(error: Exception) -> str:
    return (str(error) or type(error).__name__)[:MAX_WORDS]
