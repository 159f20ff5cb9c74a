"""Tiny targets for tests: random weights from a config, one for each family, and a tokenizer of whole words."""

import torch
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedModel, PreTrainedTokenizerFast

from .chat import CHAT_TEMPLATE

TINY = {
    "tiny": "llama", "tiny-llama": "llama", "tiny-qwen2": "qwen2", "tiny-qwen3": "qwen3", "tiny-mistral": "mistral",
    "tiny-olmo2": "olmo2", "tiny-gemma3": "gemma3_text",
}  # fmt: skip
TINY_OPTIONS = {
    "mistral": {"sliding_window": None},
    # Gemma-3's layers slide and see everything by turns; the ones that see everything have a RoPE of their own.
    "gemma3_text": {
        "num_hidden_layers": 6, "layer_types": ["sliding_attention", "full_attention"] * 3, "sliding_window": 8,
        "query_pre_attn_scalar": 32, "final_logit_softcapping": 20.0, "tie_word_embeddings": False,
    },
}  # fmt: skip


def tiny_model(family: str) -> PreTrainedModel:
    """A random 4-layer model over 512 tokens; its weights are wide enough that context changes what it predicts."""
    options = {
        "vocab_size": 512, "hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 4,
        "num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 16, "max_position_embeddings": 512,
        "initializer_range": 0.15, "tie_word_embeddings": True, "use_sliding_window": False,
        "bos_token_id": 1, "eos_token_id": 2, "pad_token_id": 2,
    }  # fmt: skip
    config = AutoConfig.for_model(family, **options | TINY_OPTIONS.get(family, {}))
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        return AutoModelForCausalLM.from_config(config, attn_implementation="sdpa", dtype=torch.float32)


def tiny_tokenizer() -> PreTrainedTokenizerFast:
    """Whole words ``w7`` … ``w511`` and the chat markers of the default target."""
    from tokenizers import Regex, Tokenizer, models, pre_tokenizers

    words = ["<|endoftext|>", "<|im_start|>", "<|im_end|>", "\n", "system", "user", "assistant"]
    words += [f"w{index}" for index in range(len(words), 512)]
    core = Tokenizer(models.WordLevel({word: index for index, word in enumerate(words)}, unk_token="<|endoftext|>"))
    core.pre_tokenizer = pre_tokenizers.Sequence(
        [pre_tokenizers.Split(" ", "removed"), pre_tokenizers.Split(Regex("\n"), "isolated")]
    )
    return PreTrainedTokenizerFast(
        tokenizer_object=core, bos_token="<|im_start|>", eos_token="<|im_end|>", pad_token="<|im_end|>",
        unk_token="<|endoftext|>", chat_template=CHAT_TEMPLATE,
    )  # fmt: skip
