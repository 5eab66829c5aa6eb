import dataclasses
import errno
import gc
import gzip
import json
import os
import signal
import subprocess
import sys
import textwrap

import numpy as np
import pytest
from array_record.python import array_record_module
from etils import epath

from jaxalope.data import documents, records, scratch
from jaxalope.data.cache import ByteCache
from jaxalope.data.config import SourceConfig
from jaxalope.data.readers import open_source
from jaxalope.errors import InputError

TEXTS = [f"document {i} — naïve 🦌\n" * (i % 3 + 1) for i in range(23)]


def read(source):
    return [source[i].text for i in range(len(source))]


def write_jsonl(path, texts, opener=open):
    with opener(path, "wb") as f:
        f.write("\n".join(json.dumps({"id": i, "text": t}) for i, t in enumerate(texts)).encode())


def write_zst(path, texts):
    zstandard = pytest.importorskip("zstandard")
    lines = [json.dumps({"text": t}).encode() + b"\n" for t in texts]
    # Two frames: what concatenated shards look like.
    frames = [b"".join(lines[:5]), b"".join(lines[5:])]
    path.write_bytes(b"".join(zstandard.compress(frame) for frame in frames))


def write_parquet(path, texts):
    pa = pytest.importorskip("pyarrow")
    import pyarrow.parquet

    table = pa.table({"text": texts, "id": list(range(len(texts)))})
    pyarrow.parquet.write_table(table, path, row_group_size=4)


def write_records(path, records):
    writer = array_record_module.ArrayRecordWriter(str(path), "group_size:1")
    for record in records:
        writer.write(record)
    writer.close()


def example(**features):
    """A `tf.train.Example`, spelled out."""

    def field(number, data):
        size, out = len(data), b""
        while size >= 0x80:
            out += bytes([size & 0x7F | 0x80])
            size >>= 7
        return bytes([number << 3 | 2]) + out + bytes([size]) + data

    entries = b"".join(
        field(1, field(1, name.encode()) + field(2, field(1, field(1, value))))
        for name, value in features.items()
    )
    return field(1, entries)


def test_example_bytes_are_those_of_tensorflow():
    # tf.train.Example with text=b"hi", from the protocol buffer encoding rules by hand.
    assert example(text=b"hi").hex() == "0a100a0e0a047465787412060a040a026869"


WRITERS = {
    "a.jsonl": write_jsonl,
    "a.jsonl.gz": lambda path, texts: write_jsonl(path, texts, gzip.open),
    "a.jsonl.zst": write_zst,
    "a.parquet": write_parquet,
    "a.arrayrecord": lambda path, texts: write_records(
        path, [json.dumps({"text": t}).encode() for t in texts]
    ),
    "a.array_record-00000-of-00001": lambda path, texts: write_records(
        path,
        [example(text=t.encode()) for t in texts],
    ),
}


@pytest.mark.parametrize("name", WRITERS)
def test_records_are_read_by_number_and_split_by_position(name, tmp_path):
    WRITERS[name](tmp_path / name, TEXTS)
    config = SourceConfig(path=str(tmp_path / name))
    whole = open_source(config)
    assert read(whole) == TEXTS
    assert whole[7].text == TEXTS[7]
    assert len({whole[i].name for i in range(len(whole))}) == len(TEXTS)
    held_out, train = open_source(config, "eval", 0.2), open_source(config, "train", 0.2)
    assert read(held_out) == TEXTS[4::5]
    assert read(train) == [t for i, t in enumerate(TEXTS) if i % 5 != 4]
    assert len({whole.fingerprint, held_out.fingerprint, train.fingerprint}) == 3
    if whole.block_sizes is not None:
        assert whole.block_sizes == [4, 4, 4, 4, 4, 3]
        assert train.block_sizes == [4, 3, 3, 3, 3, 3]
        assert held_out.block_sizes == [0, 1, 1, 1, 1, 0]


def test_several_files_are_one_corpus_in_the_order_of_their_names(tmp_path):
    write_jsonl(tmp_path / "b.jsonl", TEXTS[10:])
    write_jsonl(tmp_path / "a.jsonl.gz", TEXTS[:10], gzip.open)
    (tmp_path / "c.jsonl").write_text("")
    source = open_source(SourceConfig(path=str(tmp_path)))
    assert read(source) == TEXTS
    assert source[10].name == "b.jsonl:1"
    assert read(open_source(SourceConfig(path=str(tmp_path / "b*")))) == TEXTS[10:]


