"""LangChain's OpenAI classes against a server: invoke, stream, typed replies, tools, embeddings, the Responses API."""

import json
import sys

from langchain_openai import ChatOpenAI, OpenAIEmbeddings
from pydantic import BaseModel, Field

QUESTION = "What does json.dumps do?"
URL = {"base_url": f"{sys.argv[1]}/v1", "api_key": "none", "max_retries": 0}


class Entry(BaseModel):
    """An entry."""

    name: str = Field(max_length=12)
    count: int = Field(ge=0, le=99)


chat = ChatOpenAI(model="pydoc-mini", temperature=0, **URL)
bounded = ChatOpenAI(model="pydoc-mini", temperature=1, seed=4, max_completion_tokens=200, **URL)
whole = chat.invoke(QUESTION)
calls = bounded.bind_tools([Entry], tool_choice="Entry").invoke(QUESTION).tool_calls
vectors = OpenAIEmbeddings(model="pydoc-mini", check_embedding_ctx_length=False, **URL).embed_documents(["a", "b"])
responses = ChatOpenAI(model="pydoc-mini", temperature=0, use_responses_api=True, **URL).invoke(QUESTION)
print(
    json.dumps(
        {
            "whole": whole.content,
            "streamed": "".join(chunk.content for chunk in chat.stream(QUESTION)),
            "usage": whole.usage_metadata["output_tokens"],
            "typed": bounded.with_structured_output(Entry, method="json_schema").invoke(QUESTION).model_dump(),
            "called": [call["name"] for call in calls],
            "arguments": Entry.model_validate(calls[0]["args"]).model_dump(),
            "vectors": [len(vector) for vector in vectors],
            "responses": "".join(part["text"] for part in responses.content),
        }
    )
)
