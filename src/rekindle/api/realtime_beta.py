"""The realtime API as it was in its beta, for clients that ask for that: other names for the same.

beta                                   since
session.modalities                     session.output_modalities
session.max_response_output_tokens     session.max_output_tokens
conversation.item.created              conversation.item.added and .done
response.text.delta, .done             response.output_text.delta, .done
content of type text                   content of type output_text
"""

from __future__ import annotations

from typing import Any

from starlette.datastructures import Headers

HEADER, WANTED = "openai-beta", "realtime=v1"
PROTOCOL = "openai-beta.realtime-v1"
_TYPES = {
    "conversation.item.added": "conversation.item.created",
    "response.output_text.delta": "response.text.delta",
    "response.output_text.done": "response.text.done",
}
_NAMES = {"output_modalities": "modalities", "max_output_tokens": "max_response_output_tokens"}


def is_wanted(headers: Headers, protocols: list[str]) -> bool:
    """Whether a client speaks as in the beta."""
    return WANTED in headers.get(HEADER, "") or PROTOCOL in protocols


def in_beta(event: dict[str, Any]) -> dict[str, Any] | None:
    """An event as it was called then; None for one that there was not."""
    if event["type"] == "conversation.item.done":
        return None
    event = event | {"type": _TYPES.get(event["type"], event["type"])}
    if "session" in event and isinstance(event["session"], dict):
        event["session"] = {_NAMES.get(name, name): value for name, value in event["session"].items() if name != "type"}
    if isinstance(event.get("item"), dict):
        event["item"] = _item(event["item"])
    if isinstance(response := event.get("response"), dict):
        output = [_item(item) for item in response["output"]]
        event["response"] = {_NAMES.get(name, name): value for name, value in response.items()} | {"output": output}
    return event


def _item(item: dict[str, Any]) -> dict[str, Any]:
    parts = [part | {"type": "text"} if part["type"] == "output_text" else part for part in item["content"]]
    return item | {"content": parts}
