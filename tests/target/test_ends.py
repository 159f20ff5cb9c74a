"""What ends an answer, and that no rule of the checkpoint's own has a say in what is generated."""

import pytest
import torch
from transformers import GenerationConfig

from kvshot_lib.errors import StudyError
from kvshot_lib.target.load import load_target


@pytest.mark.parametrize(
    ("config_ids", "generation_ids", "stops"),
    [(2, 2, (2,)), ([0, 2], 2, (0, 2)), ([0, 2], [2, 7], (0, 2, 7)), (0, None, (0, 2)), (None, None, (2,)), ([9], 0, (0, 2, 9))],
)  # fmt: skip
def test_a_turn_ends_with_what_the_template_puts_there_and_every_named_id_stops(config_ids, generation_ids, stops):
    target = load_target("tiny", device="cpu", dtype="float32")
    target.model.config.eos_token_id, target.model.generation_config.eos_token_id = config_ids, generation_ids
    assert target.eos_token_id == 2 and target.stop_ids == stops and target.special_ids == {0, 1, 2, *stops}
    target.tokenizer.chat_template = None  # a base model: what its config names first, else its tokenizer
    first = config_ids if not isinstance(config_ids, list) else config_ids[0]
    assert target.eos_token_id == (2 if first is None else first)


@pytest.mark.parametrize(
    ("of_tokenizer", "of_config", "start"), [("<|im_start|>", 9, 1), (None, 9, 9), (None, None, 2)]
)
def test_a_text_begins_with_the_named_start_token_or_with_what_stands_between_texts(of_tokenizer, of_config, start):
    target = load_target("tiny", device="cpu", dtype="float32")
    target.tokenizer.bos_token, target.model.config.bos_token_id = of_tokenizer, of_config
    assert target.start_id == start


@pytest.mark.parametrize("wrong", ["2", True, -1, 512, [2, 2.0]])
def test_ids_that_can_end_nothing_are_refused(wrong):
    target = load_target("tiny", device="cpu", dtype="float32")
    target.model.generation_config.eos_token_id = wrong
    with pytest.raises(
        StudyError, match="eos_token_id of target tiny names .*, not ids from 0 to 511; mend its config"
    ):
        _ = target.stop_ids


@pytest.mark.parametrize(
    "rule",
    [
        {"no_repeat_ngram_size": 1}, {"repetition_penalty": 9.0}, {"min_new_tokens": 8}, {"suppress_tokens": [*range(3, 90)]},
        {"forced_eos_token_id": 7}, {"bad_words_ids": [[n] for n in range(3, 90)]}, {"num_beams": 3}, {"max_length": 3},
        {"do_sample": True, "temperature": 9.0}, {"sequence_bias": [[[5], 99.0]]}, {"guidance_scale": 3.0},
        {"encoder_repetition_penalty": 9.0}, {"exponential_decay_length_penalty": [1, 9.0]}, {"min_p": 0.9},
    ],
)  # fmt: skip
def test_no_rule_of_the_checkpoints_own_generation_config_leaks_in(rule):
    target = load_target("tiny", device="cpu", dtype="float32")
    ids = torch.tensor([[5, 6, 7]])
    for name, value in rule.items():
        setattr(target.model.generation_config, name, value)
    own = target.model.generation_config
    out = target.generate(ids, torch.ones_like(ids), GenerationConfig(max_new_tokens=12, do_sample=False))
    best = target.model(out).logits[0].argmax(-1)
    assert out.shape == (1, 15) and torch.equal(best[2:-1], out[0, 3:]) and target.model.generation_config is own
