"""The documents' tables: made from results/, refused where a row cannot be what it says. Numbers are made up."""

from __future__ import annotations

import json
import re
from pathlib import Path
from types import ModuleType

import pytest
from conftest import command, load_script
from test_report import edit, make_run, make_seeds

SPEED = "<!-- speed/{0} -->\n<!-- /speed/{0} -->\n"
README = "# x\n\n<!-- results -->\nold\n<!-- /results -->\n\nmore | text\n"
TORCH = {"python": "3.11.7", "torch": "2.13.0"}
OPTIONS = (
    "--title", "ResNet-20, fast, 3 epochs", "--images", "CIFAR-10, 45k/5k, validation", "--metric", "val_accuracy",
    "--hardware", "2-core AMD EPYC (AVX2)",
)  # fmt: skip


@pytest.fixture(scope="module")
def results() -> ModuleType:
    """The script as a module."""
    return load_script("results")


@pytest.fixture
def root(results: ModuleType, tmp_path: Path) -> Path:
    """A repository with two rows that are compared with each other, and a folder that is no row."""
    root = tmp_path / "repository"
    (root / "results" / "training_parity").mkdir(parents=True)
    (root / "README.md").write_text(README)
    ours = make_seeds(tmp_path / "ours", [0.7, 0.72, 0.77], planned=3)
    theirs = make_seeds(tmp_path / "theirs", [0.71, 0.73], versions=TORCH)
    (ours / "seed-0" / "last.safetensors").write_bytes(b"weights")
    add = (*OPTIONS, "--metric", "test_accuracy", "--images", "CIFAR-10, first 1,000 test images")
    assert results.main(["add", str(ours), "fast", "--framework", "jresnet", "--peer", "fast-torch", *add], root) == 0
    add = (*OPTIONS, "--framework", "PyTorch", "--command", "python train_torch.py | cat", "--peer", "fast")
    assert results.main(["add", str(theirs), "fast-torch", *add], root) == 0
    return root


def table(root: Path) -> list[list[str]]:
    """The README's rows by cell, without head and dashes."""
    lines = [
        line for line in (root / "README.md").read_text().split("<!-- /results -->")[0].splitlines() if "|" in line
    ]
    rows = [[cell.strip() for cell in re.split(r"(?<!\\)\|", line)[1:-1]] for line in lines if line.startswith("|")]
    assert len({len(row) for row in rows}) == 1
    return rows[2:]


def test_the_table(results: ModuleType, root: Path) -> None:
    assert results.main([], root) == 0
    text = (root / "README.md").read_text()
    assert text.startswith("# x\n\n<!-- results -->\n| run | framework |")
    assert text.endswith("</details>\n<!-- /results -->\n\nmore | text\n")
    title, hardware = "ResNet-20, fast, 3 epochs", "2-core AMD EPYC (AVX2), float32"
    # The standard deviation of 0.70, 0.72, 0.77 is sqrt(0.0013), that of 0.71, 0.73 sqrt(0.0002); the losses have the same.
    jax, torch = "Python 3.11.7, jax 0.10.1, flax 0.12.8", "Python 3.11.7, torch 2.13.0"
    assert table(root) == [
        [title, "jresnet", "CIFAR-10, 45k/5k, validation", "72.00 ± 3.61 %", "3", "1.3967 ± 0.0361", hardware, jax,
         "[fast](results/fast)"],
        [title, "jresnet", "CIFAR-10, first 1,000 test images", "73.00 ± 3.61 %", "3", "1.3967 ± 0.0361", hardware, jax,
         "[fast](results/fast)"],
        [title, "PyTorch", "CIFAR-10, 45k/5k, validation", "71.00 ± 1.41 %", "2", "1.3867 ± 0.0141", hardware, torch,
         "[fast-torch](results/fast-torch)"],
    ]  # fmt: skip
    # sqrt(13 / 3 + 2 / 2) = 2.31 points; each pair once, and only where both have the metric
    differences = [line for line in text.splitlines() if "difference of the means" in line]
    assert differences == [
        f"* {title}, jresnet (n = 3) minus {title}, PyTorch (n = 2), CIFAR-10, 45k/5k, validation: difference of the means "
        "+1.00 ± standard error 2.31 points"
    ]
    assert "* ResNet-20, fast, 3 epochs, jresnet: `train.py --runs 3`" in text
    assert "* ResNet-20, fast, 3 epochs, PyTorch: `python train_torch.py | cat`" in text


