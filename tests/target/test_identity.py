"""A target's hashes tell apart what gives other numbers, or other ids for a text, and nothing else."""

import json
from functools import cache

import examples
import pytest
from hypothesis import given
from hypothesis import strategies as st
from transformers import AutoConfig, AutoModelForCausalLM

from kvshot_lib.drafters.checkpoint import load_drafter, save_drafter
from kvshot_lib.drafters.drafter import DrafterConfig, build_drafter
from kvshot_lib.errors import StudyError
from kvshot_lib.features.spec import feature_spec
from kvshot_lib.target.identity import fingerprint, tokenizer_fingerprint
from kvshot_lib.target.load import load_target
from kvshot_lib.target.wheels import DEFAULT_TARGET, packed_folder

SIZES = {
    "vocab_size": 32, "hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2,
    "num_key_value_heads": 1, "head_dim": 8,
}  # fmt: skip
SLIDES = ["sliding_attention", "full_attention"]


def rope(**changed) -> dict:
    return {"rope_parameters": {"rope_type": "default", "rope_theta": 1e4, **changed}}


# Changes of a Gemma-2 config, of which each changes what a forward gives.
COUNTS = [
    rope(rope_theta=1e5), rope(rope_type="linear", factor=2.0), {"rms_norm_eps": 1e-3}, {"layer_types": SLIDES},
    {"sliding_window": 8}, {"final_logit_softcapping": 9.0}, {"attn_logit_softcapping": 9.0},
    {"query_pre_attn_scalar": 99}, {"hidden_activation": "silu"}, {"use_bidirectional_attention": True},
    {"a_field_of_next_year": 2.0},
]  # fmt: skip
IDLES = [
    {"use_cache": False}, {"eos_token_id": [0, 2]}, {"bos_token_id": 3}, {"pad_token_id": 3}, {"initializer_range": 0.5},
    {"attention_dropout": 0.5}, {"dtype": "bfloat16"}, {"max_position_embeddings": 64}, {"architectures": ["Other"]},
    {"output_hidden_states": True}, {"_name_or_path": "elsewhere"}, {"auto_map": {}}, {"transformers_version": "4"},
]  # fmt: skip


@cache
def model():
    return AutoModelForCausalLM.from_config(config())


def config(**changed):
    usual = rope() | {"layer_types": ["full_attention"] * 2, "sliding_window": 4}
    return AutoConfig.for_model("gemma2", **SIZES | usual | changed)


def hash_with(*changes: dict) -> str:
    """Of the same weights under another config."""
    made = model()
    made.config = config(**{name: value for change in changes for name, value in change.items()})
    return fingerprint(made)


@given(st.lists(st.sampled_from(COUNTS + IDLES), max_size=5, unique_by=lambda c: next(iter(c))))
def test_what_changes_numbers_changes_the_hash_and_nothing_else_does(changes):
    assert (hash_with(*changes) == hash_with()) == (not any(change in COUNTS for change in changes))


def test_each_field_counts_alone_and_no_two_alike():
    assert len({hash_with(), *(hash_with(change) for change in COUNTS)}) == len(COUNTS) + 1


def test_lengths_count_where_rope_reads_them():
    scaled = rope(rope_type="dynamic", factor=2.0)
    assert hash_with(scaled) != hash_with(scaled, {"max_position_embeddings": 64})
    assert hash_with() == hash_with({"max_position_embeddings": 64})


def edited(folder, name="config.json", **changed) -> str:
    (folder / name).write_text(json.dumps(json.loads((folder / name).read_text()) | changed))
    return str(folder)


def test_a_drafter_of_the_same_weights_under_another_config_is_refused(tmp_path):
    examples.target().model.save_pretrained(tmp_path / "target")
    examples.target().tokenizer.save_pretrained(tmp_path / "target")
    target = load_target(str(tmp_path / "target"), device="cpu", dtype="float32")
    spec = feature_spec(target)
    save_drafter(build_drafter(DrafterConfig("kv"), target, spec, examples.DRAFT_IDS), tmp_path / "drafter")
    load_drafter(tmp_path / "drafter", target)
    same = load_target(edited(tmp_path / "target", use_cache=False), device="cpu", dtype="bfloat16")
    load_drafter(tmp_path / "drafter", same)
    other = load_target(edited(tmp_path / "target", **rope(rope_theta=5e5)), device="cpu", dtype="float32")
    with pytest.raises(StudyError, match="was trained for target .* not for"):
        load_drafter(tmp_path / "drafter", other)


def test_tokenizer_template_and_stop_ids_are_one_identity():
    tokenizer = load_target("tiny", device="cpu", dtype="float32").tokenizer
    before = tokenizer_fingerprint(tokenizer, (2,))
    assert before == tokenizer_fingerprint(tokenizer, (2,)) != tokenizer_fingerprint(tokenizer, (0, 2))
    tokenizer.chat_template += "\n"
    assert before != tokenizer_fingerprint(tokenizer, (2,))


@pytest.mark.needs_target
def test_the_default_target_goes_by_its_recorded_hashes_and_no_other_does(tmp_path):
    target = examples.default_target()
    assert target.hash.startswith("3f823861e9a7e152") and target.tokenizer_hash.startswith("464c75d5fda9fca7")
    for path in packed_folder(DEFAULT_TARGET).iterdir():
        (tmp_path / path.name).symlink_to(path)
    (tmp_path / "config.json").unlink()
    (tmp_path / "config.json").write_text((packed_folder(DEFAULT_TARGET) / "config.json").read_text())
    other = load_target(edited(tmp_path, rms_norm_eps=1e-6), device="cpu")
    assert not other.hash.startswith("3f82") and other.tokenizer_hash == target.tokenizer_hash
