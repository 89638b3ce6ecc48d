"""Google Cloud Storage on loopback, by gcp-storage-emulator."""

import socket

import pytest


@pytest.fixture(scope="session")
def emulated_storage():
    """An emulator with an empty bucket, which gcsfs uses instead of Google."""
    create_server = pytest.importorskip("gcp_storage_emulator.server").create_server
    import fsspec.config

    with socket.create_server(("127.0.0.1", 0)) as free:
        port = free.getsockname()[1]
    server = create_server("127.0.0.1", port, in_memory=True, default_bucket="bucket")
    server.start()
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("STORAGE_EMULATOR_HOST", f"http://127.0.0.1:{port}")
        patch.setitem(fsspec.config.conf, "gcs", {"token": "anon"})
        yield server
    server.stop()


@pytest.fixture
def bucket_dir(emulated_storage, request):
    """The place of an empty folder in the bucket."""
    from maskdm_jax.run import files

    folder = files.place(f"gs://bucket/{request.node.name.partition('[')[0]}", "folder")
    if folder.exists():
        folder.rmtree()
    return folder
