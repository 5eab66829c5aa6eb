"""Which checkpoint is read: damage, and what is none."""

import errno
import os

import jax
import jax.numpy as jnp
import pytest

from jaxalope.errors import InputError, ReadError
from jaxalope.model import checkpoint, step_folders
from jaxalope.model.checkpoint import CheckpointStore

ABSTRACT = {"params": {"kernel": jax.ShapeDtypeStruct((8, 4), jnp.float32)}}


def save(store):
    for step in (1, 2):
        store.save(step, {"params": {"kernel": jnp.full((8, 4), float(step))}}, {})
    store.wait()


@pytest.mark.parametrize(
    "error",
    [
        OSError(errno.EIO, "Input/output error"),
        OSError(errno.ESTALE, "Stale file handle"),
        OSError(errno.EMFILE, "Too many open files"),
        ConnectionResetError("reset by peer"),
        ValueError("UNAVAILABLE: Error reading gs://bucket/x: HTTP 503"),
        ValueError("DEADLINE_EXCEEDED: reading x"),
        ValueError("UNKNOWN: Error opening x: Too many open files [OS error 24]"),
        ExceptionGroup("reads", [ValueError("x"), OSError(errno.ENFILE, "Too many open files")]),
    ],
    ids=lambda error: str(error)[:20],
)
def test_a_storage_that_fails_for_the_moment_is_not_damage(tmp_path, monkeypatch, error):
    real = checkpoint.ocp.load_checkpointables

    def flaky(at, *args, **kwargs):
        if at.name == "2":
            try:
                raise error
            except Exception as e:
                raise ValueError("could not read the tree") from e
        return real(at, *args, **kwargs)

    with CheckpointStore(tmp_path) as store:
        save(store)
        with monkeypatch.context() as patch:
            patch.setattr(checkpoint.ocp, "load_checkpointables", flaky)
            with pytest.raises(ReadError, match=r"step 2 .* could not be read.*Try again.*step="):
                store.restore(ABSTRACT)
            assert {p.name for p in tmp_path.iterdir()} == {"1", "2"}
            assert store.restore(ABSTRACT, step=1).step == 1
        assert store.restore(ABSTRACT).step == 2


@pytest.mark.parametrize(
    "error, remedy",
    [
        (MemoryError("cannot allocate 17 GiB"), "Free memory"),
        (RuntimeError("RESOURCE_EXHAUSTED: Out of memory allocating 17 bytes."), "Free memory"),
        (PermissionError(errno.EACCES, "Permission denied"), "Let this user read it"),
        (ValueError("PERMISSION_DENIED: Error opening x"), "Let this user read it"),
        (ValueError("UNAVAILABLE: HTTP 503"), "Try again"),
    ],
    ids=lambda value: str(value)[:20],
)
def test_what_hinders_orbax_is_not_damage_and_is_shown(tmp_path, monkeypatch, error, remedy):
    """Below Orbax, which wraps all of these in the same error of its own."""
    import tensorstore

    async def fails(*args, **kwargs):
        raise error

    with CheckpointStore(tmp_path) as store:
        save(store)
        with monkeypatch.context() as patch:
            patch.setattr(tensorstore, "open", fails)
            with pytest.raises(ReadError, match=r"step 2 .* nothing was renamed") as raised:
                store.restore(ABSTRACT)
        assert str(error) in str(raised.value) and remedy in str(raised.value)
        assert str(tmp_path) in str(raised.value)
        assert {p.name for p in tmp_path.iterdir()} == {"1", "2"}
        assert store.restore(ABSTRACT).step == 2


def test_a_folder_that_may_not_be_looked_into_is_not_an_empty_one(tmp_path, monkeypatch):
    with CheckpointStore(tmp_path) as store:
        save(store)
    closed = tmp_path / "2" / "params"
    real = os.listdir

    def listdir(path="."):
        if os.fspath(path) == os.fspath(closed):
            raise PermissionError(errno.EACCES, "Permission denied", os.fspath(path))
        return real(path)

    (closed / "_METADATA").rename(tmp_path / "hidden")
    monkeypatch.setattr(os, "listdir", listdir)
    with pytest.raises(ReadError, match=r"step 2 .*Permission denied.*Let this user read"):
        checkpoint.restore_params(tmp_path, ABSTRACT["params"])


def test_a_step_that_may_not_be_looked_into_is_named(tmp_path, monkeypatch):
    with CheckpointStore(tmp_path) as store:
        save(store)
    real = step_folders.exists

    def closed(path):
        if path.parent.name == "2":
            raise PermissionError(errno.EACCES, "Permission denied", str(path))
        return real(path)

    monkeypatch.setattr(step_folders, "exists", closed)
    with pytest.raises(ReadError, match=r"could not be listed: .*Permission denied.*Let this user"):
        checkpoint.restore_params(tmp_path, ABSTRACT["params"])
    monkeypatch.undo()
    assert sorted(path.name for path in tmp_path.iterdir()) == ["1", "2"]


def test_damage_is_told_by_what_was_found_and_not_by_orbax_words_for_it(tmp_path):
    with CheckpointStore(tmp_path) as store:
        save(store)
        (tmp_path / "2" / "params" / "_METADATA").unlink()
        with pytest.warns(UserWarning, match=r"step 2 .*cannot be read \(.*_METADATA.*not exist"):
            store.restore(ABSTRACT)
        (tmp_path / "1" / "params" / "manifest.ocdbt").write_bytes(b"")
        with pytest.raises(InputError, match=r"no readable checkpoint.*step 1: .*DATA_LOSS"):
            store.restore(ABSTRACT)
