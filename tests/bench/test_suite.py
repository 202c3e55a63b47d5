"""The test suite as the benchmark runs it: with what is installed, within its time."""

from ironmoe.bench import suite


def fake_tree(tmp_path, monkeypatch, **files):
    for name, text in files.items():
        file = tmp_path / "tests" / f"{name}.py"
        file.parent.mkdir(exist_ok=True)
        file.write_text(text)
    for folder in ("kernels", "moe", "attacks"):
        (tmp_path / "tests" / folder).mkdir()
    monkeypatch.setattr(suite, "ROOT", tmp_path)
    monkeypatch.setattr(suite, "TESTS", tmp_path / "tests")


def test_the_suite_runs_what_runs_here(tmp_path, monkeypatch):
    fake_tree(
        tmp_path, monkeypatch,
        test_good="def test_a(): pass\ndef test_b(): assert 0\n", test_absent="import a_package_nobody_has\n",
    )  # fmt: skip
    result = suite.run_suite(60)
    assert result["outcome"] == "failed" and result["counts"] == {"failed": 1, "passed": 1}
    assert result["left_out"] == {"tests/test_absent.py": ["a_package_nobody_has"]}
    assert len(result["failures"]) == 1 and "test_b" in result["failures"][0]


def test_a_suite_that_takes_too_long_is_ended(tmp_path, monkeypatch):
    fake_tree(tmp_path, monkeypatch, test_slow="import time\ndef test_a(): time.sleep(60)\n")
    assert suite.run_suite(1.5)["outcome"] == "out of time"


def test_a_suite_that_cannot_start_says_why(tmp_path, monkeypatch):
    fake_tree(tmp_path, monkeypatch, conftest="import a_package_nobody_has\n", test_good="def test_a(): pass\n")
    result = suite.run_suite(60)
    assert result["outcome"] == "not run" and result["why"] == "tests/conftest.py needs a_package_nobody_has"