def test_uncompressed_copies_go_with_the_source(tmp_path, monkeypatch):
    monkeypatch.setattr(scratch.tempfile, "tempdir", str(tmp_path / "scratch"))
    (tmp_path / "scratch").mkdir()
    write_jsonl(tmp_path / "a.jsonl.gz", TEXTS, gzip.open)
    source = open_source(SourceConfig(path=str(tmp_path / "a.jsonl.gz")))
    assert len(os.listdir(tmp_path / "scratch")) == 1
    # Another one of the same process, or of another one, leaves it alone.
    other = open_source(SourceConfig(path=str(tmp_path / "a.jsonl.gz")))
    assert read(source) == read(other) == TEXTS
    del source, other
    assert os.listdir(tmp_path / "scratch") == []


def test_uncompressed_copies_of_a_killed_process_go_at_the_next_start(tmp_path, monkeypatch):
    (tmp_path / "scratch").mkdir()
    write_jsonl(tmp_path / "a.jsonl.gz", TEXTS, gzip.open)
    program = """
        import os, signal, sys
        from jaxalope.data.config import SourceConfig
        from jaxalope.data.readers import open_source
        source = open_source(SourceConfig(path=sys.argv[1]))
        os.write(1, b"open\\n")
        sys.stdin.read()
        os.kill(os.getpid(), signal.SIGKILL)
    """
    with subprocess.Popen(
        [sys.executable, "-c", textwrap.dedent(program), str(tmp_path / "a.jsonl.gz")],
        env=os.environ | {"TMPDIR": str(tmp_path / "scratch")},
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
    ) as process:
        process.stdout.readline()
        monkeypatch.setattr(scratch.tempfile, "tempdir", str(tmp_path / "scratch"))
        (theirs,) = os.listdir(tmp_path / "scratch")
        source = open_source(SourceConfig(path=str(tmp_path / "a.jsonl.gz")))
        assert len(os.listdir(tmp_path / "scratch")) == 2  # It lives.
        process.stdin.close()
    assert process.returncode == -signal.SIGKILL
    del source
    assert os.listdir(tmp_path / "scratch") == [theirs]
    source = open_source(SourceConfig(path=str(tmp_path / "a.jsonl.gz")))
    assert len(os.listdir(tmp_path / "scratch")) == 1
    assert theirs not in os.listdir(tmp_path / "scratch")
    assert read(source) == TEXTS


def test_plain_records_and_other_fields(tmp_path):
    write_records(tmp_path / "a.arrayrecord", [t.encode() for t in TEXTS])
    config = SourceConfig(path=str(tmp_path / "a.arrayrecord"), field="")
    assert read(open_source(config)) == TEXTS
    (tmp_path / "b.jsonl").write_text(
        '{"content": "x"}\n\n{"content": null}\n{"content": "\\ud800"}'
    )
    config = SourceConfig(path=str(tmp_path / "b.jsonl"), field="content")
    assert read(open_source(config)) == ["x", "", "", "\ufffd"]


