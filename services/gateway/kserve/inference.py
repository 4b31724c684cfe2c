"""An inference request as a completion: `text_input` in, `text_output` out, tensors as in Triton's backend for vLLM.

text_input             BYTES [n]    prompts
stream                 BOOL  [1]    one response per piece; needs a stream
sampling_parameters    BYTES [1]    JSON; the fields of /v1/completions. The request's own parameters win.
exclude_input_in_output BOOL [1]    false, as there: `text_output` begins with the prompt, unless it is streamed
return_finish_reason, return_num_input_tokens, return_num_output_tokens  BOOL [1]
"""

from __future__ import annotations

from collections.abc import AsyncIterator, Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, get_args

import orjson

from services.gateway.gateway import Gateway
from services.gateway.kserve.tensors import Element, Tensor, column
from services.gateway.replies.reply_format import collect
from services.gateway.requests.body_reader import validate
from services.gateway.schemas.completion import CompletionBody
from services.gateway.sessions.generation import Generation
from shared.errors import InvalidRequest, ModelNotFound, UnsupportedField

MODEL_VERSION = "1"
FLAGS = ("return_finish_reason", "return_num_input_tokens", "return_num_output_tokens")
INPUTS = {
    "text_input": "BYTES",
    "stream": "BOOL",
    "sampling_parameters": "BYTES",
    "exclude_input_in_output": "BOOL",
    **dict.fromkeys(FLAGS, "BOOL"),
}
OUTPUTS = {
    "text_output": "BYTES",
    "finish_reason": "BYTES",
    "num_input_tokens": "UINT32",
    "num_output_tokens": "UINT32",
}
_REFUSED_INPUTS = {
    "image": "the model reads text only",
    "return_cumulative_logprob": "sums of log-probabilities are not built",
    "return_logprobs": "log-probabilities are not built on this endpoint; /v1/completions has them",
}
_ONE_OUTPUT = "there is one output per prompt"
_TEXT_ONLY = "outputs are texts; /v1/completions has more"
_REFUSED_FIELDS = {
    "model": "the request names it beside its inputs",
    "prompt": "it is the input 'text_input'",
    "stream": "it is an input",
    "n": _ONE_OUTPUT,
    "best_of": _ONE_OUTPUT,
    "echo": "see the input 'exclude_input_in_output'",
    **dict.fromkeys(
        ("logprobs", "prompt_logprobs", "return_token_ids", "return_tokens_as_token_ids", "stream_options", "timing"),
        _TEXT_ONLY,
    ),
}
"""Of a completion, that no output would show or that something else says."""
_TEXT_FIELDS = {name for name, field in CompletionBody.model_fields.items() if str in get_args(field.annotation)}
_TRANSPORT_PARAMETERS = ("triton_enable_empty_final_response", "binary_data_output")


@dataclass(frozen=True, slots=True)
class InferRequest:
    """One request, however it came."""

    model_name: str
    model_version: str
    inputs: Mapping[str, Tensor]
    parameters: Mapping[str, object] = field(default_factory=dict)
    outputs: Sequence[str] = ()
    request_id: str = ""

    @property
    def wants_stream(self) -> bool:
        """One response per piece."""
        return self.flag("stream", default=False)

    def flag(self, name: str, *, default: bool) -> bool:
        """A BOOL input."""
        tensor = self.inputs.get(name)
        return bool(tensor.elements[0]) if tensor is not None and tensor.elements else default


def by_name(tensors: Iterable[Tensor]) -> dict[str, Tensor]:
    """Inputs by their names.

    Raises:
        InvalidRequest: Two have one name.
    """
    inputs: dict[str, Tensor] = {}
    for tensor in tensors:
        if tensor.name in inputs:
            raise InvalidRequest(f"there are two inputs {tensor.name[:64]!r}", param=tensor.name[:64])
        inputs[tensor.name] = tensor
    return inputs


def check_parameters(tensor: str, parameters: Iterable[str], known: Collection[str] = ()) -> None:
    """Refuses what the protocol's extensions may say of a tensor (shared memory, classification) and is not served.

    Raises:
        UnsupportedField: It says so.
    """
    for name in parameters:
        if name not in known:
            message = f"{tensor[:64]!r}: the parameter {name[:64]!r} of a tensor is not supported"
            raise UnsupportedField(message, param=tensor[:64])


def check_model(gateway: Gateway, name: str, version: str) -> None:
    """Refuses what is not served.

    Raises:
        ModelNotFound: Another model, or another version than the only one.
    """
    gateway.model.check_name(name)
    if version not in ("", MODEL_VERSION):
        raise ModelNotFound(f"model {name!r} has no version {version[:64]!r}, only {MODEL_VERSION!r}")


async def infer(gateway: Gateway, request: InferRequest, received_s: float) -> list[Tensor]:
    """The whole answer.

    Raises:
        TandemError: It cannot be served, as the message says.
    """
    if request.wants_stream:
        raise InvalidRequest("'stream' needs ModelStreamInfer or generate_stream", param="stream")
    generation = await _started(gateway, request, received_s)
    try:
        choices = await collect(generation)
    finally:
        generation.close()
    prompts = [_decoded(element) for element in request.inputs["text_input"].elements]
    prepends = not request.flag("exclude_input_in_output", default=False)
    texts = [(prompt if prepends else "") + choice.text for prompt, choice in zip(prompts, choices, strict=True)]
    reasons = [choice.finish_reason or "" for choice in choices]
    return _tensors(request, texts, reasons, generation)


