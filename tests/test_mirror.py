"""Data sets in a bucket: their copies on a host's disk, and their uploads."""

import concurrent.futures
import pathlib
import shutil
import signal
import subprocess
import sys
import threading
import zipfile

import numpy as np
import pytest
from conftest import ROOT
from PIL import Image

from maskdm_jax.config import default_config
from maskdm_jax.data import mirror, prepare, sources, transfer
from maskdm_jax.errors import BucketError, ConfigError
from maskdm_jax.run import bucket, lock

INDEX = "dataset_info.json"


@pytest.fixture(scope="session")
def pictures(tmp_path_factory):
    """Two classes of 8x8 grey images."""
    folder = tmp_path_factory.mktemp("pictures")
    for i in range(6):
        values = np.random.default_rng(i).integers(0, 256, (8, 8), np.uint8)
        path = folder / "ab"[i % 2] / f"{i}.png"
        path.parent.mkdir(exist_ok=True)
        Image.fromarray(values).save(path)
    return folder


@pytest.fixture(scope="session")
def prepared(pictures, tmp_path_factory):
    """A local folder of data sets that holds "small"."""
    folder = tmp_path_factory.mktemp("prepared")
    prepare.prepare(pictures, "small", (8, 8), data_dir=folder, channels=1, num_processes=1)
    return folder


@pytest.fixture
def local_dir(tmp_path):
    return tmp_path / "local"


@pytest.fixture
def in_bucket(bucket_dir, prepared):
    """A folder of data sets in a bucket that holds "small"."""
    put(bucket_dir / "small" / "1.0.0", prepared / "small" / "1.0.0")
    return bucket_dir


def put(place, folder):
    for path in folder.iterdir():
        (place / path.name).write_bytes(path.read_bytes())


def shards(place, count=4, size=1000, seed=0):
    """A set of random bytes, of which no reader could make sense."""
    for i in range(count):
        data = np.random.default_rng([seed, i]).bytes(size)
        (place / f"x-train.array_record-{i:05}-of-{count:05}").write_bytes(data)
    (place / INDEX).write_text("{}")


def contents(folder):
    return {
        path.relative_to(folder).as_posix(): path.read_bytes()
        for path in folder.rglob("*")
        if path.is_file() and not path.name.startswith(".")
    }


def opened(data_dir, name, local_dir, **fields):
    config = default_config()
    config.data.update(name=name, dir=str(data_dir), local_dir=str(local_dir))
    config.data.update({"image_size": (8, 8), "channels": 1} | fields)
    return sources.open_source(config)


@pytest.fixture
def gets(monkeypatch):
    """The objects that are copied from the bucket, in order."""
    keys, get_file = [], bucket.system().get_file

    def counted(key, *args, **options):
        keys.append(key.rpartition("/")[2])
        return get_file(key, *args, **options)

    monkeypatch.setattr(bucket.system(), "get_file", counted)
    return keys


def test_a_set_in_a_bucket_reads_like_the_local_one(in_bucket, prepared, local_dir):
    ours, theirs = (opened(d, "small", local_dir) for d in (in_bucket, prepared))
    assert ours.fingerprint == theirs.fingerprint and len(ours) == 6
    np.testing.assert_array_equal(ours[5]["image"], theirs[5]["image"])
    # It is a data.dir of its own, and what is derived from it stays on this host.
    copies = mirror.folder_of(in_bucket, local_dir)
    assert contents(copies) == contents(prepared)
    assert ours.cache_dir == copies / "small" / "1.0.0" / "decoded"


def test_later_runs_use_the_copy(in_bucket, local_dir, gets):
    mirror.local_copy(in_bucket, "small", local_dir)
    assert gets.pop() == INDEX and len(gets) == 3
    gets.clear()
    folder = mirror.local_copy(in_bucket, "small", local_dir)
    assert not gets and folder == mirror.folder_of(in_bucket, local_dir) / "small" / "1.0.0"


