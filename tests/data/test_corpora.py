import hashlib

import pytest
from etils import epath

from jaxalope.data import corpora
from jaxalope.data.config import SourceConfig
from jaxalope.data.readers import open_source
from jaxalope.errors import InputError


def fake_library(root):
    files = {
        "os.py": "import sys\n",
        "json/decoder.py": "x = 1\n",
        "json/tests/test_decoder.py": "no\n",
        "test/test_os.py": "no\n",
        "idlelib/idle_test/test_x.py": "no\n",
        "site-packages/numpy/core.py": "no\n",
        "_sysconfigdata__linux_.py": "no\n",
        "encodings/cp1252.py": "no\n",
        "readme.txt": "no\n",
        "empty.py": "",
    }
    for name, text in files.items():
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        (root / name).write_text(text)
    (root / "latin.py").write_bytes("# -*- coding: latin-1 -*-\n# é\n".encode("latin-1"))
    return epath.Path(root)


def test_library_files_are_sorted_and_without_tests(tmp_path):
    names = [name for name, _ in corpora.stdlib_files(fake_library(tmp_path))]
    assert names == ["empty.py", "json/decoder.py", "latin.py", "os.py"]


def test_a_library_file_in_another_encoding_is_passed_over(tmp_path):
    fake_library(tmp_path)
    source = open_source(SourceConfig(path=str(tmp_path), format="stdlib"))
    documents = {d.name: d.text for d in (source[i] for i in range(len(source)))}
    assert documents == {"json/decoder.py": "x = 1\n", "latin.py": "", "os.py": "import sys\n"}


def test_a_python_without_source_is_an_error(tmp_path):
    with pytest.raises(InputError, match="embedded corpus is empty"):
        corpora.stdlib_files(epath.Path(tmp_path))


def test_the_running_library_is_real_text_divided_by_file():
    train, held_out = (open_source(SourceConfig(), s, 0.05) for s in ("train", "eval"))
    names = [{s[i].name.split("@")[0] for i in range(len(s))} for s in (train, held_out)]
    assert not names[0] & names[1]
    assert "inspect.py" in names[0] | names[1] and "dataclasses.py" in names[0] | names[1]
    assert not [n for n in names[0] | names[1] if "/test" in n or n.startswith("test")]
    text = "".join(train[i].text for i in range(len(train)))
    assert 3e6 < len(text) < 3e7
    assert 0.01 < len(names[1]) / len(names[0] | names[1]) < 0.12


def test_a_side_of_the_split_depends_on_the_name_alone():
    names = [f"{i}.py" for i in range(200)]
    held_out = corpora.held_out_names(names, 0.1)
    assert 5 < len(held_out) < 40
    # Written out once, so that another machine or version of this code has to agree.
    expected = {
        n
        for n in names
        if int.from_bytes(hashlib.sha256(n.encode()).digest()[:8], "big") < 0.1 * 2**64
    }
    assert held_out == expected
    half = names[:100]
    assert corpora.held_out_names(half, 0.1) == held_out & set(half)


def test_small_corpora_keep_something_on_either_side():
    assert len(corpora.held_out_names(["a", "b"], 0.001)) == 1
    assert len(corpora.held_out_names(["a", "b"], 0.5)) == 1
    assert corpora.held_out_names(["a"], 0.5) == set()
    assert corpora.held_out_names(["a", "b"], 0.0) == set()
    assert corpora.held_out_period(3, 0.01) == 3
    assert corpora.held_out_period(1000, 0.01) == 100
    assert corpora.held_out_period(1, 0.5) == 0
