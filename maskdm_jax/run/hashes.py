"""SHA-256 of every file of a folder, stored beside them: damage is any difference."""

import concurrent.futures
import hashlib
import json
import pathlib

from maskdm_jax.run import files

NAME = "sha256.json"


class DamageError(ValueError):
    """A file differs from its stored hash, or is missing or new: a phrase that names it."""


def store(folder: str | pathlib.Path) -> None:
    """Writes the hash of each file below `folder` to a file there."""
    folder = files.as_place(folder)
    files.write_text(folder / NAME, _canonical(_hash_all(folder)))


def exist(folder: str | pathlib.Path) -> bool:
    """Whether `store` has finished there."""
    return (files.as_place(folder) / NAME).exists()


def fingerprint(folder: str | pathlib.Path) -> str:
    """A SHA-256 over the stored hashes, or over those of the files where none are stored."""
    folder = files.as_place(folder)
    text = (folder / NAME).read_text() if exist(folder) else _canonical(_hash_all(folder))
    return hashlib.sha256(text.encode()).hexdigest()


def compare(folder: str | pathlib.Path) -> None:
    """Reads all files below `folder`, and raises DamageError for the first that differs."""
    folder = files.as_place(folder)
    text = (folder / NAME).read_bytes()
    try:
        stored = json.loads(text)
        unchanged = text == _canonical(stored).encode()
    except ValueError:
        unchanged = False
    if not unchanged:
        raise DamageError(f"{NAME} itself is damaged")
    found = _hash_all(folder)
    for name in sorted(stored.keys() | found.keys()):
        if name not in found:
            raise DamageError(f"{name} is missing")
        if name not in stored:
            raise DamageError(f"{name} was added")
        if stored[name] != found[name]:
            raise DamageError(f"{name} differs from its SHA-256")


def _hash_all(folder):
    found = files.below(folder)
    hashed = {k: v for k, v in found.items() if k != NAME and not k.startswith(f".{NAME}.")}
    with concurrent.futures.ThreadPoolExecutor() as pool:
        return dict(zip(hashed, pool.map(_sha256, hashed.values()), strict=True))


def _sha256(path):
    sha = hashlib.sha256()
    for block in files.blocks(path):
        sha.update(block)
    return sha.hexdigest()


def _canonical(hashed):
    return json.dumps(dict(sorted(hashed.items())), indent=1) + "\n"
