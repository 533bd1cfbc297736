"""Public data sets by name or id: the right files of one commit, from a server that speaks the Hub's interface."""

import dataclasses
import importlib
import io
import json
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hub_server import CARD, HubServer, ask_locally
from PIL import Image

from thinkimg import hub
from thinkimg.cli.public_sets import list_sets, pin_set
from thinkimg.config.load import load_config
from thinkimg.data.hub.card import missing_shards
from thinkimg.data.hub.hub_tables import settle
from thinkimg.data.hub.pins import find_pin, read_pins, write_pin
from thinkimg.data.hub.public_sets import FIGURES, is_id, near_names, public_sets, read_remote
from thinkimg.data.refusal import Refused
from thinkimg.data.source import open_source
from thinkimg.errors import UserError
from thinkimg.images.decode import ImageLimits

ID = "someone/a-set"


def png(colour: int) -> bytes:
    out = io.BytesIO()
    Image.new("RGB", (64, 48), (colour, 0, 0)).save(out, "png")
    return out.getvalue()


def parquet(rows: list[dict], **options) -> bytes:
    out = io.BytesIO()
    pq.write_table(pa.Table.from_pylist(rows), out, **options)
    return out.getvalue()


def rows(*answers: str, image=lambda i: {"bytes": png(i), "path": f"{i}.png"}) -> list[dict]:
    return [{"image": image(i), "question": f"{answer}?", "answer": answer} for i, answer in enumerate(answers)]


def table(*answers: str) -> bytes:
    return parquet(rows(*answers))


GEOMETRY = [
    {
        "images": [{"bytes": png(i), "path": None}],
        "problem": "<image>Find x.",
        "answer": str(i),
        "choices": ["1", "2", "3", "4"],
        "ground_truth": "A",
    }
    for i in range(3)
]


@pytest.fixture
def server(tmp_path, monkeypatch):
    started = HubServer()
    ask_locally(monkeypatch, started, tmp_path / "cache")
    monkeypatch.chdir(tmp_path)
    hub._resolve.cache_clear()
    yield started
    started.close()
    hub._resolve.cache_clear()


def read(*settings: str) -> tuple[str, str, list[str], int]:
    """Return name, digest, the first right answers, and the number of refused rows, as another process would."""
    hub._resolve.cache_clear()
    source = open_source(load_config(overrides=settings).data, ImageLimits())
    read_rows = list(source.rows())
    accepted = [row for row in read_rows if not isinstance(row, Refused)]
    assert all(image()[:4] == b"\x89PNG" for row in accepted for image in row.images)
    return source.name, source.digest, [row.answers[0] for row in accepted], len(read_rows) - len(accepted)


# The list


def test_each_figure_of_the_list_has_a_source_and_none_is_a_commit():
    assert len(public_sets()) > 25
    for entry in public_sets().values():
        assert re.fullmatch(r"[a-z0-9][a-z0-9-]*", entry.name)
        assert is_id(entry.repository) and entry.role in ("training", "benchmark") and entry.title
        for name in FIGURES:
            if (figure := getattr(entry, name)) is not None:
                assert re.match(r"https://(huggingface\.co/datasets|github\.com)/\S+/\S+|index:\d+$", figure.source)
                assert not re.fullmatch(r"[0-9a-f]{40}", str(figure.value))
        for number in filter(None, (entry.rows, entry.bytes, entry.tables)):
            assert isinstance(number.value, int) and number.value > 0
        if entry.schema != "auto":
            assert importlib.import_module(f"thinkimg.data.schemas.{entry.schema}").convert


def test_the_list_is_shown_before_anything_is_asked_of_the_hub(server, capsys):
    list_sets(as_json=False)
    shown = capsys.readouterr().out
    assert server.asked == []
    lines = {line.split()[0]: line for line in shown.splitlines() if line.split()}
    for name, entry in public_sets().items():
        assert entry.repository in lines[name] or lines[name].startswith(f"{name}:")
        assert entry.rows is None or f"{entry.rows.value:,}" in shown
    assert re.search(r"deepeyes +training +47,052 \?", shown), "of a source that nobody can look up"
    assert re.search(r"hiyouga/geometry3k", shown) and re.search(r"2,101  ", shown)
    list_sets(as_json=True)
    listed = {one["name"]: one for one in json.loads(capsys.readouterr().out)}
    assert listed.keys() == public_sets().keys()
    assert listed["geometry3k"]["rows"]["source"].startswith("https://huggingface.co/datasets/hiyouga/geometry3k")
    assert listed["deepeyes"]["bad_rows"] is None and "contradict" in listed["deepeyes"]["note"]
    assert "bad rows" in shown
    assert listed["visual-cot"]["rows"] is None and listed["deepeyes"]["rows"]["verified"] is False


