"""Triton's own client against a gateway; prints what it saw as JSON.

Run as a process of its own: client and gateway both register the protocol's messages, and a process has room for one.
"""

from __future__ import annotations

import json
import queue
import sys

import numpy as np


def text_input(module, texts):
    tensor = module.InferInput("text_input", [len(texts)], "BYTES")
    tensor.set_data_from_numpy(np.array([text.encode() for text in texts], dtype=np.object_))
    return tensor


def flag(module, name, value=True):
    tensor = module.InferInput(name, [1], "BOOL")
    tensor.set_data_from_numpy(np.array([value]))
    return tensor


def texts_of(result, name="text_output"):
    return [element.decode() for element in result.as_numpy(name)]


def common(module, client):
    """What both clients can do."""
    refused = ""
    try:
        client.infer("pydoc-mini", [text_input(module, ["hi"])], parameters={"bananas": 1})
    except module.InferenceServerException as exc:
        refused = exc.message()
    plain = client.infer("pydoc-mini", [text_input(module, ["hi"])], parameters={"max_tokens": 3}, request_id="r1")
    batch = client.infer(
        "pydoc-mini",
        [
            text_input(module, ["hi", "Grüße"]),
            flag(module, "exclude_input_in_output"),
            flag(module, "return_finish_reason"),
            flag(module, "return_num_input_tokens"),
        ],
        parameters={"max_tokens": 2, "temperature": 0.0},
        priority=3,
    )
    return {
        "live": client.is_server_live(),
        "ready": client.is_server_ready(),
        "model_ready": client.is_model_ready("pydoc-mini"),
        "refused": refused,
        "plain": texts_of(plain),
        "batch": texts_of(batch),
        "reasons": texts_of(batch, "finish_reason"),
        "num_input_tokens": batch.as_numpy("num_input_tokens").tolist(),
    }


def http(url):
    import tritonclient.http as module

    client = module.InferenceServerClient(url)
    seen = common(module, client)
    seen["server"] = client.get_server_metadata()["name"]
    seen["inputs"] = [tensor["name"] for tensor in client.get_model_metadata("pydoc-mini")["inputs"]]
    seen["decoupled"] = client.get_model_config("pydoc-mini")["model_transaction_policy"]["decoupled"]
    seen["index"] = client.get_model_repository_index()
    as_json = client.infer(
        "pydoc-mini",
        [text_input(module, ["hi"])],
        outputs=[module.InferRequestedOutput("text_output", binary_data=False)],
        parameters={"max_tokens": 3},
    )
    seen["as_json"] = as_json.get_output("text_output")["data"]
    return seen


def grpc(url):
    import tritonclient.grpc as module

    client = module.InferenceServerClient(url)
    seen = common(module, client)
    seen["server"] = client.get_server_metadata(as_json=True)["name"]
    seen["inputs"] = [tensor["name"] for tensor in client.get_model_metadata("pydoc-mini", as_json=True)["inputs"]]
    config = client.get_model_config("pydoc-mini", as_json=True)["config"]
    seen["decoupled"] = config["model_transaction_policy"]["decoupled"]
    seen["index"] = client.get_model_repository_index(as_json=True)["models"]
    return seen | streamed(module, client)


def streamed(module, client):
    """Two streamed requests at a time and one that fails, over one stream."""
    answers = queue.Queue()
    client.start_stream(callback=lambda result, error: answers.put((result, error)))
    sampling = module.InferInput("sampling_parameters", [1], "BYTES")
    sampling.set_data_from_numpy(np.array([json.dumps({"max_tokens": "50"}).encode()], dtype=np.object_))
    for request_id in ("a", "b"):
        client.async_stream_infer(
            "pydoc-mini",
            [text_input(module, ["hi"]), flag(module, "stream"), sampling],
            request_id=request_id,
            enable_empty_final_response=True,
        )
    client.async_stream_infer("nope", [text_input(module, ["hi"])], request_id="c")
    pieces, finals, errors = {"a": [], "b": []}, 0, []
    while finals < 2 or not errors:
        result, error = answers.get(timeout=20)
        if error is not None:
            errors.append(error.message())
            continue
        response = result.get_response()
        if response.parameters["triton_final_response"].bool_param:
            finals += 1
        else:
            pieces[response.id] += texts_of(result)
    client.stop_stream()
    return {"pieces": pieces, "errors": errors}


if __name__ == "__main__":
    print(json.dumps({"http": http, "grpc": grpc}[sys.argv[1]](sys.argv[2])))
