"""What a target is, as hashes: where they are equal, ids give the same numbers, and text the same ids."""

import hashlib
import json
from collections.abc import Sequence

import torch
from transformers import PreTrainedConfig, PreTrainedModel, PreTrainedTokenizerFast

# Fields of a config that change nothing in a frozen forward; of all others, known here or not, one counts as a change.
IDLE = {
    "architectures", "auto_map", "bos_token_id", "chunk_size_feed_forward", "dtype", "eos_token_id", "id2label",
    "initializer_range", "is_encoder_decoder", "label2id", "max_position_embeddings", "model_max_length",
    "output_attentions", "output_hidden_states", "output_router_logits", "pad_token_id", "pretraining_tp",
    "problem_type", "return_dict", "router_aux_loss_coef", "sep_token_id", "torch_dtype", "transformers_version",
    "unk_token_id", "use_cache",
}  # fmt: skip
LENGTH_ROPES = {"dynamic", "longrope", "yarn"}  # RoPE that reads max_position_embeddings

# The tracked corpora, checkpoints and tables name the default target by hashes of its weights and of its tokenizer
# alone, from before config, template and stop ids counted.
RECORDED_AS = {
    "6762b02af1ef1565e77a0f844da727225ed5595910e8d7d6da0e8613673e032e":
        "3f823861e9a7e152d796485f1e9bf3993c107646105da730b852855c1c119f28",
    "12fb7b71579c9bfe6d55961a8ff25d5ab134abe06bffb85589918fa5629fb6b2":
        "464c75d5fda9fca72328317f3ed2fad9d64be5eb638581628b5c9301258ebdb1",
}  # fmt: skip


def fingerprint(model: PreTrainedModel) -> str:
    """Hash of weights and `arithmetic`.

    Of the weights: every parameter's name, shape and 1,024 evenly spaced values in bfloat16 (so any dtype agrees).
    """
    digest = hashlib.sha256()
    for name, tensor in sorted(model.state_dict().items()):
        values = tensor.detach().flatten()
        sample = values[:: max(1, values.numel() // 1024)].to(torch.bfloat16).view(torch.int16).cpu()
        digest.update(f"{name} {tuple(tensor.shape)}".encode() + sample.numpy().tobytes())
    return _hash(digest.hexdigest(), arithmetic(model.config.get_text_config()))


def arithmetic(config: PreTrainedConfig) -> dict:
    """What a config says of a forward beyond its class's defaults: RoPE, epsilon, windows, caps, scales, …"""
    usual = {} if config.has_no_defaults_at_init else type(config)().to_dict()
    rope = getattr(config, "rope_parameters", None) or {}
    kinds = {part.get("rope_type") for part in (rope, *rope.values()) if isinstance(part, dict)}
    idle = IDLE - {"max_position_embeddings"} if kinds & LENGTH_ROPES else IDLE
    told = {
        name: value
        for name, value in config.to_dict().items()
        if value != usual.get(name) and name not in idle and not name.startswith("_") and not name.endswith("dropout")
    }
    return {**told, "model_type": config.model_type}


def tokenizer_fingerprint(tokenizer: PreTrainedTokenizerFast, stop_ids: Sequence[int]) -> str:
    """Hash of what makes ids of text and ends a turn: tokenizer, chat template and stop ids."""
    return _hash(tokenizer.backend_tokenizer.to_str(), [tokenizer.chat_template, list(stop_ids)])


def _hash(first: str, second: object) -> str:
    whole = hashlib.sha256(f"{first}\n{json.dumps(second, sort_keys=True, default=str)}".encode()).hexdigest()
    return RECORDED_AS.get(whole, whole)