def test_a_set_that_changed_in_the_bucket_is_copied_again_where_it_differs(
    bucket_dir, local_dir, gets
):
    place = bucket_dir / "x" / "1.0.0"
    shards(place)
    folder = mirror.local_copy(bucket_dir, "x", local_dir)
    gets.clear()
    names = sorted(path.name for path in folder.iterdir())
    (place / names[1]).write_bytes(b"of the same size".ljust(1000))
    assert mirror.local_copy(bucket_dir, "x", local_dir) == folder
    assert gets == [names[1], INDEX]
    (place / names[2]).unlink()
    mirror.local_copy(bucket_dir, "x", local_dir)
    assert contents(folder) == {path.name: path.read_bytes() for path in place.iterdir()}


def test_a_run_reads_the_state_of_the_set_that_it_found_first(in_bucket, local_dir, gets):
    (place,) = (in_bucket / "small" / "1.0.0").glob("*.array_record-*")
    first = opened(in_bucket, "small", local_dir)
    gets.clear()
    place.write_bytes(b"another")
    assert opened(in_bucket, "small", local_dir).fingerprint == first.fingerprint and not gets


def test_a_local_file_that_changed_is_copied_again(in_bucket, prepared, local_dir, gets):
    folder = mirror.local_copy(in_bucket, "small", local_dir)
    gets.clear()
    (path,) = folder.glob("*.array_record-*")
    damaged = bytearray(path.read_bytes())
    damaged[100] ^= 1
    path.write_bytes(damaged)
    mirror.local_copy(in_bucket, "small", local_dir)
    assert gets == [path.name, INDEX]
    assert contents(folder) == contents(prepared / "small" / "1.0.0")


def test_a_killed_copy_leaves_no_set_and_the_next_one_copies_the_rest(bucket_dir, local_dir, gets):
    shards(bucket_dir / "x" / "1.0.0", count=12)
    code = """if True:
        import os, pathlib, signal, sys
        from maskdm_jax.data import mirror, transfer
        from maskdm_jax.run import bucket, files
        place = files.place(sys.argv[1], "data.dir")
        system, transfer._AT_ONCE, count = bucket.system(), 1, [0]
        get_file = system.get_file
        def get(key, path, callback):
            count[0] += 1
            if count[0] == 5:
                pathlib.Path(path).write_bytes(b"half")
                os.kill(os.getpid(), signal.SIGKILL)
            get_file(key, path, callback=callback)
        system.get_file = get
        mirror.local_copy(place, "x", pathlib.Path(sys.argv[2]))
    """
    command = [sys.executable, "-c", code, str(bucket_dir), str(local_dir)]
    assert subprocess.run(command, cwd=ROOT).returncode == -signal.SIGKILL
    folder = mirror.folder_of(bucket_dir, local_dir) / "x" / "1.0.0"
    assert len(contents(folder)) == 4 and not (folder / INDEX).exists()
    (half,) = (path for path in folder.iterdir() if path.name.startswith("."))
    mirror.local_copy(bucket_dir, "x", local_dir)
    assert not half.exists() and len(contents(folder)) == 13
    assert len(gets) == 9 and gets[-1] == INDEX


def test_one_process_of_a_host_copies_and_the_others_wait(bucket_dir, local_dir, gets, monkeypatch):
    shards(bucket_dir / "x" / "1.0.0")
    waits, download = threading.Event(), transfer.download
    monkeypatch.setattr(lock, "say", lambda text: waits.set())

    def slow(*args):
        assert waits.wait(30)
        download(*args)

    monkeypatch.setattr(transfer, "download", slow)
    monkeypatch.setattr(transfer, "are_copies", None)  # the one that waited believes the record
    with concurrent.futures.ThreadPoolExecutor() as pool:
        copies = [pool.submit(mirror.local_copy, bucket_dir, "x", local_dir) for _ in range(2)]
    first, second = (copy.result() for copy in copies)
    assert waits.is_set() and first == second and sorted(gets) == sorted(contents(first))


