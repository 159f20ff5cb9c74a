"""Probes find what was planted, and only that; a probe that has learned nothing is the unigram floor."""

from dataclasses import replace

import numpy as np
import pytest
import torch
from examples import live, live_of, target

from kvshot_lib.drafters.layers import rotated
from kvshot_lib.features.store import write_store
from kvshot_lib.metrics import tables
from kvshot_lib.probes import readout as recoverable
from kvshot_lib.probes.readout import (
    HiddenProbe,
    KVProbe,
    Readout,
    frequent_tokens,
    read_document,
    rotary_of,
    score,
    train_probe,
)
from kvshot_lib.text.corpus import Document

DISTANCES = (1, 3, 6)
SPEC = live().spec


class Planted:
    """40 random documents whose state at t is made of known tokens: f_t of x_{t-3} alone; v_s of x_s, keys all alike but for RoPE."""

    def __init__(self, documents: int = 40, length: int = 40):
        chance = np.random.default_rng(0)
        self.spec, self.lengths = SPEC, [length] * documents
        self.tokens = torch.from_numpy(chance.integers(0, 24, (documents, length)))
        generator = torch.Generator().manual_seed(0)
        sizes = (len(SPEC.kv_layers), SPEC.num_kv_heads, SPEC.head_dim)
        self.codes = torch.randn(24, *sizes, generator=generator)
        self.states = torch.randn(24, len(SPEC.hidden_layers), SPEC.hidden_size, generator=generator)
        self.key = 2 * torch.randn(*sizes, generator=generator)
        self.rotary = rotary_of(target(), SPEC)

    def __len__(self):
        return len(self.tokens)

    def batch(self, indices, state):
        plain = live().batch([0], ())
        tokens, length = self.tokens[list(indices)], self.tokens.shape[1]
        rotary = self.rotary(self.key, torch.arange(length)[None])
        keys = rotated(self.key.flatten(0, 1)[None, :, None].expand(1, -1, length, -1), rotary)
        keys = keys[0].transpose(0, 1).unflatten(1, self.key.shape[:2])
        made = {
            "hidden_states": self.states[torch.roll(tokens, 3, dims=1)],
            "keys": keys.expand(len(tokens), *keys.shape),
            "values": self.codes[tokens],
        }
        given = {"tokens": tokens, "answer_mask": torch.ones_like(tokens, dtype=torch.bool)}
        return replace(plain, **given, **{name: made[name] for name in state})


@pytest.fixture(scope="module")
def planted():
    return Planted()


def accuracy(kind, planted, steps):
    kept, log_frequency = frequent_tokens(planted, 24, 512)
    to_vocabulary = torch.full((512,), -1).scatter(0, kept, torch.arange(len(kept)))
    probe = kind(planted, planted.rotary, DISTANCES, "cpu")
    readout = Readout(probe, target().model.get_input_embeddings().weight[kept], log_frequency, len(DISTANCES))
    train_probe(readout, planted, DISTANCES, to_vocabulary, steps, rate=2e-2)
    rows = (
        score(readout, "x", planted, DISTANCES, to_vocabulary, log_frequency).groupby("distance").sum(numeric_only=True)
    )
    return (rows["correct"] / rows["positions"]).to_dict()


def test_hidden_probe_reads_the_one_token_that_the_state_holds(planted):
    found = accuracy(HiddenProbe, planted, 60)
    assert found[3] > 0.95 and found[1] < 0.2 and found[6] < 0.2


def test_kv_probe_points_at_every_distance(planted):
    found = accuracy(KVProbe, planted, 60)
    assert min(found.values()) > 0.8


def test_kv_probe_reads_nothing_after_its_position_and_equals_a_naive_head(planted):
    probe = KVProbe(planted, planted.rotary, DISTANCES, "cpu")
    state, _, places = read_document(planted, 0, probe.reads, 6, "cpu")
    found = probe(state, places[:3])
    t = int(places[1])
    changed = {name: rows.clone() for name, rows in state.items()}
    for rows in changed.values():
        rows[t + 1 :] = 9.0
    assert torch.equal(probe(changed, places[:2])[:, 1], probe(state, places[:2])[:, 1])
    query = rotated(probe.queries[2][None, :, None], planted.rotary(probe.queries, torch.tensor([[t]])))[
        0, :, 0
    ].flatten()
    weights = (state["keys"].flatten(1)[: t + 1] @ query / SPEC.head_dim**0.5).softmax(0)
    by_hand = weights @ ((state["values"].flatten(1)[: t + 1] - probe.mean) / probe.spread)
    assert torch.allclose(found[2, 1], by_hand, atol=1e-4)


def test_untrained_probe_is_the_floor(planted):
    kept, log_frequency = frequent_tokens(planted, 12, 512)
    to_vocabulary = torch.full((512,), -1).scatter(0, kept, torch.arange(len(kept)))
    probe = HiddenProbe(planted, planted.rotary, DISTANCES, "cpu")
    readout = Readout(probe, target().model.get_input_embeddings().weight[kept], log_frequency, len(DISTANCES))
    rows = [score(r, "x", planted, DISTANCES, to_vocabulary, log_frequency) for r in (readout, None)]
    assert rows[0].equals(rows[1])
    counted = torch.bincount(planted.tokens.flatten(), minlength=24)[kept] + 1.0
    assert torch.allclose(log_frequency.exp(), counted / counted.sum())
    inside = sum(int(torch.isin(planted.tokens[0, t - 1], kept)) for t in range(6, 40))
    assert rows[1].iloc[0]["positions"] == inside  # only tokens that the probe can answer count


def test_command_writes_tables_and_does_not_train_again(tmp_path, monkeypatch, capsys):
    chance = np.random.default_rng(1)
    documents = [Document(chance.integers(3, 512, 30).astype(np.int32), np.arange(30) > 4) for _ in range(6)]
    for split in ("train", "evaluation"):
        write_store(tmp_path / "features" / split, live_of(*documents))
    monkeypatch.setattr(recoverable, "load_target", lambda *_, **__: target())
    before = {name: tensor.clone() for name, tensor in target().model.state_dict().items()}
    assert recoverable.main([str(tmp_path), "--steps", "3"]) == 0
    table = tables.read(tmp_path / "tables", "recoverable")
    assert set(table["source"]) == {"floor", "hidden", "kv"} and set(table["distance"]) == {1, 2, 3, 4, 6, 8, 12}
    assert all(torch.equal(before[name], tensor) for name, tensor in target().model.state_dict().items())
    monkeypatch.setattr(recoverable, "train_probe", None)
    assert recoverable.main([str(tmp_path), "--steps", "3"]) == 0
    assert tables.read(tmp_path / "tables", "recoverable").equals(table)
