"""The patch against hook functions of published releases of unsloth_zoo, from wheels that pip fetches into a cache.

``make test-matrix`` runs these tests and fails without a package index; elsewhere they are skipped then.
"""

import json
import os
import subprocess
import sys
from functools import cache
from pathlib import Path

import pytest
from packaging.utils import parse_wheel_filename

_TESTS = Path(__file__).parent
WHEELS = _TESTS.parent / ".cache" / "wheels"
_TOWERS = "adapters with a gradient under checkpointing"

# What each release's own function fails on; and how many of 48 adapters of a tiny model with a trained vision tower get
# a gradient from it.
RELEASES = {
    "2025.3.17": ({"logits without a loss", "a last hidden state"}, 28),
    "2025.6.2": ({"logits without a loss", "a last hidden state"}, 28),
    "2025.6.3": ({"a last hidden state"}, 28),
    "2026.4.1": ({"a last hidden state"}, 28),
    "2026.5.5": ({"a last hidden state"}, 28),
    "newest": (None, None),  # whatever it does
}
_ALWAYS = {"log-probabilities", "a tuple", "a dict"}

pytestmark = [pytest.mark.network, pytest.mark.slow]


@cache
def wheel(release: str) -> Path:
    """The release's wheel, from the cache or fetched; the newest there is for ``newest``."""
    pattern = f"unsloth_zoo-{'*' if release == 'newest' else release}-*.whl"
    failure = ""
    if release == "newest" or not list(WHEELS.glob(pattern)):
        name = "unsloth_zoo" if release == "newest" else f"unsloth_zoo=={release}"
        command = [sys.executable, "-m", "pip", "download", "--disable-pip-version-check", "--no-deps", "--quiet"]
        done = subprocess.run([*command, "--dest", str(WHEELS), name], capture_output=True, text=True)
        failure = done.stderr.strip() if done.returncode else ""
    found = sorted(WHEELS.glob(pattern), key=lambda path: parse_wheel_filename(path.name)[1])
    if not found or (failure and release == "newest"):
        say = pytest.fail if os.environ.get("NETWORK") == "required" else pytest.skip
        say(f"unsloth_zoo {release} could not be fetched by pip: {failure.splitlines()[-1]}")
    return found[-1]


# covers U3, U4
@pytest.mark.parametrize("release", list(RELEASES))
def test_every_adapter_gets_its_gradient_with_the_hooks_of(release, tmp_path, capsys):
    file = wheel(release)
    paths = os.pathsep.join([str(_TESTS), str(_TESTS.parent)])
    command = [sys.executable, str(_TESTS / "release.py"), str(file)]
    environment = {**os.environ, "PYTHONPATH": paths}
    done = subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-3000:]
    seen = json.loads(done.stdout.splitlines()[-1])
    failing, untouched = RELEASES[release]
    fails = {what for what, result in seen["probed"].items() if result == "fails"}
    with capsys.disabled():
        print(f"\n{file.name.split('-')[1]:>10}  fails on {len(fails)} of 6 outputs", end="")
        print(f"; toy towers {seen['probed'][_TOWERS]:>6}; tiny model {seen['without']['logits']}", end="")
        print(f" -> patched {' '.join(f'{kind} {result}' for kind, result in seen['patched'].items())}")
    assert seen["patched"] == dict.fromkeys(seen["patched"], "48/48")
    assert seen["applied"] == (seen["reason"] != "every adapter gets its gradient without it") and seen["restored"]
    assert set(seen["towers"].values()) == {"fine"}, "every output and every tower, once it is patched"
    if failing is not None:
        assert seen["applied"] and fails == failing | _ALWAYS
        assert seen["without"]["logits"] == f"{untouched}/48"
