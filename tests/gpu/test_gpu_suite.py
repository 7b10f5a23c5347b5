"""The GPU suite itself, without a GPU: a rehearsal of all of it, how a phase may end, and the table."""

import json
import os
import subprocess
import sys
import time
from pathlib import Path

import pytest
import suite
from real_unsloth import environment
from table import NOT_YET, markdown

HERE = Path(__file__).parent

# What the others do at the size of tiny models.
REHEARSED = "environment,adapters,logps,merged,precision,flex,contest,fit-3b"


@pytest.mark.slow
def test_every_phase_ends_well_on_a_cpu(tmp_path):
    # covers U2 U3 U4 U5 U11; Unsloth's own trainer and ours, on the real Unsloth
    environment()  # skips where Unsloth is missing
    command = [sys.executable, str(HERE / "suite.py"), "--device", "cpu", "--minutes", "20"]
    command += ["--phases", REHEARSED, "--out", str(tmp_path / "results"), "--work", str(tmp_path / "work")]
    done = subprocess.run(command, capture_output=True, text=True)
    (file,) = (tmp_path / "results").glob("*.json")
    phases = json.loads(file.read_text())["phases"]
    assert file.name == "cpu.json" and set(phases) == set(REHEARSED.split(","))
    assert {name: phase["status"] for name, phase in phases.items()} == dict.fromkeys(phases, "ok"), done.stderr
    assert done.returncode == 0
    left_out = {reason for phase in phases.values() for reason in phase["skipped"].values() if "it " not in reason}
    assert left_out == {"skipped: needs CUDA"}, "fp16 alone needs a GPU"
    rows = phases["contest"]["rows"]
    assert [(row["contender"], row["prompts_per_step"]) for row in rows] == [
        (name, count) for name in ("trl", "unsloth", "ours", "ours-unsloth") for count in (1, 8)
    ]
    assert all(row["seconds"] > 0 and row["completion_tokens"] == 6 for row in rows)
    assert markdown([json.loads(file.read_text())]) == f"On a GPU: {NOT_YET}.", "a rehearsal is no measurement"


def phase_of(tmp_path: Path, code: str, seconds: float = 20) -> dict:
    """How a phase of this code ends, and what is kept of it."""
    (tmp_path / "phases").mkdir(exist_ok=True)
    script = tmp_path / "phases" / "one.py"
    script.write_text(f"import time\nfrom common import run\ndef one(settings, record):\n    {code}\nrun(one)\n")
    phase = suite.Phase("one", str(script.with_suffix("")), seconds=seconds, least=1)  # an absolute path wins
    variables = {**os.environ, "PYTHONPATH": str(HERE / "phases")}
    process, until = suite.start(phase, "cuda", "tiny", tmp_path, variables, time.monotonic() + 60)
    return suite.finish(phase, process, until, tmp_path)


def test_how_a_phase_may_end(tmp_path):
    good = phase_of(tmp_path, "record.put(a=1); record.check('holds', True)")
    assert good == {"status": "ok", "checks": {"holds": True}, "skipped": {}, "a": 1}
    false = phase_of(tmp_path, "record.check('the sky is green', False)")
    assert false["status"] == "failed: does not hold: the sky is green" and false["log"]
    broken = phase_of(tmp_path, "record.put(a=1); raise ValueError('no such card')")
    assert broken["status"] == "failed: ValueError: no such card" and broken["a"] == 1, "what was found is kept"
    late = phase_of(tmp_path, "record.put(a=1); time.sleep(60)", seconds=3)
    assert late["status"] == "stopped: out of time" and late["a"] == 1
    tried = phase_of(tmp_path, "record.attempt('x', lambda: 1 / 0); record.put(b=2)")
    assert tried["x"] == {"error": "ZeroDivisionError: division by zero"} and tried["b"] == 2
    assert tried["status"] == "failed: does not hold: x runs"
    assert suite.finish(suite.PHASES[0], None, 0.0, tmp_path) == {"status": "skipped: no time left"}


def results(versions: dict | None = None, **phases: dict) -> dict:
    about = {"status": "ok", "gpu": "Card X", "memory_gib": 24.0, "versions": versions or {"torch": "2", "trl": "1.15"}}
    return {"date": "2026-01-02T03:04:05", "device": "cuda", "phases": {"environment": about, **phases}}


CONTEST = {
    "shape": "qwen2.5-vl-3b",
    "prompt_tokens": 1000,
    "completion_tokens": 200,
    "num_generations": 8,
    "rows": [
        {
            "name": "TRL",
            "prompts_per_step": 1,
            "seconds": 4.0,
            "peak_bytes": 3 * 2**30,
            "phases": {"generate": 1.0, "old_ref_logps": 0.0, "forward_backward": 2.5},
        },
        {"name": "Unsloth", "prompts_per_step": 1, "error": "out of memory: CUDA", "error_kind": "out of memory"},
    ],
}
FIT = {
    "shape": "qwen2.5-vl-3b",
    "contender": "ours-unsloth",
    "cases": [
        {"prompt_tokens": 500, "completion_tokens": 128, "num_generations": 4, "fits": 16, "peak_bytes": 2**33},
        {
            "prompt_tokens": 900,
            "completion_tokens": 128,
            "num_generations": 8,
            "fits": False,
            "out_of_memory_at": [16, 24],
        },
        {"prompt_tokens": 999, "completion_tokens": 128, "num_generations": 8, "fits": "not reached"},
    ],
}