@pytest.mark.parametrize("kind", ["md5Hash", "crc32c"])
def test_what_arrives_damaged_is_not_believed(bucket_dir, local_dir, monkeypatch, kind):
    shards(bucket_dir / "x" / "1.0.0", count=2)
    system = bucket.system()
    get_file, find = system.get_file, system.find

    def damaged(key, path, callback):
        get_file(key, path, callback=callback)
        if "00001-of" in key:
            data = bytearray(pathlib.Path(path).read_bytes())
            data[0] ^= 1
            pathlib.Path(path).write_bytes(data)

    def only_kind(*args, **options):
        found = find(*args, **options)
        return {key: {n: v for n, v in info.items() if n != "md5Hash" or kind == n}
                for key, info in found.items()}  # fmt: skip

    monkeypatch.setattr(system, "find", only_kind)
    monkeypatch.setattr(system, "get_file", damaged)
    with pytest.raises(BucketError, match="00001-of-00002 arrived with another size or hash"):
        mirror.local_copy(bucket_dir, "x", local_dir)
    folder = mirror.folder_of(bucket_dir, local_dir) / "x" / "1.0.0"
    assert not (folder / INDEX).exists() and len(contents(folder)) <= 1
    monkeypatch.setattr(system, "get_file", get_file)
    assert len(contents(mirror.local_copy(bucket_dir, "x", local_dir))) == 3


def test_the_newest_version_is_read_unless_another_is_named(bucket_dir, local_dir):
    for seed, version in enumerate(("1.9.0", "1.10.0")):
        shards(bucket_dir / "x" / "wide" / version, seed=seed)
    for name, version in [
        ("x/wide", "1.10.0"), ("x/wide:1.9.0", "1.9.0"), ("x/wide/1.9.0", "1.9.0"),
    ]:  # fmt: skip
        folder = mirror.local_copy(bucket_dir, name, local_dir)
        assert folder.parts[-3:] == ("x", "wide", version)
        place = bucket_dir / "x" / "wide" / version
        assert contents(folder) == {path.name: path.read_bytes() for path in place.iterdir()}


def test_decoded_images_and_hidden_files_stay_in_the_bucket(bucket_dir, local_dir):
    place = bucket_dir / "x" / "1.0.0"
    shards(place, count=1)
    for name in ("decoded/train.npy", ".hidden"):
        bucket.system().pipe_file(f"{str(place)[5:]}/{name}", b"1")
    folder = mirror.local_copy(bucket_dir, "x", local_dir)
    assert len(contents(local_dir)) == len(list(folder.iterdir())) == 2


def test_zips_and_lmdbs_are_read_from_a_bucket(bucket_dir, local_dir, pictures, tmp_path):
    with zipfile.ZipFile(tmp_path / "faces.zip", "w") as archive:
        for path in sorted(pictures.rglob("*.png")):
            archive.write(path, path.relative_to(pictures))
    (bucket_dir / "sub" / "faces.zip").write_bytes((tmp_path / "faces.zip").read_bytes())
    source = opened(bucket_dir, "sub/faces.zip", local_dir)
    theirs = opened(tmp_path, "faces.zip", local_dir)
    assert source.fingerprint == theirs.fingerprint
    assert local_dir in source.cache_dir.parents

    lmdb = pytest.importorskip("lmdb", reason="This needs lmdb.")
    with lmdb.open(str(tmp_path / "cats_lmdb"), map_size=2**20) as environment:
        with environment.begin(write=True) as transaction:
            transaction.put(b"0", next(pictures.rglob("*.png")).read_bytes())
    put(bucket_dir / "cats_lmdb", tmp_path / "cats_lmdb")
    assert len(opened(bucket_dir, "cats_lmdb", local_dir)) == 1


def test_sets_that_are_made_here_need_nothing_in_the_bucket(bucket_dir, local_dir, data_dir):
    copies = mirror.folder_of(bucket_dir, local_dir)
    shutil.copytree(data_dir / "digits", copies / "digits")  # as a run before has written them
    assert len(opened(bucket_dir, "digits", local_dir)) == 1797
    source = opened(bucket_dir, "swiss_roll", local_dir, image_size=(1, 2))
    assert source.cache_dir == copies / "decoded" / "swiss_roll"
    assert not bucket_dir.exists()