def test_a_file_or_folder_comes_before_a_name(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    assert read_remote("vstar").id == "craigwu/vstar_bench" and read_remote("vstar@test").split == "test"
    assert load_config(overrides=["data.path=vstar"]).data.role == "benchmark"
    assert load_config(overrides=["data.path=chartqa@val"]).data.role == "benchmark"
    assert load_config(overrides=["data.path=vstar", "data.role=training"]).data.role == "training"
    assert load_config(overrides=["data.path=chartqa@train"]).data.role == "training"
    (tmp_path / "vstar").mkdir()
    assert read_remote("vstar") is None and load_config(overrides=["data.path=vstar"]).data.role == "training"
    (tmp_path / "vstar" / "q.jsonl").write_text(json.dumps({"image": "1.png", "question": "?", "answer": "a"}) + "\n")
    (tmp_path / "vstar" / "1.png").write_bytes(png(1))
    assert read("data.path=vstar")[2] == ["a"]
    assert "the file or folder here, not the public data set craigwu/vstar_bench" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("setting", "said"),
    [
        ("data.revision=../../x", "is no revision"), ("data.revision=a b", "is no revision"),
        ("data.hub_config=../x", "is no configuration"), ("data.path=a/b@x/y", "is no name of a split"),
    ],
)  # fmt: skip
def test_a_hostile_revision_configuration_or_split_asks_nobody(server, setting, said):
    with pytest.raises(UserError, match=said) as error:
        read("data.path=someone/a-set", setting)
    assert "\n" not in str(error.value) and error.value.hint and server.asked == []


def test_a_mistaken_name_is_told_the_nearest(server):
    assert near_names("deepeye")[0] == "deepeyes" and near_names("nothing-like-it") == []
    with pytest.raises(UserError, match="There is no hrbench-4") as error:
        read("data.path=hrbench-4")
    assert "hrbench-4k" in error.value.hint and "thinkimg data ls" in error.value.hint and server.asked == []


# Cards and names of files


# Downloads


def test_by_name_only_the_tables_that_are_read_are_fetched(server):
    files = {
        "README.md": b"---\nlicense: mit\n---\n",
        "data/train-00000-of-00001.parquet": parquet(GEOMETRY),
        "data/test-00000-of-00001.parquet": parquet(GEOMETRY[:1]),
        "images.zip": b"not needed",
    }
    first = server.commit("datasets", "hiyouga/geometry3k", files)
    assert read("data.path=geometry3k") == ("hiyouga/geometry3k", first, ["0", "1", "2"], 0)
    assert server.downloaded() == ["README.md", "data/train-00000-of-00001.parquet"]
    assert read("data.path=geometry3k@test")[2] == ["0"]
    second = server.commit("datasets", "hiyouga/geometry3k", files | {"x": b"y"})
    assert read("data.path=geometry3k")[1] == second
    assert read("data.path=geometry3k", f"data.revision={first}")[1] == first
    assert read("data.source=hub", "data.path=hiyouga/geometry3k", "data.hub_split=test")[2] == ["0"]


def test_the_recipe_of_a_prepared_set_has_its_commit(server):
    from thinkimg.stages.prepare import settings_of

    commit = server.commit("datasets", ID, {"train.parquet": table("yes", "no")})
    settings = settings_of(load_config("tiny", [f"data.path={ID}"]))
    assert settings.source == (ID, commit)


