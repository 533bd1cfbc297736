"""`thinkimg data inspect` and `show`, and what `prepare` ends with, as a person at a terminal has them."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
from paths import REPOSITORY
from single_stage import build_stage
from small_sets import picture, write_lines, write_signs

from thinkimg.cli.data import dataset_lines, summarise_dataset
from thinkimg.config.load import load_config
from thinkimg.stages.prepare import prepare
from thinkimg.store.artifacts import Store

HOSTILE = "\x1b[2Jgone \u202e</p><script>alert(1)</script> \r"


def thinkimg(folder: Path, *words: str, code: int = 0) -> tuple[str, str]:
    """(stdout, stderr) of a command that runs in a folder."""
    environment = os.environ | {"PREFECT_HOME": str(folder / "prefect"), "PYTHONPATH": str(REPOSITORY)}
    environment.pop("PREFECT_API_URL", None)
    command = [sys.executable, "-m", "thinkimg", *words]
    done = subprocess.run(command, cwd=folder, env=environment, capture_output=True, text=True, timeout=300)
    assert done.returncode == code, done.stderr[-3000:]
    return done.stdout, done.stderr


def files_of(folder: Path) -> dict[str, bytes]:
    return {path.relative_to(folder).as_posix(): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def test_a_look_writes_nothing_but_its_page(tmp_path):
    root = write_signs(tmp_path / "signs", 4, question=lambda i: f"{HOSTILE}{i}?", note=lambda i: HOSTILE)
    before = files_of(tmp_path)
    out, err = thinkimg(tmp_path, "data", "inspect", "signs")
    assert err == "" and files_of(tmp_path) == before
    assert "\\x1b[2Jgone \\u202e" in out and "files beside the table 4" in out and "right: sign 0" in out
    assert all(character == "\n" or character.isprintable() for character in out)
    command = out[out.index("thinkimg prepare") :].partition("\n\n")[0]
    assert "--set data.path=signs" in command and "--set data.schema=" in command
    again, _ = thinkimg(tmp_path, "data", "inspect", "signs", "--html", "page.html")
    assert again.startswith(out) and files_of(tmp_path).keys() == before.keys() | {"page.html"}
    page = (tmp_path / "page.html").read_text(encoding="utf-8")
    assert page.count("<img") == 4 and "<script" not in page
    thinkimg(root, "data", "inspect", ".", "--html", "signs.jsonl", code=2)
    assert files_of(root) == {name.partition("/")[2]: data for name, data in before.items()}


@pytest.mark.parametrize(
    "words", [["missing"], ["."], ["a.png"], ["a.jsonl"], ["a.jsonl", "--set", "data.source=puzzles"]]
)
def test_what_can_t_be_read_is_one_sentence_with_a_hint(tmp_path, words):
    if words != ["."]:
        (tmp_path / "a.png").write_bytes(picture(0))
        write_lines(tmp_path / "a.jsonl", [{"frage": "?"}])
    _, err = thinkimg(tmp_path, "data", "inspect", *words, code=2)
    assert err.startswith("thinkimg: ") and err.count("\n") == 1


def test_a_prepared_data_set_is_shown_with_its_refusals(tmp_path):
    root = write_signs(tmp_path / "signs", 12)
    with (root / "signs.jsonl").open("a") as file:
        file.write(json.dumps({"image": "missing.png", "question": "Q?", "answer": "a"}) + "\n")
    overrides = [f"data.path={root}", "data.max_refused=0.5", f"where.store={tmp_path / 'artifacts'}"]
    artifact, _ = build_stage(prepare, load_config("tiny", overrides), Store(tmp_path / "artifacts"))
    out, _ = thinkimg(tmp_path, "data", "show", artifact.short, "--html", "page.html")
    assert "12 samples of 12 usable rows" in out and "1 of 13 rows" in out and "missing.png" in out
    assert out.count("as the model reads it") == 3
    assert (tmp_path / "page.html").read_text().count("<img") == 12
    short, long = (summarise_dataset(artifact, count=count, pictures=False) for count in (3, 6))
    shown = [[example.where for example in summary.examples] for summary in (short, long)]
    assert shown[0] == shown[1][:3] and len(set(shown[1])) == 6
    assert sum(short.splits.values()) == sum(short.types.values()) == 12 and short.refused.total() == 1
    lines = list(dataset_lines(artifact))
    assert out.startswith("\n".join(lines[:-1])) and f"--store {tmp_path / 'artifacts'}" in lines[-1]
    thinkimg(tmp_path, "data", "show", "0000", code=2)


def test_prepare_ends_with_a_summary_beside_its_reference(tmp_path):
    """On stderr: the reference is the only line of the result, as in REF=$(thinkimg prepare …)."""
    write_signs(tmp_path / "signs", 12)
    out, err = thinkimg(tmp_path, "prepare", "--preset", "tiny", "--set", "data.path=signs")
    (reference,) = out.splitlines()
    artifact = Store(tmp_path / "artifacts").resolve(reference)
    assert err.endswith("\n".join(dataset_lines(artifact)).replace(f" --store {tmp_path / 'artifacts'}", "") + "\n")
    assert "12 samples" in err and err.count("as the model reads it") == 3
