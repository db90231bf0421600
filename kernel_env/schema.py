"""The JSON schema of an exported notebook; `notebook_schema.json` beside this file is its text.

python -m kernel_env.schema > kernel_env/notebook_schema.json
"""

from __future__ import annotations

import json
import sys
from typing import Any

from pydantic.json_schema import models_json_schema

from kernel_env.episode import Episode, Turn
from kernel_env.reading import SCHEMA
from kernel_env.sidefiles import FOLDER

__all__ = ["notebook_schema"]


def notebook_schema() -> dict[str, Any]:
    """What stands under `metadata.kernel_env` of a notebook and of its cells, as a schema for the whole file.

    A notebook whose metadata says `joined` has, in the place of texts with a high surrogate before a low one,
    `{"$joined": [parts]}`; it is not described here.
    """
    _, generated = models_json_schema([(Episode, "validation"), (Turn, "validation")])
    definitions: dict[str, Any] = generated["$defs"]
    reference = {
        "type": "object",
        "properties": {"file": {"type": "string", "pattern": f"^{FOLDER}/[0-9a-f]{{64}}\\.txt$"}},
        "required": ["file"],
        "additionalProperties": False,
        "description": "A file beside the notebook that has the text, named by its SHA-256.",
    }
    episode, turn = definitions["Episode"], definitions["Turn"]
    del episode["properties"]["turns"]
    episode["properties"]["context"] = {"anyOf": [{"type": "string"}, {"$ref": "#/$defs/Reference"}]}
    episode["properties"]["children"]["items"] = {
        "anyOf": [{"type": "string", "description": "A notebook beside this one."}, {"type": "object"}]
    }
    episode["properties"]["seed"]["anyOf"].append({"type": "string", "pattern": "^[0-9]+$"})
    calls = turn["properties"]["helper_calls"]
    turn["properties"]["helper_calls"] = {
        "anyOf": [{**calls, "items": calls["items"]}, {"$ref": "#/$defs/Reference"}]
    }
    code = definitions["REPLAction"]["properties"]["code"]
    definitions["REPLAction"]["properties"]["code"] = {
        "anyOf": [{"type": "string"}, {"type": "null", "description": "It is the source of the cell."}],
        "default": code["default"],
    }
    turn["properties"]["turn"] = {"type": "integer", "minimum": 1}
    turn["required"].append("turn")
    definitions["Reference"] = reference
    definitions["Notebook"] = {
        "type": "object",
        "properties": {
            "schema": {"const": SCHEMA},
            "turns": {"type": "integer", "minimum": 0},
            "joined": {"const": True},
            "episode": {"$ref": "#/$defs/Episode"},
        },
        "required": ["schema", "turns", "episode"],
    }
    definitions["Other"] = {
        "type": "object",
        "properties": {"role": {"enum": ["head", "setup", "turn", "children"]}, "source": {"type": "string"}},
        "required": ["role"],
    }
    of_cell = {"properties": {"kernel_env": {"anyOf": [{"$ref": "#/$defs/Turn"}, {"$ref": "#/$defs/Other"}]}}}
    return {
        "$schema": "https://json-schema.org/draft/2020-12/schema",
        "title": f"An episode of kernel_env as a notebook, schema {SCHEMA}",
        "type": "object",
        "properties": {
            "metadata": {
                "properties": {"kernel_env": {"$ref": "#/$defs/Notebook"}},
                "required": ["kernel_env"],
            },
            "cells": {"type": "array", "items": {"properties": {"metadata": of_cell}}},
        },
        "required": ["metadata", "cells"],
        "$defs": definitions,
    }


if __name__ == "__main__":
    sys.stdout.write(json.dumps(notebook_schema(), indent=1, sort_keys=True) + "\n")