def test_the_table_holds_what_was_measured_and_nothing_else():
    text = markdown([results(contest=CONTEST, **{"fit-3b": FIT})])
    assert text.startswith("Card X (24 GiB), 2026-01-02: torch 2, trl 1.15.")
    assert "| TRL | 1 | 1.00 | 0.00 | 2.50 | 4.00 | 3.0 |" in text
    assert "| Unsloth | 1 |  |  |  | out of memory |  |" in text
    assert "| qwen2.5-vl-3b | ours-unsloth | 500 | 128 | 4 | 16 GiB | 8.0 |" in text
    assert "| 900 | 128 | 8 | not in 24 GiB |  |" in text and "999" not in text
    for nothing in (
        [],
        [results()],
        [{**results(contest=CONTEST), "device": "cpu"}],
        [{"device": "cuda", "phases": {}}],
    ):
        assert markdown(nothing) == f"On a GPU: {NOT_YET}."
    done = subprocess.run([sys.executable, str(HERE / "suite.py"), "--table"], capture_output=True, text=True)
    assert done.stdout == f"On a GPU: {NOT_YET}.\n"


def test_a_second_command_adds_to_the_first_of_the_same_versions(tmp_path):
    file = suite.write(results(contest=CONTEST), tmp_path)
    assert file.name == "card-x.json"
    suite.write(results(fit={"status": "ok"}), tmp_path)
    assert set(json.loads(file.read_text())["phases"]) == {"environment", "contest", "fit"}
    suite.write(results(versions={"torch": "3"}), tmp_path)
    assert set(json.loads(file.read_text())["phases"]) == {"environment"}, "figures of other versions are of the past"


def test_a_phase_that_had_no_time_keeps_what_was_measured_before(tmp_path):
    file = suite.write(results(contest=CONTEST), tmp_path)
    suite.write(results(contest={"status": suite.NO_TIME}, flex={"status": suite.NO_TIME}), tmp_path)
    phases = json.loads(file.read_text())["phases"]
    assert phases["contest"] == CONTEST and phases["flex"] == {"status": suite.NO_TIME}


def test_what_is_written_names_no_folder_of_this_machine(tmp_path):
    said = f"no {HERE / 'suite.py'}, nor {tmp_path / 'models'}"
    found = phase_of(tmp_path, f"raise ValueError({said!r})")
    assert found["status"] == "failed: ValueError: no ./tests/gpu/suite.py, nor work/models"
    assert str(tmp_path) not in json.dumps(found) and str(Path.home()) not in json.dumps(found)


def test_some_phases_are_run_with_the_environment(tmp_path, monkeypatch):
    """Else nothing would say whose figures they are, and the file would be of no GPU."""
    chosen = []
    monkeypatch.setattr(suite, "run", lambda phases, *rest: chosen.extend(phases) or {"phases": {}})
    monkeypatch.setattr(suite.signal, "signal", lambda *how: None)
    monkeypatch.setattr(sys, "argv", ["suite.py", "--phases", "flex", "--out", str(tmp_path)])
    assert suite.main() == 0 and [phase.name for phase in chosen] == ["environment", "flex"]


def test_a_suite_that_is_ended_ends_its_phases(tmp_path):
    script = tmp_path / "ended.py"
    (tmp_path / "long.py").write_text("import time\ntime.sleep(60)\n")
    script.write_text(
        f"import sys; sys.path.insert(0, {str(HERE)!r}); import suite; from pathlib import Path\n"
        f"long = {str(tmp_path / 'long')!r}; start, finish = suite.start, suite.finish\n"
        "def told(*a):\n    out = start(*a); print(out[0].pid, flush=True); return out\n"
        "def waits(*a):\n    print('waits', flush=True); return finish(*a)\n"
        "suite.start, suite.finish = told, waits\n"
        "suite.PHASES = tuple(suite.Phase(name, long, together=True) for name in ('environment', 'two'))\n"
        f"sys.argv[1:] = ['--out', {str(tmp_path)!r}]; suite.main()\n"
    )
    process = subprocess.Popen([sys.executable, str(script)], stdout=subprocess.PIPE, text=True)
    assert process.stdout is not None
    phases = [int(process.stdout.readline()) for _ in range(2)]
    assert process.stdout.readline() == "waits\n"
    process.terminate()
    assert process.wait(20) == 143
    for phase in phases:
        with pytest.raises(ProcessLookupError):
            os.kill(phase, 0)


def test_misuse_is_told_in_one_sentence(tmp_path):
    def refused(*arguments: str) -> str:
        done = subprocess.run([sys.executable, str(HERE / "suite.py"), *arguments], capture_output=True, text=True)
        assert done.returncode != 0
        return done.stderr

    assert "there is no dinner" in refused("--phases", "flex,dinner")
    assert "there is no wheel in it" in refused("--wheels", str(tmp_path), "--out", str(tmp_path))
    assert "invalid choice: 'tpu'" in refused("--device", "tpu")


def test_every_phase_has_a_script_and_a_line_in_the_readme():
    text = (HERE / "README.md").read_text()
    for phase in suite.PHASES:
        assert (HERE / "phases" / f"{phase.script}.py").is_file()
        assert f"`{phase.name}`" in text or (phase.name.startswith("fit-") and "`fit-*`" in text)
