"""Instructor against a server: typed replies by a JSON schema and by a tool's arguments."""

import json
import sys
from typing import Literal

import instructor
import openai
from pydantic import BaseModel, ConfigDict, Field


class Entry(BaseModel):
    """What the reply must be."""

    model_config = ConfigDict(extra="forbid")  # else the model may add properties of its own until its limit

    name: str = Field(max_length=12)
    count: int = Field(ge=0, le=99)
    kind: Literal["a", "b"]


seen = {}
for mode in (instructor.Mode.JSON_SCHEMA, instructor.Mode.TOOLS, instructor.Mode.TOOLS_STRICT):
    client = instructor.from_openai(openai.OpenAI(base_url=f"{sys.argv[1]}/v1", api_key="none"), mode=mode)
    entry = client.chat.completions.create(
        model="pydoc-mini",
        response_model=Entry,
        max_retries=0,
        messages=[{"role": "user", "content": "One entry, please."}],
        temperature=1,
        seed=3,
        max_tokens=400,
    )
    seen[mode.value] = entry.model_dump()
print(json.dumps(seen))