def test_text_directories_globs_and_single_files(tmp_path):
    for name in ("b.txt", "a/c.txt", "a/d.md", ".hidden/e.txt"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_text(name)
    (tmp_path / "empty.txt").write_text("")

    def names(path):
        return read(open_source(SourceConfig(path=str(path))))

    assert names(tmp_path) == ["a/c.txt", "a/d.md", "b.txt"]
    assert names(tmp_path / "*.txt") == ["b.txt"]
    assert names(tmp_path / "a" / "*") == ["a/c.txt", "a/d.md"]
    assert names(tmp_path / "**" / "*.txt") == ["a/c.txt", "b.txt"]
    assert names(tmp_path / "a/d.md") == ["a/d.md"]


@pytest.mark.parametrize("line", [10, 63, 64, 65, 200, 5000])
def test_long_text_is_cut_without_loss(tmp_path, line):
    text = "".join(f"{i:0{line - 3}d}é\n" for i in range(4000 // line + 1))
    (tmp_path / "long.txt").write_text(text)
    config = SourceConfig(path=str(tmp_path / "long.txt"), max_document_bytes=64)
    source = open_source(config)
    assert len(source) == -(-len(text.encode()) // 64)
    assert "".join(read(source)) == text
    assert max(len(d.encode()) for d in read(source)) <= 2 * 64
    if line <= 64:
        assert all(d.endswith("\n") for d in read(source) if d)
    sides = [open_source(config, split, 0.2) for split in ("train", "eval")]
    assert sorted(read(sides[0]) + read(sides[1])) == sorted(read(source))
    assert len(sides[1]) > 0


@pytest.mark.parametrize(
    ("reader", "name"),
    [
        (records.JsonLines, "a.jsonl"),
        (records.JsonLines, "a.jsonl.gz"),
        (records.Parquet, "a.parquet"),
        (records.ArrayRecord, "a.arrayrecord"),
    ],
)
def test_other_file_systems_are_read_through_epath(reader, name, tmp_path):
    class Elsewhere(type(epath.Path(tmp_path))):
        """A path that the operating system cannot open: only its methods reach the file."""

        def __fspath__(self):
            return "elsewhere://" + super().__fspath__()

        def copy(self, dst, overwrite=False):
            return epath.Path(super().__fspath__()).copy(dst, overwrite)

    WRITERS[name](tmp_path / name, TEXTS)
    path = Elsewhere(tmp_path / name)
    with pytest.raises(FileNotFoundError), open(path):
        pass
    file = documents.File(name, path, 1)
    assert read(reader(SourceConfig(path="x"), [file])) == TEXTS


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("a.txt", b"fine\nnot \xe9 fine", r"a\.txt is not UTF-8: byte 9 is 0xe9"),
        ("a.txt", b"", "is empty"),
        ("a.jsonl", b'{"text": "ok"}\n{"text": "\xe9"}', r"a\.jsonl is not UTF-8: byte 25 is 0xe9"),
        ("a.jsonl", b'{"text": "ok"}\n{"text": ', r"a\.jsonl:2 is not JSON"),
        (
            "a.jsonl",
            b'{"text": "", "n": ' + b"1" * 5000 + b"}",
            r"a\.jsonl:1 is not JSON.*digits",
        ),
        ("a.jsonl", b"[" * 200_000, r"a\.jsonl:1 is not JSON.*recursion"),
        ("a.jsonl", b'{"txt": "ok", "id": 1}', r"a\.jsonl:1 has no field 'text'.*\['id', 'txt'\]"),
        ("a.jsonl", b"[1]", r"a\.jsonl:1 is a list"),
        ("a.jsonl", b'{"text": 3}', r"a\.jsonl:1: field 'text' holds int"),
        (
            "a.jsonl.gz",
            gzip.compress(b'{"text": "ok"}' * 9, mtime=0)[:-9],
            r"a\.jsonl\.gz cannot be decom",
        ),
        ("a.jsonl.gz", gzip.compress(b"", mtime=0), "holds no record"),
        ("a.jsonl.zst", b"nonsense", r"a\.jsonl\.zst cannot be decompressed"),
        ("a.parquet", b"nonsense", r"a\.parquet is not a Parquet file"),
        ("a.arrayrecord", b"nonsense", "cannot be read as ArrayRecord"),
    ],
)
def test_bad_files_are_named_with_the_place(name, content, message, tmp_path):
    (tmp_path / name).write_bytes(content)
    with pytest.raises(InputError, match=message):
        read(open_source(SourceConfig(path=str(tmp_path / name))))


def test_a_truncated_zst_file_is_not_a_shorter_corpus(tmp_path):
    path = tmp_path / "a.jsonl.zst"
    write_zst(path, TEXTS)
    path.write_bytes(path.read_bytes()[:-7])
    with pytest.raises(InputError, match="the last frame is not complete"):
        open_source(SourceConfig(path=str(path)))


def test_utf8_errors_name_the_byte_of_the_file_not_of_the_piece(tmp_path):
    (tmp_path / "a.txt").write_bytes(b"line\n" * 100 + b"\xff")
    with pytest.raises(InputError, match="byte 500 is 0xff"):
        read(open_source(SourceConfig(path=str(tmp_path / "a.txt"), max_document_bytes=64)))


def test_missing_columns_records_and_paths(tmp_path):
    write_parquet(tmp_path / "a.parquet", TEXTS)
    with pytest.raises(InputError, match=r"no column 'body'; its columns are \['text', 'id'\]"):
        open_source(SourceConfig(path=str(tmp_path / "a.parquet"), field="body"))
    write_records(tmp_path / "a.arrayrecord", [b"plain"])
    with pytest.raises(InputError, match="neither JSON nor"):
        open_source(SourceConfig(path=str(tmp_path / "a.arrayrecord")))[0]
    write_records(tmp_path / "b.arrayrecord", [b"\n\xff"])
    with pytest.raises(InputError, match=r"#0 is not a tf\.train\.Example"):
        open_source(SourceConfig(path=str(tmp_path / "b.arrayrecord")))[0]
    with pytest.raises(InputError, match="no such file"):
        open_source(SourceConfig(path=str(tmp_path / "none")))
    with pytest.raises(InputError, match="no file matches"):
        open_source(SourceConfig(path=str(tmp_path / "none*.txt")))
    with pytest.raises(InputError, match="mixes formats"):
        open_source(SourceConfig(path=str(tmp_path)))


def test_one_document_cannot_be_divided(tmp_path):
    (tmp_path / "a.txt").write_text("only")
    config = SourceConfig(path=str(tmp_path / "a.txt"))
    assert read(open_source(config, "train", 0.1)) == ["only"]
    with pytest.raises(InputError, match=r"no document on its eval side.*eval_sources"):
        open_source(config, "eval", 0.1)


@pytest.mark.parametrize("library", ["zstandard", "pyarrow"])
def test_a_missing_library_names_the_extra(library, tmp_path, monkeypatch):
    name = {"zstandard": "a.jsonl.zst", "pyarrow": "a.parquet"}[library]
    WRITERS[name](tmp_path / name, TEXTS)
    monkeypatch.setitem(__import__("sys").modules, library, None)
    with pytest.raises(InputError, match=rf"{library}.*pip install 'jaxalope\[data\]'"):
        open_source(SourceConfig(path=str(tmp_path / name)))


def test_row_groups_are_read_once_though_many_readers_have_drifted_apart(tmp_path, monkeypatch):
    pa, pq = pytest.importorskip("pyarrow"), pytest.importorskip("pyarrow.parquet")
    rows, groups = 50, 64
    table = pa.table({"text": [f"{i:05}" for i in range(rows * groups)]})
    pq.write_table(table, tmp_path / "a.parquet", row_group_size=rows)
    source = open_source(SourceConfig(path=str(tmp_path / "a.parquet")))
    reads = []
    real = source._parquet.ParquetFile.read_row_group

    def read_row_group(self, group, **kwargs):
        reads.append(group)
        return real(self, group, **kwargs)

    monkeypatch.setattr(source._parquet.ParquetFile, "read_row_group", read_row_group)
    rng = np.random.default_rng(0)
    # 64 readers deal the documents out, each at a pace of its own: up to a third apart at the end.
    streams = [list(range(v, len(source), 64)) for v in range(64)]
    pace = rng.uniform(0.6, 1.0, 64)
    for tick in range(1, 90):
        for stream, waiting in enumerate(streams):
            while waiting and (len(source) // 64 - len(waiting)) < pace[stream] * tick:
                index = waiting.pop(0)
                assert source[index].text == f"{index:05}"
    assert not any(streams) and len(reads) == groups


def test_a_cache_holds_no_more_than_its_bytes_and_lets_go_with_the_source(tmp_path):
    made = []

    def make(size):
        made.append(size)
        return np.zeros(size, np.uint8)

    cache = ByteCache(100)
    for key in (1, 2, 1, 3, 1, 2):  # 3 pushes out 2, which was used least recently.
        cache.get(("a", key), lambda: make(40))
    assert len(made) == 4
    assert len(cache.get(("b", 0), lambda: make(1000))) == 1000  # Alone, and too large.
    cache.get(("b", 0), lambda: make(1000))
    assert made.count(1000) == 1
    cache.drop("b")
    assert cache._held == 0
    pytest.importorskip("pyarrow")
    write_parquet(tmp_path / "a.parquet", TEXTS)
    source = open_source(SourceConfig(path=str(tmp_path / "a.parquet")))
    owner = id(source)
    read(source)
    assert any(key[0] == owner for key in records._GROUPS._kept)
    del source
    gc.collect()
    assert not any(key[0] == owner for key in records._GROUPS._kept)


def test_a_row_that_is_not_utf8_is_named_and_may_be_skipped(tmp_path):
    pa, pq = pytest.importorskip("pyarrow"), pytest.importorskip("pyarrow.parquet")
    texts = pa.array([b"fine", b"caf\xe9", b"fine too"]).view(pa.string())
    pq.write_table(pa.table({"text": texts}), tmp_path / "a.parquet")
    config = SourceConfig(path=str(tmp_path / "a.parquet"))
    with pytest.raises(InputError, match=r"a\.parquet#0:1 is not UTF-8 .*skip_bad"):
        read(open_source(config))
    with pytest.warns(UserWarning, match=r"passed over, 1 of skip_bad=1: a\.parquet#0:1"):
        assert read(open_source(dataclasses.replace(config, skip_bad=1))) == [
            "fine",
            "",
            "fine too",
        ]


def damage(path, start, stop):
    content = bytearray(path.read_bytes())
    for at in range(start, stop):
        content[at] ^= 0xFF
    path.write_bytes(content)


@pytest.mark.parametrize("compression", ["zstd", "snappy"])
def test_a_damaged_row_group_is_named_and_may_be_skipped(compression, tmp_path):
    pa, pq = pytest.importorskip("pyarrow"), pytest.importorskip("pyarrow.parquet")
    path, texts = tmp_path / "a.parquet", [f"{n} " * 99 for n in range(8)]
    table = pa.table({"text": texts})
    pq.write_table(table, path, row_group_size=4, compression=compression, use_dictionary=False)
    column = pq.ParquetFile(path).metadata.row_group(1).column(0)
    end = column.data_page_offset + column.total_compressed_size
    damage(path, end - 20, end)
    config = SourceConfig(path=str(path))
    source = open_source(config)
    assert source[3].text == texts[3]
    with pytest.raises(InputError, match=r"a\.parquet#1:2 cannot be read .*skip_bad"):
        source[6]
    with pytest.warns(UserWarning, match=r"passed over, 4 of skip_bad=4: a\.parquet#1:3"):
        assert read(open_source(dataclasses.replace(config, skip_bad=4))) == [*texts[:4], *[""] * 4]


def test_a_disk_that_fails_is_not_a_bad_document(tmp_path, monkeypatch):
    pytest.importorskip("pyarrow")
    write_parquet(tmp_path / "a.parquet", TEXTS)
    source = open_source(SourceConfig(path=str(tmp_path / "a.parquet"), skip_bad=9))

    def read_row_group(self, *args, **kwargs):
        raise OSError(errno.EIO, "Input/output error")

    monkeypatch.setattr("pyarrow.parquet.ParquetFile.read_row_group", read_row_group)
    with pytest.raises(OSError, match="Input/output"):
        source[0]


def test_a_damaged_record_is_named_and_may_be_skipped(tmp_path):
    rng = np.random.default_rng(0)
    texts = [rng.bytes(3000).hex() for _ in range(40)]
    for name in "ab":
        write_records(tmp_path / f"{name}.arrayrecord", [text.encode() for text in texts])
    damage(tmp_path / "b.arrayrecord", 100_000, 100_100)
    config = SourceConfig(path=str(tmp_path / "*.arrayrecord"), field="", skip_bad=80)
    with pytest.warns(UserWarning, match=r"b\.arrayrecord#\d+ cannot be read: .*Corrupt") as told:
        found = read(open_source(config))
    assert 0 < len(told) < 5
    assert sum(text == "" for text in found) == len(told) and "" not in found[:40]
    index = found.index("") - 40
    assert f"b.arrayrecord#{index} " in str(told[0].message)
    source = open_source(config)
    (tmp_path / "a.arrayrecord").unlink()
    with pytest.raises(RuntimeError, match="No such file"):
        source[0]
