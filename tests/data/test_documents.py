"""JSON documents that hold a table, and folders that hold none: read, or told with the next step."""

import io
import json
import tarfile

import pyarrow as pa
import pytest

from thinkimg.config.load import load_config
from thinkimg.data.refusal import Refused
from thinkimg.data.source import open_source
from thinkimg.errors import UserError
from thinkimg.images.decode import ImageLimits

ROWS = [{"image": f"{i}.png", "question": f"What is {i}?", "answer": f"thing {i}"} for i in range(3)]
QUESTIONS = [row["question"] for row in ROWS]


def read(path):
    data = load_config("development", [f"data.path={path}"]).data
    return list(open_source(data, ImageLimits()).rows())


@pytest.mark.parametrize("indent", [None, 1])
@pytest.mark.parametrize(
    "document",
    [
        {"info": {"split": "train"}, "questions": ROWS},
        {"dataset_name": "x", "version": 1.0, "data": ROWS, "licences": ["MIT"]},
        {str(number): row for number, row in enumerate(ROWS)},
    ],
)
def test_the_only_list_of_records_in_a_document_is_the_table(tmp_path, document, indent):
    path = tmp_path / "train.json"
    path.write_text(json.dumps(document, indent=indent))
    assert [row.question for row in read(path)] == QUESTIONS


def test_records_are_no_documents(tmp_path):
    path = tmp_path / "train.json"
    record = ROWS[0] | {"objects": [{"question": "other", "image": "x.png", "answer": "y"}]}
    path.write_text(json.dumps(record))
    assert [row.question for row in read(path)] == QUESTIONS[:1]
    talk = [{"role": "user", "content": "<image>What?"}, {"role": "assistant", "content": "red"}]
    path.write_text(json.dumps({"messages": talk, "images": ["0.png"]}))
    assert [row.question for row in read(path)] == ["What?"]
    path.write_text("".join(json.dumps(row) + "\n" for row in ROWS))
    assert [row.question for row in read(path)] == QUESTIONS


def test_a_bad_record_of_a_document_is_refused_alone(tmp_path):
    path = tmp_path / "train.json"
    path.write_text(json.dumps({"data": [ROWS[0], "no record", ROWS[2]]}))
    assert [isinstance(row, Refused) for row in read(path)] == [False, True, False]


def test_several_lists_of_records_are_asked_about(tmp_path):
    path = tmp_path / "instances.json"
    path.write_text(json.dumps({"images": [{"id": 1}], "annotations": [{"id": 1}], "categories": [{"id": 1}]}))
    with pytest.raises(UserError, match="several lists of objects: images, annotations, categories"):
        read(path)


@pytest.mark.parametrize("rows", [[ROWS[:1], ROWS[1:]], [1, 2], ["a"]])
def test_an_array_of_other_values_is_no_table(tmp_path, rows):
    path = tmp_path / "train.json"
    path.write_text(json.dumps(rows))
    with pytest.raises(UserError, match="is no JSON array of objects"):
        read(path)


@pytest.mark.parametrize("content", ['{"a": 1,\n"b": 2}', '{"a": [],\n"b": []}', '{"a":\n[1, 2]}'])
def test_other_documents_are_told(tmp_path, content):
    path = tmp_path / "train.json"
    path.write_text(content)
    with pytest.raises(UserError, match="no JSONL file"):
        read(path)


@pytest.mark.parametrize(
    ("name", "step"),
    [("data-00000.arrow", "load_from_disk"), ("train-000.tar", "Unpack"), ("images.zip", "Unpack"), ("a.xlsx", "CSV")],
)
def test_a_folder_of_other_files_is_told_with_the_next_step(tmp_path, name, step):
    (tmp_path / "part").mkdir()
    (tmp_path / "part" / name).write_bytes(b"x")
    (tmp_path / "state.json").write_text("{}")
    with pytest.raises(UserError, match="holds no table") as error:
        read(tmp_path)
    assert step in error.value.hint


def test_an_archive_and_an_arrow_stream_are_named(tmp_path):
    with tarfile.open(tmp_path / "a.tar", "w") as archive:
        archive.addfile(tarfile.TarInfo("0.json"), io.BytesIO(b""))
    with pytest.raises(UserError, match="a tar archive; unpack it"):
        read(tmp_path / "a.tar")
    table = pa.table({"x": [1]})
    with pa.OSFile(str(tmp_path / "a.arrow"), "wb") as file, pa.ipc.new_stream(file, table.schema) as writer:
        writer.write_table(table)
    with pytest.raises(UserError, match="an Arrow stream; convert it to Parquet"):
        read(tmp_path / "a.arrow")
