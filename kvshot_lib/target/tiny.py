"""TODO"""

import torch
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    PreTrainedModel,
    PreTrainedTokenizerFast,
)

TINY = {
    "tiny": "llama", "tiny-llama": "llama", "tiny-qwen2": "qwen2", "tiny-qwen3": "qwen3", "tiny-mistral": "mistral",
    "tiny-olmo2": "olmo2", "tiny-gemma3": "gemma3_text",
}  # fmt: skip


# Gemma-3's layers slide and see everything by turns; the ones that see everything have a RoPE of their own.
TINY_OPTIONS = {
    "mistral": {"sliding_window": None},
    "gemma3_text": {
        "num_hidden_layers": 6, "layer_types": ["sliding_attention", "full_attention"] * 3, "sliding_window": 8,
        "query_pre_attn_scalar": 32, "final_logit_softcapping": 20.0, "tie_word_embeddings": False,
    },
}  # fmt: skip


CHAT_TEMPLATE = (
    "{% for message in messages %}{{ '<|im_start|>' + message['role'] + '\n' + message['content'] + '<|im_end|>\n' }}"
    "{% endfor %}{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)


def _tiny(family: str, seed: int) -> tuple[PreTrainedModel, PreTrainedTokenizerFast]:
    """A random 4-layer model over 512 tokens; its weights are wide enough that context changes what it predicts."""
    options = {
        "vocab_size": 512, "hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 4, "num_attention_heads": 4,
        "num_key_value_heads": 2, "head_dim": 16, "max_position_embeddings": 512, "initializer_range": 0.15, "tie_word_embeddings": True,
        "bos_token_id": 1, "eos_token_id": 2, "pad_token_id": 2, "use_sliding_window": False,
    }  # fmt: skip
    config = AutoConfig.for_model(family, **options | TINY_OPTIONS.get(family, {}))
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model = AutoModelForCausalLM.from_config(config, attn_implementation="sdpa", dtype=torch.float32)
    return model, tiny_tokenizer()


def tiny_tokenizer() -> PreTrainedTokenizerFast:
    """Whole words ``w7`` … ``w511`` and the chat markers of the default target."""
    from tokenizers import Regex, Tokenizer, models, pre_tokenizers

    special = ["<|endoftext|>", "<|im_start|>", "<|im_end|>"]
    words = [*special, "\n", "system", "user", "assistant"]
    words += [f"w{index}" for index in range(len(words), 512)]
    core = Tokenizer(models.WordLevel({word: index for index, word in enumerate(words)}, unk_token="<|endoftext|>"))
    core.pre_tokenizer = pre_tokenizers.Sequence(
        [pre_tokenizers.Split(" ", "removed"), pre_tokenizers.Split(Regex("\n"), "isolated")]
    )
    return PreTrainedTokenizerFast(
        tokenizer_object=core, bos_token="<|im_start|>", eos_token="<|im_end|>", pad_token="<|im_end|>",
        unk_token="<|endoftext|>", chat_template=CHAT_TEMPLATE,
    )  # fmt: skip
