"""Two processes equal one: training for the same global batch, and one feature store from both; with gloo, on CPUs."""

import json
import os
import subprocess
import sys
from dataclasses import replace

import examples
import pandas as pd
import pytest
import torch
from accelerate import debug_launcher
from examples import VARIANTS
from notebook_checks import ROOT

from kvshot_lib import parallel
from kvshot_lib.drafters.drafter import build_drafter
from kvshot_lib.features import store as feature_store
from kvshot_lib.features.live import LiveFeatures
from kvshot_lib.features.spec import feature_spec
from kvshot_lib.features.store import MANIFEST, StoredFeatures, write_store
from kvshot_lib.files import SEAL
from kvshot_lib.study.cli import main
from kvshot_lib.text.corpus import load_corpus
from kvshot_lib.training import loop as training
from kvshot_lib.training.config import TrainConfig
from kvshot_lib.training.loop import train

CONFIG = TrainConfig(
    epochs=2,
    batch_documents=4,
    ttt_steps=3,
    anchor_fraction=0.5,
    validate_every=2,
    checkpoint_every_s=1e9,
    learning_rate=3e-3,
)  # fmt: skip - 5 documents: batches of 4 and of 1, which leaves one process without a document


def in_two(function, *given):
    """Run it in two processes, forked from this one, which has imported everything."""
    examples.live()
    debug_launcher(_in_one_thread, (function, *given), num_processes=2)


def _in_one_thread(function, *given):
    torch.set_num_threads(1)
    parallel.begin()
    assert parallel.count() == 2
    function(*given)


def trained(folder, variant, config):
    """Train and leave weights, history and the recorded gradients in the folder."""
    built = build_drafter(VARIANTS[variant], examples.target(), examples.live().spec, examples.DRAFT_IDS, seed=1)
    history = train(built, examples.live(), examples.live(), config, folder)
    if parallel.is_main():
        torch.save(built.state_dict(), folder / "weights.pt")
        history.drop(columns="seconds").to_csv(folder / "history.csv", index=False)


def left_in(folder):
    rows = torch.load(folder / "checkpoint.pt", weights_only=True)["progress"]["gradients"]
    return torch.load(folder / "weights.pt"), pd.read_csv(folder / "history.csv"), pd.DataFrame(rows)


CURES = {"branch_loss_weight": 0.5, "kv_lag_augment_tokens": 2}


@pytest.mark.parametrize(("variant", "options"), [("hidden", {}), ("hybrid", CURES)])
def test_two_processes_train_to_what_one_trains_to(variant, options, tmp_path):
    config = replace(CONFIG, **options)
    if options:  # there, draws after one in a batch of fewer documents than processes are others
        config = replace(config, batch_documents=5)
    (tmp_path / "one").mkdir(), (tmp_path / "two").mkdir()
    trained(tmp_path / "one", variant, config)
    in_two(trained, tmp_path / "two", variant, config)
    (one, history, gradients), (two, other, others) = left_in(tmp_path / "one"), left_in(tmp_path / "two")
    start = build_drafter(
        VARIANTS[variant], examples.target(), examples.live().spec, examples.DRAFT_IDS, seed=1
    ).state_dict()
    for name, tensor in one.items():
        torch.testing.assert_close(two[name], tensor, atol=2e-5, rtol=1e-3, msg=name)
    assert (
        max((one[name] - start[name]).abs().max() for name in one) > 1e-3
    )  # tolerances are far below what was learned
    pd.testing.assert_frame_equal(history, other, rtol=1e-4)
    pd.testing.assert_frame_equal(gradients, others, rtol=1e-2, atol=1e-6)


def test_means_of_each_processs_own_pairs_would_not_do(tmp_path, monkeypatch):
    """The test above can fail: documents differ in length, so averaged gradients of local means are others."""
    (tmp_path / "one").mkdir(), (tmp_path / "two").mkdir()
    trained(tmp_path / "one", "hidden", CONFIG)
    monkeypatch.setattr(parallel, "summed", lambda tensor: tensor)
    in_two(trained, tmp_path / "two", "hidden", CONFIG)
    one, two = left_in(tmp_path / "one")[0], left_in(tmp_path / "two")[0]
    assert max((one[name] - two[name]).abs().max() for name in one) > 1e-3