def test_a_split_and_a_configuration_of_the_card_are_read_alone(server):
    files = {"README.md": CARD.encode(), "more/a.jsonl": b"", "data/train-00000-of-00002.parquet": table("a")}
    files |= {"data/train-00001-of-00002.parquet": table("b"), "data/validation-x.parquet": table("c")}
    files["more/a.jsonl"] = (json.dumps(rows("d", image=lambda i: "p/1.png")[0]) + "\n").encode()
    files |= {"more/p/1.png": png(1), "more/p/2.png": png(2), "more/p/video.zip": b"", "videos.zip": b"much"}
    server.commit("datasets", ID, files)
    assert read(f"data.path={ID}")[2] == ["a", "b"]
    assert read(f"data.path={ID}@validation")[2] == ["c"], "what is here of another split is not read"
    assert not any("more" in name or name.endswith(".zip") for name in server.downloaded())
    assert read(f"data.path={ID}", "data.hub_config=more")[2] == ["d"]
    assert read(f"data.path={ID}", "data.files=data/train-00001*")[2] == ["b"]
    assert not any(name.endswith(".zip") for name in server.downloaded())
    with pytest.raises(UserError, match="has no split 'test'"):
        read(f"data.path={ID}@test")


@pytest.mark.parametrize("form", ["folder", "zip", "pairs", "above"])
def test_pictures_come_along_where_tables_name_them(server, form):
    import zipfile

    names = [f"VisualProbe_train/data/{i}.png" if form == "above" else f"pics/{i}.png" for i in range(3)]
    files = {f"{'data' if form == 'above' else 'pics'}/{i}.png": png(i) for i in range(3)}
    lines = [rows(f"{i}", image=lambda _, i=i: names[i])[0] for i in range(3)]
    tables = {"q.jsonl": "".join(json.dumps(line) + "\n" for line in lines).encode()}
    if form == "zip":
        archive = io.BytesIO()
        with zipfile.ZipFile(archive, "w") as opened:
            for name, data in files.items():
                opened.writestr(name, data)
        files = {"images.zip": archive.getvalue(), "videos.zip": b"much"}
    elif form == "pairs":
        tables = {f"pics/{i}.json": json.dumps({k: v for k, v in line.items() if k != "image"}).encode()
                  for i, line in enumerate(lines)}  # fmt: skip
    elif form == "above":
        record = {"problem": "<image>\nQ?", "solution": " a ", "doc_id": 1, "data_source": "x"}
        tables = {"train.json": json.dumps([record | {"images": [name]} for name in names]).encode()}
    id = "Mini-o3/VisualProbe_train" if form == "above" else ID
    server.commit("datasets", id, files | tables | {".gitattributes": b""})
    _, _, answers, refused = read("data.path=visualprobe" if form == "above" else f"data.path={ID}")
    assert (answers, refused) == ((["a"] * 3 if form == "above" else ["0", "1", "2"]), 0)
    assert "videos.zip" not in server.downloaded()


def test_tables_of_another_split_that_are_here_under_like_names_are_not_read(server):
    card = "configs:\n- config_name: default\n  data_files:\n"
    card += (
        "  - {split: train, path: [data/p-1.parquet, data/p-2.parquet]}\n  - {split: rest, path: data/p-3.parquet}\n"
    )
    files = {f"data/p-{i}.parquet": table(f"{i}") for i in (1, 2, 3)} | {"README.md": f"---\n{card}---\n".encode()}
    server.commit("datasets", ID, files)
    assert read(f"data.path={ID}@rest")[2] == ["3"]
    assert read(f"data.path={ID}")[2] == ["1", "2"]


def test_two_tables_that_belong_together_are_read_by_name(server):
    """GQA's questions and pictures are two configurations, joined by an id."""
    questions = [{"id": f"q{i}", "imageId": f"n{i % 2}", "question": "Is it red?", "answer": "yes",
                  "fullAnswer": "Yes, it is."} for i in range(3)]  # fmt: skip
    pictures = [{"id": f"n{i}", "image": {"bytes": png(i), "path": None}} for i in range(2)]
    stems = ("testdev_balanced_instructions", "testdev_balanced_images")
    card = "".join(f"- config_name: {stem}\n  data_files: {stem}/*\n" for stem in stems)
    tables = zip(stems, (questions, pictures), strict=True)
    files = {f"{stem}/testdev-00000-of-00001.parquet": parquet(part) for stem, part in tables}
    files |= {"README.md": f"---\nconfigs:\n{card}---\n".encode(), "train_images/train-0.parquet": b"much"}
    commit = server.commit("datasets", "lmms-lab/GQA", files)
    assert read("data.path=gqa") == ("lmms-lab/GQA", commit, ["yes"] * 3, 0)
    assert "train_images/train-0.parquet" not in server.downloaded()
    with pytest.raises(UserError, match="several configurations: testdev_balanced_images") as error:
        read("data.path=lmms-lab/GQA")
    assert "data.hub_config" in error.value.hint and "names: gqa" in error.value.hint


