"""A question to a running server, over HTTP: what `imprint ask` does.

In: a URL, a question, a model by its plain name. Out: the answer and where it came from. Loads no model and no Ray.
"""

import json
from typing import Any, NamedTuple
from urllib.parse import quote

import httpx

TIMEOUT_S = 120.0


class Said(NamedTuple):
    """An answer, and its source as the server told it: `adapter`, `in_context`, `adapter_in_context` or `base`."""

    text: str
    source: str


def ask_server(
    url: str, question: str, model: str = "base", collection: str | None = None, max_tokens: int = 64, mode: str = "auto"
) -> Said:
    """Asks the server at `url`, with or without `/v1` at its end.

    model: `base`, or `base:document` with the document's name as it is; collection: its own, where it is not the server's. Raises
    `ValueError` where no server answers, where something else than an Imprint server does, and with a server's own words where it
    refuses.
    """
    name, colon, document = model.partition(":")
    place = f"{quote(collection, safe='')}/" if collection else ""
    body = {
        "model": name + colon + place + quote(document, safe=""),
        "messages": [{"role": "user", "content": question}],
        "max_tokens": max_tokens,
        "imprint": {"mode": mode},
    }
    where = url.rstrip("/").removesuffix("/v1")
    try:
        response = httpx.post(f"{where}/v1/chat/completions", json=body, timeout=TIMEOUT_S)
    except (httpx.HTTPError, httpx.InvalidURL) as error:
        raise ValueError(f"no server answers at {url} ({error}): start one with `imprint serve STORE`") from None
    answer = _json_object(response)
    if response.is_error:
        refusal = answer.get("error")
        if isinstance(refusal, dict) and isinstance(refusal.get("message"), str):
            raise ValueError(refusal["message"])
        raise _stranger(url, response)
    try:
        return Said(answer["choices"][0]["message"]["content"].strip(), answer["imprint"]["source"])
    except (KeyError, IndexError, TypeError, AttributeError):
        raise _stranger(url, response) from None


def _json_object(response: httpx.Response) -> dict[str, Any]:
    try:
        found = response.json()
    except (json.JSONDecodeError, UnicodeDecodeError):
        return {}
    return found if isinstance(found, dict) else {}


def _stranger(url: str, response: httpx.Response) -> ValueError:
    kind = response.headers.get("content-type", "nothing that says its type").partition(";")[0]
    return ValueError(
        f"what answers at {url} is no Imprint server (status {response.status_code}, {kind}): give the address that "
        "`imprint serve` prints"
    )