def test_an_absolute_path_is_local(bucket_dir, local_dir, tmp_path, pictures):
    with zipfile.ZipFile(tmp_path / "faces.zip", "w") as archive:
        archive.write(next(pictures.rglob("*.png")), "0.png")
    assert len(opened(bucket_dir, str(tmp_path / "faces.zip"), local_dir)) == 1


@pytest.mark.parametrize(
    "name, says",
    [
        ("smal", "holds other, pets.zip, small; type --config.data.name=small"),
        ("faces.zip", "holds other, pets.zip, small; type --config.data.name="),
        ("small:2.0.0", "only version 1.0.0; type --config.data.name=small:1.0.0"),
        ("other/a:3.0.0", "version 1.0.0, 1.10.0, 1.9.0; type --config.data.name=other/a:1.10.0"),
        ("other", "a folder of several sets, a, b; expected one of them; type "
         "--config.data.name=other/a"),
        ("other/b", "is uploaded only in part"),
        ("other/old", "is not in ArrayRecord format; type: tfds build other/old"),
    ],
)  # fmt: skip
def test_a_set_that_is_not_there_is_one_sentence(in_bucket, local_dir, name, says):
    (in_bucket / "pets.zip").write_bytes(b"")
    for config in "ab":
        shards(in_bucket / "other" / config / "1.0.0", count=1)
    for version in ("1.9.0", "1.10.0"):
        (in_bucket / "other" / "a" / version / INDEX).write_text("{}")
    (in_bucket / "other" / "old" / "1.0.0" / INDEX).write_text("{}")
    if name == "other/b":
        (in_bucket / "other" / "b" / "1.0.0" / INDEX).unlink()
    if name == "other":
        (in_bucket / "other" / "old" / "1.0.0" / INDEX).unlink()
    with pytest.raises(ConfigError) as error:
        opened(in_bucket, name, local_dir)
    assert says in str(error.value) and "\n" not in str(error.value)
    assert not local_dir.exists()


def test_a_folder_without_sets_is_answered_with_how_to_upload_one(bucket_dir, local_dir):
    with pytest.raises(ConfigError, match=f"holds no data sets; .* --data_dir {bucket_dir}"):
        opened(bucket_dir, "small", local_dir)


def test_a_disk_without_room_is_noticed_before_the_copy(
    in_bucket, prepared, local_dir, gets, monkeypatch
):
    usage = shutil.disk_usage("/")
    monkeypatch.setattr(shutil, "disk_usage", lambda path: usage._replace(free=600))
    with pytest.raises(ConfigError) as error:
        opened(in_bucket, "small", local_dir)
    needed = sum(map(len, contents(prepared).values())) / 2**20
    assert f"takes {needed:,.1f} MiB" in str(error.value)
    assert "0.0 MiB free" in str(error.value) and "--config.data.local_dir=" in str(error.value)
    assert not gets


def test_a_local_dir_that_cannot_be_written_is_one_sentence(in_bucket, tmp_path):
    (tmp_path / "file").touch()
    with pytest.raises(ConfigError, match="type --config.data.local_dir=FOLDER"):
        opened(in_bucket, "small", tmp_path / "file")


def forbidden(key, *args, **options):
    raise OSError(f"Forbidden: {key}\nno storage.objects access")


def test_objects_that_may_not_be_read_are_one_sentence(in_bucket, local_dir, monkeypatch):
    monkeypatch.setattr(bucket.system(), "get_file", forbidden)
    with pytest.raises(ConfigError, match="may not read .* --role=roles/storage.objectViewer"):
        opened(in_bucket, "small", local_dir)


def test_a_bucket_that_fails_for_a_while_is_asked_again(bucket_dir, local_dir, storage_emulator):
    shards(bucket_dir / "x" / "1.0.0")
    storage_emulator.fail(503, "&match=00001-of&method=GET")
    end = threading.Timer(1, storage_emulator.fail, (0,))
    end.start()
    assert len(contents(mirror.local_copy(bucket_dir, "x", local_dir))) == 5
    assert end.finished.is_set()


