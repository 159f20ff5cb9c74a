"""How a target's chat template writes a dialogue: what stands around the turns, what ends them, and a turn's own ids.

Headers are cut out of the tokenizer's own template: what is generated, trained on and decoded begins alike.
"""

import numpy as np
from transformers import PreTrainedTokenizerFast

from ..errors import StudyError

# What the default target and the tiny ones write where their files bring no template.
CHAT_TEMPLATE = (
    "{% for message in messages %}{{ '<|im_start|>' + message['role'] + '\n' + message['content'] + '<|im_end|>\n' }}"
    "{% endfor %}{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)


def chat_headers(tokenizer: PreTrainedTokenizerFast, thinking: bool = False) -> tuple[np.ndarray, np.ndarray]:
    """What stands before a user turn, and between it and the answer (the user's end-of-turn token first); int32 ids.

    For SmolLM2: ``<|im_start|>system…<|im_end|>\\n<|im_start|>user\\n`` and ``<|im_end|>\\n<|im_start|>assistant\\n``.
    Without ``thinking``, Qwen3's template closes an empty thought there.

    Raises
    ------
    StudyError : the tokenizer has no chat template.
    """
    message = [{"role": "user", "content": "USERTURN"}]
    options = {"tokenize": False, "add_generation_prompt": True, "enable_thinking": thinking}
    try:
        text = tokenizer.apply_chat_template(message, **options)
    except ValueError as error:
        raise StudyError(
            "this target has no chat template to write dialogues with; choose an instruct model"
        ) from error
    before, after = text.split("USERTURN")
    return _ids(tokenizer, before), _ids(tokenizer, after)


def next_user_header(tokenizer: PreTrainedTokenizerFast) -> np.ndarray:
    """What stands between an answer and the next user turn (the answer's end-of-turn token first); int32 ids."""
    turns = [("user", "USERTURN"), ("assistant", "REPLY"), ("user", "FOLLOWUP")]
    messages = [{"role": role, "content": text} for role, text in turns]
    text = tokenizer.apply_chat_template(messages, tokenize=False)
    return _ids(tokenizer, text.split("REPLY")[1].split("FOLLOWUP")[0])


def turn_ids(tokenizer: PreTrainedTokenizerFast, text: str) -> np.ndarray:
    """Ids of what somebody says, int32; a chat marker written in it is split up like any other word."""
    return _ids(tokenizer, text, split_special_tokens=True)


def special_ids(tokenizer: PreTrainedTokenizerFast, eos_token_id: int) -> set[int]:
    """The ids that never belong into a turn's text: end of turn and every other special token."""
    added = tokenizer.added_tokens_decoder
    return {eos_token_id, *(number for number, token in added.items() if token.special)}


def _ids(tokenizer: PreTrainedTokenizerFast, text: str, **options) -> np.ndarray:
    return np.array(tokenizer(text, add_special_tokens=False, **options)["input_ids"], dtype=np.int32)
