"""The first rows of row groups whose pictures are too many to decode: as pyarrow reads them, or not at all."""

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import given
from hypothesis import strategies as st

from thinkimg.data.tables import parquet_drawing
from thinkimg.data.tables.parquet_head import Unsupported, decode_runs, read_struct
from thinkimg.data.tables.snappy_head import SnappyHead

STRUCT = pa.struct([("bytes", pa.binary()), ("path", pa.string())])
KINDS = {
    "binary": (pa.binary(), lambda data, i: data),
    "text": (pa.string(), lambda data, i: data.hex()),
    "struct": (STRUCT, lambda data, i: {"bytes": data, "path": f"{i}.png"}),
    "no path": (STRUCT, lambda data, i: {"bytes": data, "path": None}),
    "list": (pa.list_(pa.binary()), lambda data, i: [data, data[:3], b"x"][: 1 + i % 3]),
    "structs": (
        pa.list_(STRUCT),
        lambda data, i: [{"bytes": data, "path": "p"}, {"bytes": b"y", "path": None}][: 1 + i % 2],
    ),
    "holes": (pa.binary(), lambda data, i: None if i % 3 == 1 else data),
    "empty lists": (pa.list_(pa.binary()), lambda data, i: [None, [], [data], [data, None]][i % 4]),
    "no structs": (STRUCT, lambda data, i: None if i % 3 == 1 else {"bytes": data, "path": "p"}),
}  # fmt: skip


@pytest.mark.parametrize("codec", ["snappy", "zstd", "gzip", "none", "brotli"])
@pytest.mark.parametrize("kind", KINDS)
def test_the_first_rows_are_those_that_pyarrow_reads(tmp_path, monkeypatch, kind, codec):
    """Dictionary and plain pages, several pages in a group, several groups."""
    monkeypatch.setattr(parquet_drawing, "HEAVY", 1000)  # bytes: paths and questions have less
    shape, value = KINDS[kind]
    data = [bytes([i % 7]) * (40 * i) + b"abcd" * i + bytes(range(i)) for i in range(60)]
    records = [{"number": i, "image": value(data[i], i), "question": f"Q{i}" * 5} for i in range(60)]
    schema = pa.schema([("number", pa.int64()), ("image", shape), ("question", pa.string())])
    read = 0
    for version, dictionary, page in (("1.0", True, 2**20), ("1.0", False, 64), ("2.0", True, 64)):
        path = tmp_path / f"{version}-{dictionary}.parquet"
        options = {"data_page_version": version, "use_dictionary": dictionary, "data_page_size": page}
        pq.write_table(
            pa.Table.from_pylist(records, schema), path, row_group_size=25, compression=codec, write_batch_size=4,
            **options,
        )  # fmt: skip
        with pq.ParquetFile(path) as file:
            for group, start in enumerate((0, 25, 50)):
                rows = parquet_drawing.draw_rows(path, file, group, 8)
                read += rows is not None
                assert rows is None or rows == records[start : start + 8]
    supported = codec != "brotli" and kind != "empty lists"
    assert read == (6 if supported else 0)  # pages of version 2 are left to pyarrow


def test_no_more_is_read_than_there_is_room_for(tmp_path, monkeypatch):
    monkeypatch.setattr(parquet_drawing, "HEAVY", 0)
    monkeypatch.setattr(parquet_drawing, "ROOM", 1000)
    pq.write_table(pa.table({"image": [bytes([i]) * 300 for i in range(50)], "n": list(range(50))}), tmp_path / "a")
    with pq.ParquetFile(tmp_path / "a") as file:
        assert [row["n"] for row in parquet_drawing.draw_rows(tmp_path / "a", file, 0, 40)] == [0, 1, 2, 3]


def test_light_columns_are_left_to_pyarrow(tmp_path):
    pq.write_table(pa.table({"image": [b"x"] * 5}), tmp_path / "a")
    with pq.ParquetFile(tmp_path / "a") as file:
        assert parquet_drawing.draw_rows(tmp_path / "a", file, 0, 4) is None


@given(st.data())
def test_damaged_files_are_left_to_pyarrow(tmp_path_factory, data):
    path = tmp_path_factory.getbasetemp() / "damaged.parquet"
    table = pa.table({"image": [bytes(range(40)) * (i + 1) for i in range(20)], "n": list(range(20))})
    pq.write_table(table, path)
    content = bytearray(path.read_bytes())
    end = pq.ParquetFile(path).metadata.row_group(0).column(0).total_compressed_size
    for _ in range(data.draw(st.integers(1, 6))):
        content[data.draw(st.integers(4, 4 + end))] = data.draw(st.integers(0, 255))
    path.write_bytes(content)
    with pytest.MonkeyPatch.context() as patch, pq.ParquetFile(path) as file:
        patch.setattr(parquet_drawing, "HEAVY", 0)
        rows = parquet_drawing.draw_rows(path, file, 0, 8)
    assert rows is None or len(rows) <= 8


@given(
    st.lists(st.binary(max_size=50) | st.sampled_from([b"ab" * 500, bytes(70_000)]), max_size=12), st.integers(1, 999)
)
def test_a_snappy_block_is_decoded_in_pieces_of_any_size(pieces, size):
    content = b"".join(pieces)
    block = pa.compress(content, codec="snappy", asbytes=True)
    stream = SnappyHead(b"##" + block + b"##", 2, 2 + len(block))
    parts = []
    while part := stream.read(size):
        parts.append(part)
    assert b"".join(parts) == content and all(len(part) == size for part in parts[:-1])


@given(st.lists(st.integers(0, 2**20 - 1), min_size=1, max_size=40), st.integers(20, 30))
def test_a_packed_run_of_any_width_is_read(values, width):
    groups = -(-len(values) // 8)
    packed = sum(value << place * width for place, value in enumerate(values)).to_bytes(groups * width, "little")
    found = list(decode_runs(bytes([groups << 1 | 1]) + packed + bytes([4, 7, 0, 0, 0])[: 1 + (width + 7) // 8], width))
    assert found == [*values, *[0] * (8 * groups - len(values)), 7, 7]


def test_runs_and_headers_of_the_specification():
    assert list(decode_runs(bytes([0b11, 0b10001000, 0b11000110, 0b11111010]), 3)) == list(range(8))
    assert list(decode_runs(bytes([8, 5, 4, 1]), 3)) == [5, 5, 5, 5, 1, 1]
    header = bytes([0x15, 0x04, 0x15, 0x90, 0x01, 0x1C, 0x15, 0x02, 0x00, 0x00])
    assert read_struct(header, 0) == ({1: 2, 2: 72, 3: {1: 1}}, len(header))
    with pytest.raises(Unsupported):
        read_struct(bytes([0x19, 0x00]), 0)