def test_a_lost_bucket_ends_the_copy_and_what_arrived_is_kept(bucket_dir, local_dir, monkeypatch):
    shards(bucket_dir / "x" / "1.0.0")
    get_file = bucket.system().get_file

    def lost(key, *args, **options):
        if "00003-of" in key:
            raise TimeoutError
        get_file(key, *args, **options)

    monkeypatch.setattr(bucket, "LOST_S", 0)
    monkeypatch.setattr(bucket.system(), "get_file", lost)
    with pytest.raises(BucketError, match="does not answer .*; what has arrived is kept") as error:
        mirror.local_copy(bucket_dir, "x", local_dir)
    assert error.value.exit_code == 75
    folder = mirror.folder_of(bucket_dir, local_dir) / "x" / "1.0.0"
    assert not (folder / INDEX).exists()


def test_a_file_that_is_removed_during_the_copy_is_one_sentence(in_bucket, local_dir, monkeypatch):
    def gone(key, *args, **options):
        raise FileNotFoundError(key)

    monkeypatch.setattr(bucket.system(), "get_file", gone)
    with pytest.raises(BucketError, match="was removed while it was in use"):
        mirror.local_copy(in_bucket, "small", local_dir)


def prepare_in(place, pictures, local_dir):
    return prepare.prepare(
        pictures, "small", (8, 8), data_dir=place, local_dir=local_dir, channels=1,
        num_processes=1,
    )  # fmt: skip


def test_prepare_uploads_and_this_host_need_not_copy(
    bucket_dir, pictures, prepared, local_dir, gets, monkeypatch
):
    (bucket_dir / "small" / "1.0.0" / "left_by_another_upload").write_bytes(b"1")
    puts, put_file = [], bucket.system().put_file
    monkeypatch.setattr(
        bucket.system(), "put_file", lambda *a, **o: (puts.append(a[1]), put_file(*a, **o))
    )
    folder = prepare_in(str(bucket_dir), pictures, local_dir)
    place = bucket_dir / "small" / "1.0.0"
    assert {path.name: path.read_bytes() for path in place.iterdir()} == contents(folder)
    assert puts[-1].endswith(INDEX) and len(puts) == len(contents(folder))
    assert opened(bucket_dir, "small", local_dir).fingerprint == (
        opened(prepared, "small", local_dir).fingerprint
    )
    assert not gets
    with pytest.raises(ConfigError, match=f"{bucket_dir}/small exists"):
        prepare_in(str(bucket_dir), pictures, local_dir)


def test_a_set_that_was_removed_from_the_bucket_is_prepared_again(bucket_dir, pictures, local_dir):
    prepare_in(str(bucket_dir), pictures, local_dir)
    (bucket_dir / "small").rmtree()
    prepare_in(str(bucket_dir), pictures / "a", local_dir)
    assert len(opened(bucket_dir, "small", local_dir)) == 3


def test_an_upload_that_fails_leaves_no_set_in_the_bucket(
    bucket_dir, pictures, local_dir, monkeypatch
):
    monkeypatch.setattr(bucket, "LOST_S", 0)
    put_file = bucket.system().put_file

    def lost(path, key, **options):
        if ".array_record-" in key:
            raise TimeoutError
        put_file(path, key, **options)

    monkeypatch.setattr(bucket.system(), "put_file", lost)
    with pytest.raises(BucketError, match="is whole: type gcloud storage cp -r"):
        prepare_in(str(bucket_dir), pictures, local_dir)
    assert not (bucket_dir / "small" / "1.0.0" / INDEX).exists()
    monkeypatch.setattr(bucket.system(), "put_file", put_file)
    prepare_in(str(bucket_dir), pictures, local_dir)
    assert len(opened(bucket_dir, "small", local_dir)) == 6


def test_a_bucket_that_may_not_be_written_is_noticed_before_the_work(
    bucket_dir, pictures, local_dir, monkeypatch
):
    monkeypatch.setattr(bucket.system(), "pipe_file", forbidden)
    monkeypatch.setattr(prepare, "encode_all", None)
    with pytest.raises(ConfigError, match="may not write .* --role=roles/storage.objectUser"):
        prepare_in(str(bucket_dir), pictures, local_dir)
