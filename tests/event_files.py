"""Reads TensorBoard's event files back."""

import pathlib
import struct

from tensorboardX.proto import event_pb2, plugin_hparams_pb2


def events(folder: pathlib.Path) -> list:
    """The events of all files in a folder, file by file."""
    found = []
    for path in sorted(folder.glob("events.*")):
        data = path.read_bytes()
        while data:  # a length, its checksum, an event, its checksum
            (length,) = struct.unpack("<Q", data[:8])
            found.append(event_pb2.Event.FromString(data[12 : 12 + length]))
            data = data[16 + length :]
    return found


def values(folder: pathlib.Path) -> dict[str, list]:
    """{tag: [(step, value)]}, as protos."""
    found = {}
    for event in events(folder):
        for value in event.summary.value:
            found.setdefault(value.tag, []).append((event.step, value))
    return found


def hparams(folder: pathlib.Path) -> dict:
    """The hyperparameters, which must be there once."""
    ((_, value),) = values(folder)["_hparams_/session_start_info"]
    assert value.metadata.plugin_data.plugin_name == "hparams"
    data = plugin_hparams_pb2.HParamsPluginData.FromString(value.metadata.plugin_data.content)
    return {
        name: getattr(each, each.WhichOneof("kind"))
        for name, each in data.session_start_info.hparams.items()
    }
