"""The rule of conftest.py: no golden test is skipped or lost in a run of all tests."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

CONFTEST = Path(__file__).with_name("conftest.py").read_text()
ENOUGH = "import pytest\n@pytest.mark.parametrize('n', range(100))\ndef test_equal(n): pass\n"


@pytest.mark.parametrize(
    ("golden", "code", "expected"),
    [
        (ENOUGH, 0, "101 passed"),
        (ENOUGH + "def test_more(): pytest.skip('no files')\n", 1, "test_more was skipped"),
        (ENOUGH + "@pytest.mark.skip\ndef test_more(): pass\n", 1, "test_more was skipped"),
        ("import pytest\npytest.importorskip('no_such_module')\n" + ENOUGH, 4, "test_numbers.py was skipped"),
        ("def test_one(): pass\n", 4, "1 golden tests found"),
        (None, 4, "0 golden tests found"),
    ],
)
def test_golden_tests_run(tmp_path, golden, code, expected):
    (tmp_path / "tests" / "golden").mkdir(parents=True)
    (tmp_path / "tests" / "conftest.py").write_text(CONFTEST)
    (tmp_path / "tests" / "test_other.py").write_text("def test_other(): pass\n")
    (tmp_path / "pytest.ini").write_text("[pytest]\ntestpaths = tests\naddopts = -m 'not slow'\nmarkers = slow\n")
    if golden is not None:
        (tmp_path / "tests" / "golden" / "test_numbers.py").write_text(golden)
    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider"]
    environment = os.environ | {"PYTEST_DISABLE_PLUGIN_AUTOLOAD": "1"}  # starts sooner
    result = subprocess.run(command, env=environment, cwd=tmp_path, capture_output=True, text=True, timeout=120)
    output = result.stdout + result.stderr
    assert result.returncode == code, output
    assert expected in output, output