def test_a_look_fetches_a_part_of_the_tables_and_the_pictures_that_it_shows(server):
    lines = [[rows(f"{i}", image=lambda _, i=i: f"pics/{i}.png")[0]] for i in range(4)]
    files = {f"data/train-0000{i}-of-00004.parquet": parquet(line) for i, line in enumerate(lines)}
    files |= {f"pics/{i}.png": png(i) for i in range(4)} | {".gitattributes": b""}
    commit = server.commit("datasets", ID, files)
    data = load_config(overrides=[f"data.path={ID}"]).data
    look = settle(data, choose=lambda names: names[1:2])
    assert server.downloaded() == [".gitattributes", "data/train-00001-of-00004.parquet", "pics/1.png"]
    assert (look.name, look.commit, look.data.files) == (ID, commit, "data/train-00001-of-00004.parquet")
    assert read(f"data.path={ID}")[2] == ["0", "1", "2", "3"]


def test_pictures_of_the_users_own_count_for_the_digest(server, tmp_path):
    record = rows("a", image=lambda i: "pics/1.png")
    commit = server.commit("datasets", ID, {"train.parquet": parquet(record), "pics/1.png": b"", ".gitattributes": b""})
    (tmp_path / "own").mkdir()
    digests = set()
    for colour in (1, 2, 1):
        (tmp_path / "own" / "1.png").write_bytes(png(colour))
        name, digest, answers, refused = read(f"data.path={ID}", "data.images=own")
        assert (name, answers, refused) == (f"{ID}@{commit}", ["a"], 0)
        digests.add(digest)
    assert len(digests) == 2 and "pics/1.png" not in server.downloaded()


def test_offline_the_cache_is_the_hub_and_a_part_of_it_is_no_data_set(server, monkeypatch, tmp_path):
    files = {f"data/train-0000{i}-of-00002.parquet": table(f"{i}") for i in range(2)}
    files |= {"data/test-00000-of-00001.parquet": table("t"), ".gitattributes": b""}
    commit = server.commit("datasets", ID, files)
    assert read(f"data.path={ID}") == (ID, commit, ["0", "1"], 0)
    server.close()
    assert read(f"data.path={ID}") == (ID, commit, ["0", "1"], 0)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    assert read(f"data.path={ID}") == (ID, commit, ["0", "1"], 0)
    with pytest.raises(
        UserError, match=f"{ID} can't be loaded: the Hub can't be reached, and the cache lacks"
    ) as error:
        read(f"data.path={ID}@test")
    assert "\n" not in str(error.value) and "where the Hub can be reached" in error.value.hint
    shutil.copytree(tmp_path / "cache", tmp_path / "other", symlinks=True)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path / "other"))
    shutil.rmtree(next(tmp_path.glob("other/datasets--*/trees")))  # as another program leaves it
    assert read(f"data.path={ID}") == (ID, commit, ["0", "1"], 0)
    next(tmp_path.glob("other/datasets--*/snapshots/*/data/train-00001*")).unlink()
    with pytest.raises(UserError, match=r"only a part of .*: data/train \(1 of 2\)"):
        read(f"data.path={ID}")
    assert missing_shards(["a/x-00000-of-00003.parquet", "b"]) == ["a/x (1 of 3)"]


def test_what_the_hub_refuses_is_one_sentence_with_a_way_out(server, monkeypatch):
    server.commit("datasets", ID, {"train.parquet": table("a")})
    cases = {
        "data.path=someone/nothing": ("There is no data set someone/nothing on the Hub", "thinkimg data ls"),
        f"data.path={ID} data.revision=v9": (f"{ID} has no revision 'v9'", "data.revision"),
        f"data.path={ID} data.files=x-*": (f"No table of {ID} fits data.files=x-", "train.parquet"),
    }
    for settings, (said, hint) in cases.items():
        with pytest.raises(UserError, match=re.escape(said)) as error:
            read(*settings.split())
        assert hint in error.value.hint and "\n" not in str(error.value)
    server.gated.add(ID)
    with pytest.raises(UserError, match="open only to those who have accepted its terms") as error:
        read(f"data.path={ID}")
    assert f"{server.url}/datasets/{ID}" in error.value.hint and "hf auth login" in error.value.hint
    server.gated.clear()
    server.down = True
    with pytest.raises(UserError, match=f"{ID} can't be loaded: ") as error:
        read(f"data.path={ID}")
    assert "\n" not in str(error.value) and "where the Hub can be reached" in error.value.hint