async def infer_stream(gateway: Gateway, request: InferRequest, received_s: float) -> AsyncIterator[list[Tensor]]:
    """The answer piece by piece.

    Raises:
        TandemError: It cannot be served, as the message says.
    """
    if not request.flag("exclude_input_in_output", default=True):
        raise InvalidRequest("'exclude_input_in_output' must not be false in a stream", param="exclude_input_in_output")
    tensor = request.inputs.get("text_input")
    if tensor is not None and len(tensor.elements) != 1:
        raise InvalidRequest(f"a stream takes one prompt, not {len(tensor.elements)}", param="text_input")
    generation = await _started(gateway, request, received_s, stream=True)
    try:
        async for deltas in generation.batches():
            for delta in deltas:
                if delta.text or delta.finish_reason:
                    yield _tensors(request, [delta.text], [delta.finish_reason or ""], generation)
    finally:
        generation.close()


async def _started(gateway: Gateway, request: InferRequest, received_s: float, *, stream: bool = False) -> Generation:
    check_model(gateway, request.model_name, request.model_version)
    for name in request.outputs:
        if name not in OUTPUTS:
            raise InvalidRequest(f"there is no output {name[:64]!r}, only {', '.join(OUTPUTS)}", param=name[:64])
    _check_inputs(request)
    content: dict[str, Any] = _sampling(request)
    for name, reason in _REFUSED_FIELDS.items():
        value = content.get(name)
        if not (value is None or value is False or (reason is _ONE_OUTPUT and value == 1)):
            raise UnsupportedField(f"{name!r} is not supported here: {reason}", param=name)
    content |= {"model": request.model_name, "stream": stream}
    content["prompt"] = [_decoded(element) for element in request.inputs["text_input"].elements]
    body = validate(content, CompletionBody, gateway.settings.unknown_fields)
    return await gateway.pipeline.completion_generation(body, received_s)


def _check_inputs(request: InferRequest) -> None:
    for name, tensor in request.inputs.items():
        if name in _REFUSED_INPUTS:
            raise UnsupportedField(f"input {name!r} is not supported: {_REFUSED_INPUTS[name]}", param=name)
        if name not in INPUTS:
            raise InvalidRequest(f"there is no input {name[:64]!r}, only {', '.join(INPUTS)}", param=name[:64])
        if tensor.datatype != INPUTS[name]:
            raise InvalidRequest(f"input {name!r} is {tensor.datatype}, must be {INPUTS[name]}", param=name)
        if name != "text_input" and len(tensor.elements) != 1:
            raise InvalidRequest(f"input {name!r} has {len(tensor.elements)} elements, must have 1", param=name)
    if "text_input" not in request.inputs:
        raise InvalidRequest("the input 'text_input' is required", param="text_input")


def _sampling(request: InferRequest) -> dict[str, object]:
    """Fields of a completion; numbers and booleans may be text, as Triton's clients have no other JSON for them."""
    fields: dict[str, object] = {}
    tensor = request.inputs.get("sampling_parameters")
    if tensor is not None:
        try:
            content = orjson.loads(_decoded(tensor.elements[0]))
        except orjson.JSONDecodeError as exc:
            raise InvalidRequest(
                f"'sampling_parameters' is not valid JSON: {exc}", param="sampling_parameters"
            ) from exc
        if not isinstance(content, dict):
            raise InvalidRequest("'sampling_parameters' must be a JSON object", param="sampling_parameters")
        fields |= content
    fields |= {name: value for name, value in request.parameters.items() if name not in _TRANSPORT_PARAMETERS}
    return {name: _plain(name, value) for name, value in fields.items()}


def _plain(name: str, value: object) -> object:
    if not isinstance(value, str) or name in _TEXT_FIELDS:
        return value
    try:
        parsed = orjson.loads(value)
    except orjson.JSONDecodeError:
        return value
    return parsed if isinstance(parsed, bool | int | float) else value


def _tensors(request: InferRequest, texts: list[str], reasons: list[str], generation: Generation) -> list[Tensor]:
    """The outputs that were asked for, by name or by their flags; `text_output` in any case where none was named."""
    found = {
        "text_output": column("text_output", "BYTES", [text.encode() for text in texts]),
        "finish_reason": column("finish_reason", "BYTES", [reason.encode() for reason in reasons]),
        "num_input_tokens": column(
            "num_input_tokens", "UINT32", [session.num_prompt_tokens for session in generation.sessions]
        ),
        "num_output_tokens": column("num_output_tokens", "UINT32", generation.output_tokens),
    }
    if request.outputs:
        return [found[name] for name in request.outputs]
    flagged = [flag.removeprefix("return_") for flag in FLAGS if request.flag(flag, default=False)]
    return [found[name] for name in ("text_output", *flagged)]


def _decoded(element: Element) -> str:
    assert isinstance(element, bytes)
    try:
        return element.decode()
    except UnicodeDecodeError as exc:
        raise InvalidRequest(f"a text is not valid UTF-8: {exc}") from exc
