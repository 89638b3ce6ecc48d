"""What a run depends on besides its code: config, data set and versions.

Every checkpoint stores them, with those at the run's start, and a run that resumes reports what
has changed since.
"""

import jax

import maskdm_jax
from maskdm_jax.config import described, differences, from_dict
from maskdm_jax.fields import UPDATE


def current(config, source) -> dict:
    """The record of this process: {"config", "data", "versions"}, as JSON has it."""
    data = {"name": config.data.name, "split": config.data.split, "num_examples": len(source)}
    return {
        "config": config.to_dict(),
        "data": data | {"fingerprint": source.fingerprint},
        "versions": {"maskdm_jax": maskdm_jax.__version__, "jax": jax.__version__},
    }


def continued(record: dict, stored: dict | None) -> dict:
    """`record` with "began": the record at the run's start, from a `stored` one of the same run."""
    began = record if stored is None else stored.get("began", stored)
    return record | {"began": {k: began[k] for k in record if k in began}}


def changes(record: dict, stored: dict, step: int) -> list[str]:
    """What differs from the run's start, and from its checkpoint `stored` at `step`, in words.

    A checkpoint of an earlier version has fewer entries; what it lacks is not compared.
    """
    began = _differences(record, stored.get("began", stored))
    latest = _differences(record, stored)
    lines = [f"changed since this run began: {began}"] if began else []
    return lines + ([f"changed since step {step}: {latest}"] if latest not in ("", began) else [])


def _differences(record, stored):
    here, there = from_dict(record["config"]), from_dict(stored["config"])
    changed = differences(here, there, [UPDATE])
    parts = [described(here, there, changed)] if changed else []
    if "data" in stored and stored["data"] != record["data"]:
        parts.append(f"the data set ({_data(stored)} there, {_data(record)} here)")
    for name, version in record["versions"].items():
        if stored.get("versions", record["versions"])[name] != version:
            parts.append(f"{name} ({stored['versions'][name]} there, {version} here)")
    return ", ".join(parts)


def _data(record):
    data = record["data"]
    return (
        f"{data['num_examples']:,} images of {data['name']} {data['split']}, fingerprint "
        f"{data['fingerprint'][:8]}"
    )
