"""Finding, naming and reading checkpoints."""

import json

import pytest
import torch
from huggingface_hub import errors
from safetensors.torch import save_file

from kernels.backend import load_backend
from shared.errors import ConfigurationError
from shared.kv_arena import KvLayout
from shared.models import resolve
from shared.models.config import ModelConfig
from shared.models.fingerprint import MAX_SAMPLES_PER_FILE, SAMPLE_BYTES, _samples, model_fingerprint
from shared.models.load import load_decoder
from shared.models.resolve import resolve_model
from shared.models.safetensors_files import checkpoint_files
from shared.models.weights import Checkpoint

CPU = torch.device("cpu")
CONFIG = {
    "architectures": ["LlamaForCausalLM"],
    "vocab_size": 40,
    "hidden_size": 8,
    "intermediate_size": 12,
    "num_hidden_layers": 1,
    "num_attention_heads": 2,
    "num_key_value_heads": 1,
    "max_position_embeddings": 64,
    "rms_norm_eps": 1e-5,
}
LAYOUT = KvLayout(num_layers=1, block_size=16, num_kv_heads=1, head_dim=4, dtype="float32")


def llama_tensors():
    shapes = {
        "model.embed_tokens.weight": (40, 8),
        "model.norm.weight": (8,),
        "lm_head.weight": (40, 8),
        "model.layers.0.input_layernorm.weight": (8,),
        "model.layers.0.post_attention_layernorm.weight": (8,),
        "model.layers.0.self_attn.q_proj.weight": (8, 8),
        "model.layers.0.self_attn.k_proj.weight": (4, 8),
        "model.layers.0.self_attn.v_proj.weight": (4, 8),
        "model.layers.0.self_attn.o_proj.weight": (8, 8),
        "model.layers.0.mlp.gate_proj.weight": (12, 8),
        "model.layers.0.mlp.up_proj.weight": (12, 8),
        "model.layers.0.mlp.down_proj.weight": (8, 12),
    }
    generator = torch.Generator().manual_seed(0)
    return {name: torch.randn(*shape, generator=generator) for name, shape in shapes.items()}


def write_checkpoint(directory, tensors=None, **config):
    directory.mkdir(exist_ok=True)
    (directory / "config.json").write_text(json.dumps(CONFIG | config))
    save_file(tensors or llama_tensors(), directory / "model.safetensors")
    return directory


def load(directory, **options):
    config = ModelConfig.from_pretrained(directory)
    return load_decoder(directory, config, dtype="float32", device=CPU, backend=load_backend("cpu", CPU), **options)


def fingerprint(directory, *, layout=LAYOUT, dtype="float32", **options):
    return model_fingerprint(directory, ModelConfig.from_pretrained(directory, **options), dtype, layout)


def test_a_missing_tensor_is_named(tmp_path):
    tensors = llama_tensors()
    del tensors["model.layers.0.mlp.up_proj.weight"]
    with pytest.raises(ConfigurationError, match=r"tensor model\.layers\.0\.mlp\.up_proj\.weight is missing"):
        load(write_checkpoint(tmp_path / "m", tensors))


def test_a_tensor_of_the_wrong_shape_is_named_with_both_shapes(tmp_path):
    tensors = llama_tensors() | {"model.norm.weight": torch.zeros(9)}
    with pytest.raises(ConfigurationError, match=r"model\.norm\.weight is \(9,\), expected \(8,\)"):
        load(write_checkpoint(tmp_path / "m", tensors))


def test_a_tensor_that_the_architecture_does_not_use_is_refused(tmp_path):
    tensors = llama_tensors() | {"model.layers.0.self_attn.q_proj.bias": torch.zeros(8)}
    with pytest.raises(ConfigurationError, match=r"1 tensors that LlamaForCausalLM does not use: .*q_proj\.bias"):
        load(write_checkpoint(tmp_path / "m", tensors))


def test_rotary_buffers_of_old_checkpoints_are_ignored(tmp_path):
    tensors = llama_tensors() | {"model.layers.0.self_attn.rotary_emb.inv_freq": torch.zeros(2)}
    assert load(write_checkpoint(tmp_path / "m", tensors)).has_lm_head


def test_a_model_without_its_lm_head_does_not_read_it(tmp_path):
    tensors = llama_tensors()
    del tensors["lm_head.weight"]
    model = load(write_checkpoint(tmp_path / "m", tensors), with_lm_head=False)
    assert not model.has_lm_head
    with pytest.raises(RuntimeError, match="without its LM head"):
        model.logits(torch.zeros(1, 8))


def test_loading_reports_growing_bytes(tmp_path):
    seen = []
    load(write_checkpoint(tmp_path / "m"), progress=lambda done, total: seen.append((done, total)))
    assert [done for done, _ in seen] == sorted(done for done, _ in seen)
    assert 0.5 < seen[-1][0] / seen[-1][1] <= 1.0


def test_tensors_outlive_the_checkpoint_they_came_from(tmp_path):
    expected = llama_tensors()["model.norm.weight"]
    with Checkpoint(write_checkpoint(tmp_path / "m")) as checkpoint:
        tensor = checkpoint.tensor("model.norm.weight", (8,))
    assert tensor.equal(expected)


def test_a_truncated_file_is_refused_by_name(tmp_path):
    file = write_checkpoint(tmp_path / "m") / "model.safetensors"
    file.write_bytes(file.read_bytes()[:-10])
    with pytest.raises(ConfigurationError, match=r"model\.safetensors: not a readable safetensors file"):
        load(tmp_path / "m")


