"""The bench of a GPU in small sizes: each section measures its rows."""

import json
import subprocess
import sys

import pytest
from support import TESTS
from support.runs import DEADLINE


@pytest.mark.slow
def test_each_section_of_the_gpu_bench_has_rows(tmp_path):
    command = [sys.executable, str(TESTS / "bench" / "gpu.py"), "--small", "--out", str(tmp_path)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=DEADLINE, check=False)
    assert done.returncode == 0, done.stderr[-2000:]
    result = json.loads((tmp_path / "gpu.json").read_text())
    assert {"device", "driver", "torch", "transformers", "trl"} <= result["machine"].keys()
    for name, measured in {
        "entropy": "x none, sampler",
        "sampler": "local sampler, tokens/s",
        "training": "estimate / peak",
    }.items():
        rows = result["sections"][name]
        assert any(row.get(measured, 0) > 0 for row in rows), rows
        notes = [row["note"] for row in rows if "note" in row]
        assert all(note.startswith(("needs a GPU", "not measured")) for note in notes), notes
        assert f"## {name}\n" in (tmp_path / "gpu.md").read_text() and f"## {name}\n" in done.stdout


@pytest.mark.slow
def test_a_row_that_fails_does_not_end_the_bench(capsys):
    import torch
    from bench.gpu import Section

    def fail(error):
        raise error

    section = Section("training", seconds=60, end=float("inf"))
    section.measure({"model": "a"}, lambda: fail(torch.OutOfMemoryError("CUDA out of memory")))
    section.measure({"model": "b"}, lambda: fail(ValueError("no\nkernel")))
    section.measure({"model": "c"}, lambda: {"step s": 1.5})
    section.seconds = 0
    section.measure({"model": "d"}, lambda: {"step s": 1.5})
    notes = [row.get("note") for row in section.rows]
    assert notes == [
        "out of memory",
        "failed: ValueError: no kernel",
        None,
        "skipped: the time of this section is spent",
    ]
    assert section.to_markdown().splitlines()[2] == "| model | note | step s |"