def stored(folder, size=3):
    documents = load_corpus("tiny", "train").documents[:10]
    live = LiveFeatures(examples.target(), documents, feature_spec(examples.target()))
    write_store(folder, live, batch_documents=2, shard_documents=size, dtype=torch.float32)


def killed(folder):
    """The second process dies before its second shard, the first after all of its own."""
    whole, made = feature_store._shard, []

    def dying(*given):
        if parallel.rank() == 1 and made:
            raise KeyboardInterrupt
        made.append(1)
        return whole(*given)

    feature_store._shard = dying
    stored(folder)


def test_two_processes_write_the_store_that_one_writes(tmp_path):
    stored(tmp_path / "one")
    with pytest.raises(Exception, match="KeyboardInterrupt|terminated"):
        in_two(killed, tmp_path / "two")
    assert not json.loads((tmp_path / "two" / MANIFEST).read_text())["complete"]
    assert len(list((tmp_path / "two").glob("shard-*.safetensors"))) == 3  # of 4
    in_two(stored, tmp_path / "two")
    one, two = (json.loads((tmp_path / name / MANIFEST).read_text()) for name in ("one", "two"))
    assert [shard["file"] for shard in two["shards"]] == [f"shard-0000{i}.safetensors" for i in range(4)]
    assert {path.name for path in (tmp_path / "two").iterdir()} == {path.name for path in (tmp_path / "one").iterdir()}
    for manifest in (one, two):
        del manifest["shards"], manifest[SEAL]  # bytes of a shard, and so its hash, may differ in the last bit
    assert one == two
    stores = [StoredFeatures(tmp_path / name) for name in ("one", "two")]
    for name, tensor in vars(stores[0].batch(range(10))).items():
        torch.testing.assert_close(getattr(stores[1].batch(range(10)), name), tensor)


def test_rows_of_a_draw_are_those_of_the_whole_batch(tmp_path):
    def drawn(folder):
        generator = torch.Generator().manual_seed(3)
        rows, columns = ((3, 4), (2, 7))[parallel.rank()]  # five documents, of which the widest has seven anchors
        own = parallel.draw(lambda r, c: torch.rand(r, c, generator=generator), rows, columns)
        after = torch.rand(1, generator=generator)
        torch.save((own, after), folder / f"{parallel.rank()}.pt")

    in_two(drawn, tmp_path)
    generator = torch.Generator().manual_seed(3)
    whole, after = torch.rand(5, 7, generator=generator), torch.rand(1, generator=generator)
    for rank, width in ((0, 4), (1, 7)):
        own, next_one = torch.load(tmp_path / f"{rank}.pt")
        assert torch.equal(own, whole[rank::2, :width]) and torch.equal(next_one, after)


def test_alone_nothing_is_exchanged():
    assert (parallel.count(), parallel.rank(), parallel.is_main(), parallel.share([4, 2, 9])) == (1, 0, True, [4, 2, 9])
    tensor = torch.ones(2)
    assert parallel.summed(tensor) is tensor
    features = training.share_of_batch(examples.live(), [0, 1], ("target_argmax",))
    assert features.documents.tolist() == [0, 1]


@pytest.mark.pipeline
def test_accelerate_launch_starts_two_processes(tmp_path, monkeypatch, capsys):
    """Extraction by two, as a reader would start it; then a training by this process alone, from that store."""
    monkeypatch.chdir(ROOT)
    results = tmp_path / "smoke"
    launch = [
        sys.executable,
        "-m",
        "accelerate.commands.launch",
        "--multi_gpu",
        "--num_processes",
        "2",
        "--main_process_port",
        "0",
    ]
    launch += ["-m", "kvshot_lib", "processes", "smoke", "extract", "--results-dir", str(results)]
    ended = subprocess.run(
        launch, capture_output=True, text=True, env=os.environ | {"OMP_NUM_THREADS": "1"}, check=False
    )
    assert ended.returncode == 0, ended.stderr
    assert "2 processes\n" in ended.stdout and "1 process\n" not in ended.stdout
    assert main(["processes", "smoke", "train", "hidden/seed0", "--results-dir", str(results)]) == 0
    assert "hidden/seed0: " in capsys.readouterr().out
    assert (results / "tables/acceptance.parquet").exists() and (results / "runs/hidden/seed0/run.json").exists()
    assert main(["processes", "smoke", "train", "kv_9/seed0", "--results-dir", str(results)]) == 1
    assert "kv_9/seed0: not among the runs of smoke" in capsys.readouterr().err