def test_check(results: ModuleType, root: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert results.main(["--check"], root) == 1
    out, err = capsys.readouterr()
    assert "-old\n" in out
    assert "+| ResNet-20, fast, 3 epochs | jresnet |" in out
    assert "run python scripts/results.py" in err
    assert (root / "README.md").read_text() == README
    assert results.main([], root) == 0
    written = (root / "README.md").read_text()
    assert results.main(["--check"], root) == results.main([], root) == 0
    assert (root / "README.md").read_text() == written
    edit(root / "README.md", "72.00", "73.00")
    assert results.main(["--check"], root) == 1


def test_one_seed_and_no_row(results: ModuleType, tmp_path: Path) -> None:
    (tmp_path / "README.md").write_text(README)
    assert results.main([], tmp_path) == 0
    assert (tmp_path / "README.md").read_text() == README.replace("old\n", "")
    one = make_run(tmp_path / "one", [0.3, 0.5, 0.7], seed=4)
    for name, peer in (("a", ()), ("b", ("--peer", "a"))):
        add = [option.replace("fast", "step | warm-up") for option in (*OPTIONS, *peer)]
        assert results.main(["add", str(one), name, "--framework", "jresnet", *add], tmp_path) == 0
    assert (tmp_path / "results/a/seed-4/summary.json").exists()
    assert results.main([], tmp_path) == 0
    assert table(tmp_path)[0][0] == r"ResNet-20, step \| warm-up, 3 epochs"
    assert table(tmp_path)[0][3:6] == ["69.00 %", "1", "1.3667"]
    assert "+0.00 points; no standard error, as one side has one seed" in (tmp_path / "README.md").read_text()


def test_add_copies_only_small_files(root: Path) -> None:
    row = root / "results" / "fast"
    names = {str(path.relative_to(row)) for path in row.rglob("*") if path.is_file()}
    seeds = {f"seed-{n}/{name}" for n in range(3) for name in ("config.json", "metrics.jsonl", "summary.json")}
    assert names == {"row.json", "summary.json", *seeds}
    assert json.loads((row / "row.json").read_text()) == {
        "title": "ResNet-20, fast, 3 epochs", "framework": "jresnet",
        "metrics": [{"metric": "val_accuracy", "images": "CIFAR-10, 45k/5k, validation"},
                    {"metric": "test_accuracy", "images": "CIFAR-10, first 1,000 test images"}],
        "n": 3, "command": "train.py --runs 3", "hardware": "2-core AMD EPYC (AVX2)", "peer": "fast-torch",
    }  # fmt: skip
    assert row.stat().st_mode & 0o777 == (root / "results").stat().st_mode & 0o777


def test_add_refuses(results: ModuleType, root: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    def add(run: Path, name: str, *more: str) -> str:
        before = {path: path.stat().st_mtime_ns for path in (root / "results").rglob("*")}
        assert results.main(["add", str(run), name, "--framework", "jresnet", *OPTIONS, *more], root) == 1
        assert {path: path.stat().st_mtime_ns for path in (root / "results").rglob("*")} == before
        return capsys.readouterr().err

    good = tmp_path / "ours"
    assert "--force replaces it" in add(good, "fast")
    assert "NAME must be letters" in add(good, "../x")
    assert "is not a folder" in add(tmp_path / "missing", "x")
    half = make_seeds(tmp_path / "half", [0.7, 0.8], planned=3)
    assert "is not finished (2 of 3 seeds finished)" in add(half, "x")
    assert "is not finished (epoch 1 of 3)" in add(make_run(tmp_path / "epoch", [0.3], finished=False), "x")
    torch = make_seeds(tmp_path / "torch", [0.7], versions=TORCH)
    assert "the seeds' versions of jax, flax are missing" in add(torch, "x")
    apart = make_seeds(tmp_path / "apart", [0.7, 0.8])
    edit(apart / "seed-1" / "summary.json", '"command": "train.py', '"command": "other.py')
    assert "give one with --command" in add(apart, "x")
    with pytest.raises(SystemExit):
        results.main(["add", str(good), "x", "--framework", "jresnet", *OPTIONS, "--metric", "val_accuracy"], root)


def test_force_replaces(results: ModuleType, root: Path, tmp_path: Path) -> None:
    other = make_seeds(tmp_path / "other", [0.9, 0.9])
    assert results.main(["add", str(other), "fast", "--framework", "jresnet", *OPTIONS, "--force"], root) == 0
    assert not (root / "results/fast/seed-2").exists()
    assert results.main([], root) == 0
    assert table(root)[0][3] == "89.00 ± 0.00 %"
    assert {path.name for path in (root / "results").iterdir()} == {"fast", "fast-torch", "training_parity"}


@pytest.mark.parametrize(
    ("file", "old", "new", "message"),
    [
        ("seed-1/summary.json", '"digest": "ed25"', '"digest": "ffff"', "digests of the seeds' data are missing or differ"),
        ("seed-1/summary.json", '"jax": "0.10.1"', '"jax": "0.12"', "the seeds' versions of jax, flax are missing"),
        ("seed-1/metrics.jsonl", '"epoch": 3', '"epoch": 4', "metrics.jsonl is damaged: line 3"),
        ("seed-1/metrics.jsonl", '"test_accuracy": 0.72', '"test_accuracies": 0.72', "a seed has no test_accuracy"),
        ("seed-1/config.json", '"lr": 0.1', '"lr": 0.2', "seed-1 differs from seed-0 in lr"),
        ("row.json", '"title"', '"titel"', "row.json is incomplete or invalid"),
        ("row.json", '"jresnet"', '"JAX"', "row.json is incomplete or invalid: KeyError('JAX')"),
        ("row.json", '"jresnet"', '"PyTorch"', "the seeds' versions of torch are missing"),
        ("row.json", '"peer": "fast-torch"', '"peer": "missing"', "its peer 'missing' must be another row"),
        ("row.json", '"peer": "fast-torch"', '"peer": "fast"', "its peer 'fast' must be another row"),
        ("row.json", "45k/5k", "45k/6k", "its peer 'fast-torch' must be another row, of the same data"),
    ],
)  # fmt: skip
def test_rows_that_are_refused(
    results: ModuleType, root: Path, capsys: pytest.CaptureFixture[str], file: str, old: str, new: str, message: str
) -> None:
    edit(root / "results" / "fast" / file, old, new)
    assert results.main([], root) == 1
    out, err = capsys.readouterr()
    assert message in err
    assert all(line.startswith("error: results/fast") for line in err.splitlines())
    assert out == ""
    assert (root / "README.md").read_text() == README


def test_a_row_that_is_not_finished_and_a_peer_of_other_data(
    results: ModuleType, root: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    for seed in (0, 1):
        edit(root / f"results/fast-torch/seed-{seed}/summary.json", '"digest": "ed25"', '"digest": "ffff"')
    assert results.main([], root) == 1
    assert "its peer 'fast-torch' must be another row, of the same data" in capsys.readouterr().err
    (root / "results/fast/seed-2/summary.json").unlink()
    assert results.main([], root) == 1
    assert "results/fast: the run is not finished: 2 of 3 seeds finished" in capsys.readouterr().err


def test_speeds(results: ModuleType, root: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Of every file that the benchmark wrote; of none where one is cut off."""
    folder = root / "results" / "speed"
    folder.mkdir()
    ours = {"rounds": [{"seconds": 2.0}], "seconds": {"median": 2.0, "min": 1.0, "max": 3.0}}
    for name in ("cpu", "gpu"):
        report = {
            "command": f"python scripts/benchmark.py --device {name}", "date": "2026-11-23", "versions": {"jax": "1"},
            "hardware": {"cpu": "X", "cores": 2, "device": name}, "ceilings": {},
            "rows": [{"what": "import", "results": {"jresnet": ours}}],
        }  # fmt: skip
        (folder / f"{name}.json").write_text(json.dumps(report))
    (root / "README.md").write_text(README + SPEED.format("cpu") + SPEED.format("old"))
    assert results.main([], root) == 1
    complaints = capsys.readouterr().err
    assert re.search("the table speed/gpu needs .*: found 0", complaints)
    assert "README.md has the line <!-- speed/old -->, but results/speed/old.json does not exist" in complaints
    (root / "docs" / "log").mkdir(parents=True)
    (root / "docs" / "log" / "speed.md").write_text("y\n" + SPEED.format("gpu") + "z\n")
    (root / "README.md").write_text(README + SPEED.format("cpu"))
    assert results.main(["--check"], root) == 1
    assert "error: outdated: README.md, speed.md: run" in capsys.readouterr().err
    assert results.main([], root) == 0
    first = (root / "README.md").read_text().split("<!-- speed/cpu -->\n")[1]
    assert "import | 2 (1-3) s | - | - | -" in first
    assert first.endswith(
        "`python scripts/benchmark.py --device cpu`, 2026-11-23: X, 2 cores; cpu; jax 1.\n<!-- /speed/cpu -->\n"
    )
    second = (root / "docs" / "log" / "speed.md").read_text()
    assert second.startswith("y\n<!-- speed/gpu -->\n|")
    assert second.endswith("--device gpu`, 2026-11-23: X, 2 cores; gpu; jax 1.\n<!-- /speed/gpu -->\nz\n")
    assert results.main(["--check"], root) == 0
    (folder / "cpu.json").write_text('{"rows": [{}]}')
    (folder / "gpu.json").write_text("{")
    capsys.readouterr()
    assert results.main([], root) == 1
    complaints = capsys.readouterr().err.splitlines()
    assert [line.split(" is ")[0] for line in complaints] == [f"error: results/speed/{n}.json" for n in ("cpu", "gpu")]


@pytest.mark.parametrize("text", ["no marks", "<!-- /results -->\n<!-- results -->\n", README + README])
def test_a_readme_without_its_marks(
    results: ModuleType, root: Path, capsys: pytest.CaptureFixture[str], text: str
) -> None:
    (root / "README.md").write_text(text)
    assert results.main([], root) == 1
    assert re.search("the table results needs .*: found [02]", capsys.readouterr().err)
    assert (root / "README.md").read_text() == text


def test_a_page_under_docs_has_the_table_too(results: ModuleType, root: Path) -> None:
    """Without links to results/, which the site does not have, and with nothing folded."""
    text = (root / "README.md").read_text()
    (root / "docs").mkdir()
    (root / "docs" / "page.md").write_text("<!-- results -->\n<!-- /results -->\n")
    assert results.main([], root) == 0
    page = (root / "docs" / "page.md").read_text()
    assert "| `results/fast` |" in page
    assert "The commands:" in page
    assert "<details>" not in page
    assert "[fast](results/fast)" in (root / "README.md").read_text() != text


def test_the_repositorys_own_table() -> None:
    """The README says what results/ says."""
    done = command("scripts/results.py", "--check")
    assert done.returncode == 0, done.stdout + done.stderr
