"""TensorBoard's event files, written without TensorFlow.

A workdir's tensorboard/ is one run of TensorBoard: scalars, previews, and the config as text and as
hyperparameters. Its folder scores/ is a second one, since an evaluation may write beside the
training.
"""

import hashlib
import io
import json
import pathlib
import sys
import time

from PIL import Image

from maskdm_jax.run import files

# tensorboardX imports PyTorch where it is installed, which takes seconds and is for what we do not
# use. A module of None counts as not installed.
_torch = sys.modules.setdefault("torch", None)
try:
    from tensorboardX.event_file_writer import EventsWriter
    from tensorboardX.proto import event_pb2, plugin_hparams_pb2, summary_pb2, tensor_pb2, types_pb2
finally:
    if _torch is None:
        del sys.modules["torch"]

_CONFIG = ".config"  # how the name of the file with the config ends


class Board:
    """Writes the events of one start of a run, each at once; into a bucket, see `flush`."""

    def __init__(self, workdir: pathlib.Path, config: dict, first_step: int):
        """
        Args:
          workdir: the run.
          config: its resolved config, nested.
          first_step: completed updates at the start; TensorBoard drops what came later.
        """
        folder = files.as_place(workdir) / "tensorboard"
        folder.mkdir(exist_ok=True)
        self._growing = files.growing(folder)
        _remove(folder, _CONFIG)
        _write_config(self._growing.local, config)
        # Not SummaryWriter: a full disk kills its thread, and its queue then blocks the run.
        self._writer = EventsWriter(str(self._growing.local / "events"))
        start = event_pb2.SessionLog(status=event_pb2.SessionLog.START)
        self._write(step=first_step + 1, session_log=start)

    def scalars(self, step: int, values: dict[str, float]) -> None:
        """Adds a point to the curve of each name."""
        self._write(step=step, summary=_summary(values))

    def preview(self, step: int, path: pathlib.Path) -> None:
        """Shows a PNG file."""
        content = path.read_bytes()
        with Image.open(io.BytesIO(content)) as picture:
            width, height = picture.size
            channels = len(picture.getbands())
        image = summary_pb2.Summary.Image(
            height=height,
            width=width,
            colorspace=channels,
            encoded_image_string=content,
        )
        value = summary_pb2.Summary.Value(tag="preview", image=image)
        self._write(step=step, summary=summary_pb2.Summary(value=[value]))

    def flush(self) -> None:
        """Makes a bucket have every event; otherwise it gets them about once a minute."""
        self._growing.sync(now=True)

    def close(self) -> None:
        """Closes the file, which then has every event."""
        self._writer.close()
        self._growing.close()

    def _write(self, **fields):
        _write_event(self._writer, **fields)
        self._writer.flush()
        self._growing.sync()


def write_scores(
    workdir: pathlib.Path, key: str, step: int, values: dict[str, float], definition: str
) -> None:
    """Plots scores, in the place of earlier ones with the same key.

    Args:
      workdir: the run.
      key: the record's in scores.jsonl.
      step: that of the scored weights.
      values: {name: score}.
      definition: what was measured, in words.
    """
    folder = files.as_place(workdir) / "tensorboard" / "scores"
    folder.mkdir(parents=True, exist_ok=True)
    drop_scores(workdir, key)
    growing = files.growing(folder)
    # One file for each record: the writer names files by the second.
    writer = EventsWriter(str(growing.local / "events"), _suffix(key))
    summary = _summary(values)
    summary.value.append(_text("scores/definition", definition))
    _write_event(writer, step=step, summary=summary)
    writer.close()
    growing.close()


def drop_scores(workdir: pathlib.Path, key: str) -> None:
    """Removes the scores with that key."""
    _remove(files.as_place(workdir) / "tensorboard" / "scores", _suffix(key))


def _remove(folder, suffix):
    for path in folder.glob(f"*{suffix}"):
        path.unlink()


def _write_config(folder, config):
    """Writes the config into a file of its own, in the place of that of an earlier start.

    TensorBoard keeps the first hyperparameters of a run that it finds, so those of an earlier start
    must not remain. HParams columns need no declaration: TensorBoard collects them over all runs.
    """
    session = plugin_hparams_pb2.SessionStartInfo(start_time_secs=time.time())
    for name, value in _flat(config).items():
        kind = {bool: "bool_value", int: "number_value", float: "number_value"}.get(type(value))
        setattr(session.hparams[name], kind or "string_value", value if kind else str(value))
    hparams = plugin_hparams_pb2.HParamsPluginData(version=0, session_start_info=session)
    described = "\n".join(f"    {line}" for line in json.dumps(config, indent=2).splitlines())
    values = [
        _text("config", described),  # indented by four, Markdown shows it as code
        _value("_hparams_/session_start_info", "hparams", content=hparams.SerializeToString()),
    ]
    writer = EventsWriter(str(folder / "events"), _CONFIG)
    _write_event(writer, step=0, summary=summary_pb2.Summary(value=values))
    writer.close()


def _write_event(writer, **fields):
    writer.write_event(event_pb2.Event(wall_time=time.time(), **fields))


def _summary(values):
    return summary_pb2.Summary(
        value=[summary_pb2.Summary.Value(tag=k, simple_value=v) for k, v in values.items()]
    )


def _text(tag, text):
    tensor = tensor_pb2.TensorProto(dtype=types_pb2.DT_STRING, string_val=[text.encode()])
    return _value(tag, "text", tensor=tensor)


def _value(tag, plugin, content=b"", **fields):
    data = summary_pb2.SummaryMetadata.PluginData(plugin_name=plugin, content=content)
    metadata = summary_pb2.SummaryMetadata(plugin_data=data)
    return summary_pb2.Summary.Value(tag=tag, metadata=metadata, **fields)


def _suffix(key):
    return "." + hashlib.sha256(key.encode()).hexdigest()[:16]


def _flat(values, start=""):
    """{"group.field": value} of nested dicts."""
    found = {}
    for name, value in values.items():
        found |= (
            _flat(value, f"{start}{name}.") if isinstance(value, dict) else {start + name: value}
        )
    return found
