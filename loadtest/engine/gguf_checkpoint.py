"""The same weights for llama.cpp: a GGUF file in BF16 or F16, quantized by llama.cpp's own quantizer where asked."""

from __future__ import annotations

import json
from pathlib import Path

import torch
from safetensors.torch import load_file

_NAMES = {
    "self_attn.q_proj": "attn_q",
    "self_attn.k_proj": "attn_k",
    "self_attn.v_proj": "attn_v",
    "self_attn.o_proj": "attn_output",
    "mlp.gate_proj": "ffn_gate",
    "mlp.up_proj": "ffn_up",
    "mlp.down_proj": "ffn_down",
    "input_layernorm": "attn_norm",
    "post_attention_layernorm": "ffn_norm",
}


def gguf_file(directory: Path, kind: str) -> Path:
    """The GGUF of a Llama checkpoint, made once beside it.

    Args:
        directory: The checkpoint, one safetensors file.
        kind: `bf16`, `f16`, `q8_0` or `q4_0`.
    """
    path = directory / f"{kind}.gguf"
    if path.exists():
        return path
    unfinished = path.with_suffix(".part")
    if kind in ("bf16", "f16"):
        _write(directory, unfinished, kind)
    else:
        _quantize(gguf_file(directory, "f16"), unfinished, kind)
    return unfinished.rename(path)


def _quantize(source: Path, path: Path, kind: str) -> None:
    import llama_cpp

    params = llama_cpp.llama_model_quantize_default_params()
    params.ftype = {"q8_0": llama_cpp.LLAMA_FTYPE_MOSTLY_Q8_0, "q4_0": llama_cpp.LLAMA_FTYPE_MOSTLY_Q4_0}[kind]
    if llama_cpp.llama_model_quantize(str(source).encode(), str(path).encode(), params):
        raise RuntimeError(f"llama.cpp did not quantize {source} to {kind}")


def _write(directory: Path, path: Path, kind: str) -> None:
    import gguf

    config = json.loads((directory / "config.json").read_text())
    heads, kv_heads, vocab = (config[k] for k in ("num_attention_heads", "num_key_value_heads", "vocab_size"))
    head_dim = config.get("head_dim") or config["hidden_size"] // heads
    theta = config.get("rope_theta") or config["rope_parameters"]["rope_theta"]
    writer = gguf.GGUFWriter(path, "llama")
    writer.add_context_length(config["max_position_embeddings"])
    writer.add_embedding_length(config["hidden_size"])
    writer.add_block_count(config["num_hidden_layers"])
    writer.add_feed_forward_length(config["intermediate_size"])
    writer.add_head_count(heads)
    writer.add_head_count_kv(kv_heads)
    writer.add_key_length(head_dim)
    writer.add_value_length(head_dim)
    writer.add_rope_dimension_count(head_dim)
    writer.add_rope_freq_base(float(theta))
    writer.add_layer_norm_rms_eps(config["rms_norm_eps"])
    writer.add_vocab_size(vocab)
    file_type = gguf.LlamaFileType.MOSTLY_BF16 if kind == "bf16" else gguf.LlamaFileType.MOSTLY_F16
    writer.add_file_type(file_type)
    _made_up_vocabulary(writer, vocab)
    for name, tensor in load_file(directory / "model.safetensors").items():
        _add(writer, name, tensor, kind, heads, kv_heads)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


def _made_up_vocabulary(writer: object, vocab: int) -> None:
    """llama.cpp loads nothing without one; the benchmark speaks token ids."""
    tokens = [b"<unk>", b"<s>", b"</s>", *(f"<0x{i:02X}>".encode() for i in range(256))]
    tokens += [f"t{i}".encode() for i in range(vocab - len(tokens))]
    writer.add_tokenizer_model("llama")  # type: ignore[attr-defined]
    writer.add_token_list(tokens)  # type: ignore[attr-defined]
    writer.add_token_scores([0.0] * vocab)  # type: ignore[attr-defined]
    writer.add_token_types([2, 3, 3] + [6] * 256 + [1] * (vocab - 259))  # type: ignore[attr-defined]
    writer.add_bos_token_id(1)  # type: ignore[attr-defined]
    writer.add_eos_token_id(2)  # type: ignore[attr-defined]


def _add(writer: object, name: str, tensor: torch.Tensor, kind: str, heads: int, kv_heads: int) -> None:
    import gguf

    if name in ("model.embed_tokens.weight", "model.norm.weight", "lm_head.weight"):
        target = {"embed_tokens": "token_embd", "norm": "output_norm", "lm_head": "output"}[name.split(".")[-2]]
        target += ".weight"
    else:
        parts = name.split(".")
        target = f"blk.{parts[2]}.{_NAMES['.'.join(parts[3:-1])]}.{parts[-1]}"
        if "q_proj" in name or "k_proj" in name:  # its rotary embedding pairs neighbours, the checkpoint's halves
            count = heads if "q_proj" in name else kv_heads
            rows = tensor.shape[0] // count
            tensor = tensor.view(count, 2, rows // 2, -1).swapaxes(1, 2).reshape(tensor.shape)
    if tensor.dim() == 1:
        writer.add_tensor(target, tensor.float().numpy())  # type: ignore[attr-defined]
    elif kind == "bf16":
        raw = tensor.contiguous().view(torch.uint8).numpy()
        shape = (tensor.shape[0], 2 * tensor.shape[1])
        writer.add_tensor(  # type: ignore[attr-defined]
            target, raw, raw_shape=shape, raw_dtype=gguf.GGMLQuantizationType.BF16
        )
    else:
        writer.add_tensor(target, tensor.half().numpy())  # type: ignore[attr-defined]