def test_a_disk_that_is_too_small_is_said_before_the_download(server, monkeypatch):
    server.commit("datasets", ID, {"train.parquet": table("a"), ".gitattributes": b""})
    usage = shutil._ntuple_diskusage(10**9, 10**9 - 1, 1)
    monkeypatch.setattr(shutil, "disk_usage", lambda path: usage)
    with pytest.raises(UserError, match=rf"{ID} needs [0-9.]+ kB, and 1 B are free") as error:
        read(f"data.path={ID}")
    assert "HF_HOME" in error.value.hint and "train.parquet" not in server.downloaded()


def test_a_disk_that_fills_up_and_a_proxy_that_refuses_are_named(server, monkeypatch):
    import errno

    import httpx2
    import huggingface_hub

    server.commit("datasets", ID, {"train.parquet": table("a"), ".gitattributes": b""})
    failures = [
        (OSError(errno.ENOSPC, "No space left on device"), "the disk is full", "HF_HOME"),
        (httpx2.ProxyError("407 Proxy Authentication Required"), "the proxy refuses", "HTTPS_PROXY"),
    ]
    for failure, said, hint in failures:

        def fail(*_, failure=failure, **__):
            raise failure

        monkeypatch.setattr(huggingface_hub, "snapshot_download", fail)
        with pytest.raises(UserError, match=said) as error:
            read(f"data.path={ID}")
        assert hint in error.value.hint and "\n" not in str(error.value)


READ = """
import sys
from thinkimg.config.load import load_config
from thinkimg.data.source import open_source
from thinkimg.images.decode import ImageLimits
source = open_source(load_config(overrides=[f"data.path={sys.argv[1]}"]).data, ImageLimits())
print(source.digest, [row.answers[0] for row in source.rows()])
"""


