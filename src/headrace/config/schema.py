"""The JSON Schema of a cluster's file.

Out: text, the same as docs/config.schema.json. It tells fields, types, limits and defaults; what fields say
of each other is for `headrace config check`.
"""

from __future__ import annotations

import json

from headrace.config.cluster import ClusterFile

_DIALECT = "https://json-schema.org/draft/2020-12/schema"


def schema_text() -> str:
    """The schema, indented."""
    return json.dumps({"$schema": _DIALECT, **ClusterFile.model_json_schema()}, indent=2) + "\n"
