"""Another document's KV: who gets whose, and nothing but keys and values changes."""

import examples
import torch

from kvshot_lib.features.shuffled import ShuffledKV
from kvshot_lib.features.spec import STATE


def test_each_document_gets_the_kv_of_the_next_longer_one():
    source = examples.live()  # lengths 12, 19, 11, 7, 15
    shuffled = ShuffledKV(source)
    assert shuffled.partner == {3: 2, 2: 0, 0: 4, 4: 1, 1: 3}
    assert (
        shuffled.lengths == source.lengths and len(shuffled) == 5 and shuffled.documents_hash != source.documents_hash
    )


def test_keys_and_values_are_the_partners_and_the_rest_is_its_own():
    source, wanted = examples.live(), (1, 0, 2)
    own, got = source.batch(wanted), ShuffledKV(source).batch(wanted)
    for name in ("tokens", "answer_mask", "hidden_states", "final_hidden", "target_argmax"):
        assert torch.equal(getattr(own, name), getattr(got, name)), name
    for row, (document, partner) in enumerate(((1, 3), (0, 4), (2, 0))):
        other = source.batch((partner,))
        length, theirs = source.lengths[document], source.lengths[partner]
        for name in ("keys", "values"):
            for s in range(length):  # document 1 has 19 tokens, its partner 7: they come around
                assert torch.allclose(getattr(got, name)[row, s], getattr(other, name)[0, s % theirs], atol=1e-5)


def test_a_batch_does_not_depend_on_its_company():
    shuffled = ShuffledKV(examples.live())
    together, alone = shuffled.batch((0, 1), STATE), shuffled.batch((0,), STATE)
    assert torch.allclose(together.keys[0, :12], alone.keys[0], atol=1e-5)
    assert shuffled.batch((0,), ("target_argmax",)).keys is None
