import json

import pytest

from maskdm_jax import provenance
from maskdm_jax.config import default_config


class FakeSource:
    fingerprint = "abcdef0123456789"

    def __len__(self):
        return 1797


def record(source=None, **fields):
    config = default_config()
    config.data.name = "digits"
    config.update_from_flattened_dict({k.replace("__", "."): v for k, v in fields.items()})
    return provenance.current(config, source or FakeSource())


def stored(now, before=None):
    """What a checkpoint gives back."""
    return json.loads(json.dumps(provenance.continued(now, before)))


def test_an_unchanged_run_reports_nothing():
    first = stored(record())
    assert provenance.changes(record(), first, 5) == []
    assert provenance.changes(record(), stored(record(), first), 9) == []


def test_a_change_is_reported_at_every_resume():
    first = stored(record())
    line = "changed since this run began: optim.b1 (0.99 there, 0.9 here)"
    assert provenance.changes(record(optim__b1=0.9), first, 5) == [line]
    second = stored(record(optim__b1=0.9), first)
    assert provenance.changes(record(optim__b1=0.9), second, 9) == [line]
    third = stored(record(optim__b1=0.9), second)
    assert provenance.changes(record(), third, 12) == [
        "changed since step 12: optim.b1 (0.9 there, 0.99 here)"
    ]


def test_another_data_set_of_the_same_name_is_reported():
    other = FakeSource()
    other.fingerprint = "fedcba9876543210"
    (line,) = provenance.changes(record(other), stored(record()), 5)
    assert line == (
        "changed since this run began: the data set (1,797 images of digits train, fingerprint "
        "abcdef01 there, 1,797 images of digits train, fingerprint fedcba98 here)"
    )


def test_another_version_of_jax_is_reported(monkeypatch):
    first = stored(record())
    monkeypatch.setattr(provenance.jax, "__version__", "99.0")
    (line,) = provenance.changes(record(), first, 5)
    assert "jax (" in line and "99.0 here" in line


@pytest.mark.parametrize("missing", ["data", "versions", "began"])
def test_what_an_earlier_version_did_not_store_is_not_compared(missing):
    before = {k: v for k, v in stored(record()).items() if k != missing}
    assert provenance.changes(record(), before, 5) == []
    as_stored = json.loads(json.dumps(record()["config"]))  # with lists for tuples
    assert stored(record(), before)["began"]["config"] == as_stored