def test_a_killed_download_keeps_what_is_whole_and_fetches_the_rest(server, tmp_path):
    """Another process, as the library's settings are read when it is imported."""
    names = [f"data/train-0000{i}-of-00003.parquet" for i in range(3)]
    commit = server.commit("datasets", ID, {".gitattributes": b""} | {name: table(name[15]) for name in names})
    server.stop_at[names[2]] = 100
    own = {"HF_ENDPOINT": server.url, "HF_HOME": str(tmp_path / "home"), "HF_HUB_DISABLE_XET": "1"}
    command = [sys.executable, "-c", READ, ID]
    child = subprocess.Popen(command, env=os.environ | own, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    assert server.stopped.wait(120)
    snapshots = tmp_path / "home" / "hub" / f"datasets--{ID.replace('/', '--')}" / "snapshots" / commit
    while not all((snapshots / name).is_file() for name in names[:2]):
        assert child.poll() is None
    child.kill()
    child.wait()
    assert not (snapshots / names[2]).exists()
    server.stop_at.clear()
    server.asked.clear()
    done = subprocess.run(command, env=os.environ | own, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-2000:]
    assert done.stdout.strip() == f"{commit} ['0', '1', '2']"
    assert server.downloaded() == names[2:]


def test_a_connection_that_breaks_goes_on_in_the_middle_of_a_file(server):
    noise = np.random.default_rng(0).bytes(24 * 10**6)
    big = parquet([row | {"noise": noise} for row in rows("yes")], compression="none")
    commit = server.commit("datasets", ID, {"train.parquet": big, ".gitattributes": b""})
    server.stop_at["train.parquet"], server.cut = 22 * 10**6, True  # the library writes pieces of 10 MiB
    assert read(f"data.path={ID}") == (ID, commit, ["yes"], 0)
    assert [value for _, value in server.ranges] == [f"bytes={10 * 2**20 * 2}-"]


# Pins


def test_a_pin_says_what_differs_and_is_recorded_if_nothing_does_or_it_is_accepted(server, capsys):
    files = {"README.md": b"---\nlicense: gpl-3.0\n---\n", "data/train-00000-of-00001.parquet": parquet(GEOMETRY)}
    first = server.commit("datasets", "hiyouga/geometry3k", files)
    with pytest.raises(SystemExit) as ended:
        pin_set("geometry3k", None, accept=False)
    shown = capsys.readouterr().out
    assert ended.value.code == 1 and not Path("thinkimg-pins.toml").exists()
    assert re.search(r"rows +2101 +3 +differs", shown) and re.search(r"licence +mit +gpl-3.0 +differs", shown)
    assert "Nothing is pinned, as this differs from the list: rows, licence" in shown
    pin_set("geometry3k", None, accept=True)
    assert read_pins() == {"geometry3k": read_pins()["geometry3k"]} and read_pins()["geometry3k"]["commit"] == first
    server.commit("datasets", "hiyouga/geometry3k", files | {"x": b""})
    assert read("data.path=geometry3k")[1] == first
    assert read("data.path=geometry3k@train")[1] == first
    assert read("data.path=geometry3k", "data.revision=main")[1] != first


def test_a_pin_of_what_the_list_says_needs_no_accept(server, capsys, monkeypatch):
    from thinkimg.data.hub import public_sets as module

    entry = public_sets()["geometry3k"]
    few = {"geometry3k": dataclasses.replace(entry, rows=module.Figure(3, "https://github.com/a/b"))}
    monkeypatch.setattr(module, "public_sets", lambda: few)
    files = {"README.md": b"---\nlicense: mit\n---\n", "data/train-00000-of-00001.parquet": parquet(GEOMETRY)}
    commit = server.commit("datasets", "hiyouga/geometry3k", files)
    pin_set("geometry3k", None, accept=False)
    assert read_pins()["geometry3k"]["commit"] == commit and "differs" not in capsys.readouterr().out
    bad = [{key: value for key, value in record.items() if key != "problem"} for record in GEOMETRY]
    server.commit("datasets", "hiyouga/geometry3k", files | {"data/train-00000-of-00001.parquet": parquet(bad)})
    hub._resolve.cache_clear()
    with pytest.raises(SystemExit):
        pin_set("geometry3k", None, accept=False)
    assert "without problem" in capsys.readouterr().out and read_pins()["geometry3k"]["commit"] == commit
    server.commit("datasets", "hiyouga/geometry3k", {"README.md": b"", "train.parquet": parquet(GEOMETRY)})
    hub._resolve.cache_clear()
    with pytest.raises(UserError, match=r"has no data/train-\*, which is read for geometry3k"):
        pin_set("geometry3k", None, accept=True)


def test_a_pin_counts_rows_of_parquet_without_a_download(server):
    noise = [np.random.default_rng(i).bytes(2**20) for i in range(6)]
    big = parquet([{"image": image, "question": "?", "answer": "a"} for image in noise], compression="none")
    server.commit("datasets", ID, {"train.parquet": big, ".gitattributes": b""})
    pin_set(ID, None, accept=False)
    assert read_pins()[ID]["rows"] == 6
    sent = [value.removeprefix("bytes=").split("-") for path, value in server.ranges if path.endswith("train.parquet")]
    assert sent and sum(int(last) - int(first) + 1 for first, last in sent) < len(big) / 4
    assert not list(Path("cache").rglob("train.parquet"))


def test_pins_are_kept_beside_each_other_and_a_bad_file_is_named(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    write_pin("gqa", {"id": "lmms-lab/GQA", "commit": "a" * 40})
    write_pin('odd"name/x', {"id": "x/y", "commit": "b" * 40, "rows": 3})
    assert find_pin("gqa", "lmms-lab/GQA") == "a" * 40 and read_pins()['odd"name/x']["rows"] == 3
    assert find_pin("gqa", "another/id") is None and find_pin("chartqa", "lmms-lab/GQA") is None
    for text in ("[gqa]\nid = 1\ncommit = 'x'\n", "[gqa]\nid='a/b'\ncommit='main'\n", "[gqa", "gqa = 3\n"):
        Path("thinkimg-pins.toml").write_text(text)
        with pytest.raises(UserError, match="thinkimg-pins.toml") as error:
            read_pins()
        assert "pin again" in error.value.hint and "\n" not in str(error.value)