def test_an_index_that_names_missing_or_outside_files_is_refused(tmp_path):
    index = tmp_path / "model.safetensors.index.json"
    index.write_text(json.dumps({"weight_map": {"a": "model-1.safetensors"}}))
    with pytest.raises(ConfigurationError, match=r"names files that are missing: model-1\.safetensors"):
        checkpoint_files(tmp_path)
    index.write_text(json.dumps({"weight_map": {"a": "../other.safetensors"}}))
    with pytest.raises(ConfigurationError, match="outside its directory"):
        checkpoint_files(tmp_path)
    index.write_text("{}")
    with pytest.raises(ConfigurationError, match="not an index"):
        checkpoint_files(tmp_path)


def test_the_bundled_model_is_found_by_name():
    directory = resolve_model("pydoc-mini", with_weights=False)
    assert ModelConfig.from_pretrained(directory).architecture == "Qwen3ForCausalLM"


def test_a_directory_is_taken_as_it_is(tmp_path):
    directory = write_checkpoint(tmp_path / "m")
    assert resolve_model(str(directory)) == directory.resolve()


def test_an_empty_directory_is_no_checkpoint(tmp_path):
    with pytest.raises(ConfigurationError, match=r"no config\.json"):
        resolve_model(str(tmp_path))


def test_a_checkpoint_without_weights_serves_a_gateway_only(tmp_path):
    (write_checkpoint(tmp_path / "m") / "model.safetensors").unlink()
    assert resolve_model(str(tmp_path / "m"), with_weights=False).is_dir()
    with pytest.raises(ConfigurationError, match=r"no \*\.safetensors"):
        resolve_model(str(tmp_path / "m"))


def test_a_path_that_is_no_directory_is_refused_without_asking_the_hub(tmp_path, monkeypatch):
    monkeypatch.setattr(resolve, "_download", lambda *_, **__: pytest.fail("asked the hub"))
    with pytest.raises(ConfigurationError, match="no such directory"):
        resolve_model(str(tmp_path / "absent"))


def test_a_hub_id_is_downloaded_with_weights_or_without(tmp_path, monkeypatch):
    directory = write_checkpoint(tmp_path / "m")
    calls = []

    def snapshot_download(name, *, allow_patterns):
        calls.append((name, "*.safetensors" in allow_patterns))
        return str(directory)

    monkeypatch.setattr("huggingface_hub.snapshot_download", snapshot_download)
    assert resolve_model("org/model-1.5B") == directory
    assert resolve_model("org/model-1.5B", with_weights=False) == directory
    assert calls == [("org/model-1.5B", True), ("org/model-1.5B", False)]


def test_what_the_hub_refuses_is_a_configuration_error(monkeypatch):
    def snapshot_download(name, **_):
        raise errors.LocalEntryNotFoundError("cannot find it offline\nmore lines")

    monkeypatch.setattr("huggingface_hub.snapshot_download", snapshot_download)
    with pytest.raises(ConfigurationError, match=r"'org/absent': no such directory.*cannot find it offline$"):
        resolve_model("org/absent")


def test_fingerprint_is_equal_for_equal_checkpoints_in_different_places(tmp_path):
    assert fingerprint(write_checkpoint(tmp_path / "a")) == fingerprint(write_checkpoint(tmp_path / "b"))


def test_fingerprint_changes_with_everything_that_changes_kv(tmp_path):
    base = fingerprint(write_checkpoint(tmp_path / "a"))
    tuned = llama_tensors()
    tuned["model.layers.0.self_attn.o_proj.weight"] *= 1.01
    block_size_32 = KvLayout(num_layers=1, block_size=32, num_kv_heads=1, head_dim=4, dtype="float32")
    others = [
        fingerprint(write_checkpoint(tmp_path / "b", tuned)),
        fingerprint(write_checkpoint(tmp_path / "c", rope_theta=5000.0)),
        fingerprint(write_checkpoint(tmp_path / "d", rms_norm_eps=1e-6)),
        fingerprint(tmp_path / "a", dtype="bfloat16"),
        fingerprint(tmp_path / "a", layout=block_size_32),
    ]
    assert len({base, *others}) == 1 + len(others)


def test_fingerprint_ignores_what_leaves_kv_alone(tmp_path):
    base = fingerprint(write_checkpoint(tmp_path / "a"))
    assert fingerprint(tmp_path / "a", max_model_len=32) == base
    assert fingerprint(write_checkpoint(tmp_path / "b", eos_token_id=3)) == base


@pytest.mark.parametrize("num_tensors", [1, 2047, 2049, 3000, 10000])
def test_fingerprint_reads_a_bounded_part_of_a_file(num_tensors):
    spans = [(i << 30, (i + 1) << 30) for i in range(num_tensors)]
    samples = _samples(spans)
    assert 0 < len(samples) <= MAX_SAMPLES_PER_FILE
    assert {length for _, length in samples} == {SAMPLE_BYTES}


def test_fingerprint_refuses_what_is_not_safetensors(tmp_path):
    directory = write_checkpoint(tmp_path / "a")
    (directory / "model.safetensors").write_bytes(b"PK\x03\x04" * 10)
    with pytest.raises(ConfigurationError, match="not a readable safetensors file"):
        fingerprint(directory)
