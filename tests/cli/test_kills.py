"""One run with every stage, killed twenty times at moments spread over all of it, ends in the identical result."""

from __future__ import annotations

import json
import os
import random
import shutil
import signal

import pytest

from tests.cli.runs import outcome

pytestmark = pytest.mark.skipif(not hasattr(os, "fork"), reason="needs POSIX signals")

RUN = [
    "--arms", "given,flat", "--schemes", "w4a4", "--methods", "qdrop", "--iterations", "40", "--epochs", "2",
    "--activation-noise", "gaussian", "--checkpoint-minutes", "0", "--out", "run",
]  # fmt: skip
SIGNALS = (signal.SIGKILL, signal.SIGTERM, signal.SIGINT)
KILLS, LINES = 20, 9  # two notes, the reference, and three stages for each arm


def test_twenty_kills(zygote, options, tmp_path):
    begin = ["run", *options, *RUN]
    (tmp_path / "whole").mkdir()
    ended = zygote.run(tmp_path / "whole", begin)
    assert ended.status == 0, ended.err
    stages = ended.out.split("\n\n")[0].splitlines()
    assert len(stages) == LINES, stages
    expected = outcome(tmp_path / "whole" / "run")
    assert expected["weights"].keys() == {f"{a}{q}.safetensors" for a in ("given", "flat") for q in ("", "-w4a4-qdrop")}
    steps = [step for (*_, event, step, _, _, _) in expected["log"] if event == "step"]
    assert steps == [12]  # fewer than those between two lines: the last one only
    draw, killed, last_words = random.Random(8), 0, set()
    while killed < KILLS:
        fresh = not (tmp_path / ".run.partial").exists()
        # further with every kill, so that the chain comes to all stages; the last line stands while the report is made
        line = 2 + (LINES - 2) * (killed + 1) // KILLS
        number = draw.choice(SIGNALS)
        argv = begin if fresh else ["run", "--resume", "--out", "run", "--trust"]
        ended = zygote.run(tmp_path, argv, kill=number, after=line, delay=draw.uniform(0, 0.4))
        assert "Traceback" not in ended.err
        if ended.status == 0:  # it was faster: the next life begins anew
            assert outcome(tmp_path / "run") == expected
            shutil.rmtree(tmp_path / "run")
            continue
        killed += 1
        last_words.add(ended.out.splitlines()[-1].partition("] ")[2].partition(",")[0])
        assert ended.status == (-signal.SIGKILL if number == signal.SIGKILL else 130), ended.err
        if (tmp_path / "run").exists():  # after its last word, before its process was gone
            assert outcome(tmp_path / "run") == expected
            shutil.rmtree(tmp_path / "run")
    # In different stages: three take time (two reconstructions and the training), the others pass in milliseconds.
    assert len(last_words) >= 3, last_words
    resume = ["run", "--resume", "--out", "run", "--trust"]
    ended = zygote.run(tmp_path, resume if (tmp_path / ".run.partial").exists() else begin)
    assert ended.status == 0, ended.err
    found = outcome(tmp_path / "run")
    assert found == expected
    assert all(json.loads(line) for line in (tmp_path / "run" / "log.jsonl").read_text().splitlines())
