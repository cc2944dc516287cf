"""The OpenAPI document: what FastAPI says of the routes, set right where this server answers differently."""

from __future__ import annotations

import json
from typing import TYPE_CHECKING, Any

from pydantic.json_schema import models_json_schema

from service.schemas_responses import EVENTS

if TYPE_CHECKING:
    from collections.abc import Collection

    from fastapi import FastAPI

__all__ = ["describe"]

_SCHEME = "key"
_PLACE = "#/components/schemas/{model}"
_DESCRIPTION = (
    "Judges texts, and the answers of language models while they are generated, by what a model's features say of "
    "pornography, politics, violence and terror. The endpoints under /v1 have OpenAI's shapes; what the guard has to "
    "say stands in a block named `sailguard`."
)
_TAGS = {
    "answers": "Guarded answers, in OpenAI's shape.",
    "judgements": "What the guard says of texts.",
    "features": "The explained features that it judges by.",
    "models": "Names under which the model answers.",
    "admin": "The bank and the policy in use. Needs a key of the role admin, and is closed where there is none.",
    "operations": "Probes and metrics.",
}


def describe(app: FastAPI, *, keys: bool, open_paths: Collection[str]) -> None:
    """Complete the document of `app`. keys: whether requests need one; open_paths: those that never do."""
    made = app.openapi

    def document() -> dict[str, Any]:
        if app.openapi_schema is None:
            _complete(made(), keys, open_paths)
        assert app.openapi_schema is not None
        return app.openapi_schema

    app.openapi = document  # type: ignore[method-assign]


def _complete(document: dict[str, Any], keys: bool, open_paths: Collection[str]) -> None:
    document["info"]["description"] = _DESCRIPTION
    document["info"]["license"] = {"name": "Apache-2.0", "identifier": "Apache-2.0"}
    document["servers"] = [{"url": "/", "description": "This server."}]
    parts = document.setdefault("components", {})
    parts["securitySchemes"] = {
        _SCHEME: {"type": "http", "scheme": "bearer", "description": "One of the server's API keys."}
    }
    # Requests that do not fit are answered with 400 in OpenAI's shape, and nothing else refers to these two.
    schemas = parts.setdefault("schemas", {})
    for name in ("HTTPValidationError", "ValidationError"):
        schemas.pop(name, None)
    paths = json.dumps(document["paths"])
    if wanted := [model for model in EVENTS if json.dumps(_PLACE.format(model=model.__name__)) in paths]:
        events = models_json_schema([(model, "validation") for model in wanted], ref_template=_PLACE)[1]
        schemas.update({name: schema for name, schema in events["$defs"].items() if name not in schemas})
    used = set()
    for path, operations in document["paths"].items():
        for operation in operations.values():
            operation["responses"].pop("422", None)
            used |= set(operation.get("tags", ()))
            if keys and path not in open_paths:
                operation["security"] = [{_SCHEME: []}]
    document["tags"] = [{"name": name, "description": text} for name, text in _TAGS.items() if name in used]
