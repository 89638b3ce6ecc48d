import pytest

from maskdm_jax.run import files


def test_a_file_is_whole_or_absent_and_leaves_nothing_behind(tmp_path):
    path = tmp_path / "a.txt"
    with pytest.raises(KeyboardInterrupt), files.whole(path) as unfinished:
        unfinished.write_text("half")
        assert not path.exists()
        raise KeyboardInterrupt
    assert list(tmp_path.iterdir()) == []
    (tmp_path / ".a.txt.another-host-12").write_text("half")
    (tmp_path / ".b.txt.another-host-12").write_text("half")
    files.remove_leftovers(tmp_path, "a.*")
    assert [p.name for p in tmp_path.iterdir()] == [".b.txt.another-host-12"]
    files.remove_leftovers(tmp_path, "*")
    files.write_text(path, "old")
    files.write_text(path, "new")
    assert path.read_text() == "new" and list(tmp_path.iterdir()) == [path]
