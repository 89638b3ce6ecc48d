"""The command line in this process: flags, the config's file and its fields."""

import signal
import sys
import types

import pytest
from conftest import ROOT

from maskdm_jax import __main__, config_file
from maskdm_jax.config import FIELDS
from maskdm_jax.errors import ConfigError
from maskdm_jax.fields import COUNT, TEXT, one_of
from maskdm_jax.run import command_line

DIGITS = str(ROOT / "configs/pretrain_digits.py")


@pytest.fixture
def parser():
    made = command_line.Parser("About.", "python x.py --workdir=W", FIELDS)
    made.flag("--workdir", TEXT, "a folder", required=True)
    made.flag("--mode", one_of("train", "sample"), "what to do", "train")
    made.flag("--count", COUNT, "how many, in %")
    made.flag("--tag", TEXT, "a word", "")
    made.flag("--parts", one_of("a", "b"), "which", ["a", "b"], many=True)
    made.add_argument("--row", action="store_true")
    return made


def test_flags_have_their_values_or_defaults(parser):
    args = parser.parse(["--workdir=W", "--count", "3", "--parts", "b", "--row"])
    assert (args.workdir, args.mode, args.count, args.parts) == ("W", "train", 3, ["b"])
    assert args.row and args.changes == []
    args = parser.parse(["--workdir=W", "--config.seed=1", "--config.mask.ratio", "0.5"])
    assert args.changes == ["seed=1", "mask.ratio=0.5"] and args.parts == ["a", "b"]


@pytest.mark.parametrize(
    "arguments, given, remedy",
    [
        (["--mode=trian"], "--mode is 'trian'; expected one of train, sample", "--mode=train"),
        (["--mode"], "--mode has no value; expected one of train, sample", "--mode=train"),
        (["--count=1.5"], "--count is 1.5; expected a whole number", "--count=2"),
        (["--count=x"], "--count is 'x'", "--count=1"),
        (["--parts", "a", "c"], "--parts is 'c'", "--parts=a"),
        (["--workdri=V"], "--workdri is not a flag", "--workdir=V"),
        (["--mask.ratio=0.5"], "--mask.ratio is not a flag", "--config.mask.ratio=0.5"),
        (["--row=3"], "'3'", "python x.py --workdir=W"),
        (["more"], "unexpected argument 'more'", "python x.py --workdir=W"),
        (["--zzz"], "--zzz is not a flag", "--help"),
        (["--workdir="], "--workdir is missing", "python x.py --workdir=W"),
    ],
)
def test_a_wrong_flag_is_named_with_what_to_type(parser, arguments, given, remedy):
    with pytest.raises(ConfigError) as error:
        parser.parse(["--workdir=W", *arguments])
    assert given in str(error.value)
    assert remedy in str(error.value).split("type", 1)[1]


def test_help_has_the_flags_and_every_field_with_its_default(parser, capsys):
    with pytest.raises(SystemExit) as end:
        parser.parse(["--help"])
    text = capsys.readouterr().out
    assert end.value.code == 0 and "what to do (one of train, sample); default: train" in text
    assert "--config.mask.ratio=0.9\n" in text and '--config.data.image_size="(64, 64)"\n' in text
    words = " ".join(text.split())
    assert "how many, in % (" in words and "%%" not in text and "default: --" not in words
    for name, field in FIELDS.items():
        assert f"--config.{name}=" in text and field.meaning in words, name


def test_a_message_is_one_line_whatever_was_typed(capsys):
    assert command_line.report(ConfigError("--workdir is a\nb\x1b[31m\udc80; type é")) == 2
    assert capsys.readouterr().err == "error: --workdir is a\\nb\\x1b[31m\\udc80; type é\n"


@pytest.mark.parametrize(
    "change, expected",
    [
        ("data.image_size=8,8", (8, 8)),
        ("data.image_size=[8, 16]", (8, 16)),
        ("init.ignore=position", ("position",)),
        ("init.ignore=('a.*', 'b')", ("a.*", "b")),
        ("data.flip=true", True),
        ("optim.lr_peak=1", 1.0),
        ("train.num_steps=1_000", 1000),
        ("data.name=7", "7"),
        ("init.path=", ""),
    ],
)
def test_a_field_takes_what_was_typed(change, expected):
    config = config_file.load(DIGITS, [change])
    group, leaf = change.partition("=")[0].split(".")
    assert config[group][leaf] == expected and type(config[group][leaf]) is type(expected)


def test_the_last_value_of_a_field_counts_also_for_tuples():
    changes = ["data.image_size=(4, 4)", "seed=x", "data.image_size=(8, 16)", "seed=2"]
    config = config_file.load(DIGITS, changes)
    assert config.data.image_size == (8, 16) and config.seed == 2 and config.is_locked


@pytest.mark.parametrize(
    "change, remedy",
    [
        ("data.image_size=8", '--config.data.image_size="(8, 8)"'),
        ("data.image_size=(8,)", '--config.data.image_size="(8, 8)"'),
        ("data.image_size=8x16", '--config.data.image_size="(8, 16)"'),
        ("seed=1.5", "--config.seed=2"),
        ("seed=True", "--config.seed=0"),
        ("mask.ratio=nan", "--config.mask.ratio=0.5"),  # as in the file, not the table
        ("data.flip=yes", "--config.data.flip=True"),
        ("mask.ration=0.4", "--config.mask.ratio=0.4"),
        ("lr_peak=1", "--config.optim.lr_peak=1"),
        ("zzz=1", "--help"),
        ("mask.ratio", "--config.mask.ratio=0.5"),
        ("init.ignore=('[',)", '--config.init.ignore="()"'),
    ],
)
def test_a_wrong_change_is_refused_and_what_to_type_is_accepted(change, remedy):
    with pytest.raises(ConfigError) as error:
        config_file.load(DIGITS, [change])
    assert str(error.value).endswith(f"type {remedy}")
    assert f"--config.{change.partition('=')[0]} " in str(error.value)
    if remedy.startswith("--config."):
        typed = remedy.removeprefix("--config.").replace('"', "")
        config_file.load(DIGITS, [typed])


CONFIG = "from maskdm_jax.config import default_config\ndef get_config():\n"


@pytest.mark.parametrize(
    "text, fault",
    [
        ("def get_config(:\n", "line 1: SyntaxError"),
        ("\nimport nowhere\n", "line 2: ModuleNotFoundError: No module named 'nowhere'"),
        ("def get_config():\n    1 / 0\n", "line 2: ZeroDivisionError: division by zero"),
        ("raise SystemExit\n", "line 1: SystemExit"),
        ("seed = 0\n", "it has no function get_config()"),
        (f"{CONFIG}    pass\n", "get_config() returns None"),
        (f"{CONFIG}    return default_config().to_dict()\n", "get_config() returns a dict"),
        (f"{CONFIG}    c = default_config()\n    c.mask.ration = 1\n", 'Did you mean "ratio"'),
        (f"{CONFIG}    c = default_config()\n    c.seed = 'x'\n", "line 4: TypeError"),
        (f"{CONFIG}    c = default_config().unlock()\n    c.x = 1\n    return c\n", "has x, which"),
        (
            f"{CONFIG}    c = default_config()\n    del c.unlock().seed\n    return c\n",
            "lacks seed",
        ),
    ],
)
def test_a_config_file_that_fails_is_named_with_the_line(tmp_path, text, fault):
    path = tmp_path / "mine.py"
    path.write_text(text)
    with pytest.raises(ConfigError) as error:
        config_file.load(str(path))
    said = str(error.value)
    assert f"--config={path}: " in said and fault in said and "\n" not in said
    assert "type --config=configs/pretrain_digits.py" in said


@pytest.mark.parametrize("path", ["configs", "configs/pretrain_digit.py", "pretrain_digit", "x.md"])
def test_a_path_that_is_no_config_is_answered_with_one_that_is(path, monkeypatch):
    monkeypatch.chdir(ROOT)
    with pytest.raises(ConfigError, match=f"--config is '{path}'.*type --config=configs/") as error:
        config_file.load(path)
    config_file.load(str(error.value).partition("type --config=")[2])


@pytest.mark.parametrize("typed", ["phases_digits", "configs/phases_digits.py"])
def test_a_shipped_config_is_found_from_any_folder(typed, tmp_path, monkeypatch):
    monkeypatch.chdir(ROOT)
    expected = config_file.load("configs/phases_digits.py")
    monkeypatch.chdir(tmp_path)
    assert config_file.load(typed) == expected
    # A folder of this name, such as a workdir, is not meant; a file in the current folder is.
    (tmp_path / "phases_digits").mkdir()
    assert config_file.load(typed) == expected
    (tmp_path / "configs").mkdir()
    (tmp_path / "configs" / "phases_digits.py").write_text(f"{CONFIG}    return 0\n")
    with pytest.raises(ConfigError, match="get_config.. returns a int"):
        config_file.load("configs/phases_digits.py")


def test_every_shipped_config_is_named_and_loads():
    shipped = config_file.shipped()
    assert shipped == sorted(f"configs/{p.name}" for p in (ROOT / "configs").glob("[a-z]*.py"))
    assert all(config_file.load(path) for path in shipped)


def test_a_config_file_imports_its_neighbours_in_configs_and_else_the_shipped(
    tmp_path, monkeypatch
):
    monkeypatch.setattr("sys.path", [p for p in sys.path if p not in ("", str(ROOT))])
    (tmp_path / "configs").mkdir()
    text = "from configs import pretrain_digits\nget_config = pretrain_digits.get_config\n"
    for folder in (tmp_path, tmp_path / "configs"):
        (folder / "mine.py").write_text(text)
    neighbour = f"{CONFIG}    c = default_config()\n    c.seed = 7\n    return c\n"
    monkeypatch.setitem(sys.modules, "configs", before := types.ModuleType("configs"))
    for folder, seed in ((tmp_path, 0), (tmp_path / "configs", 0)):
        assert config_file.load(str(folder / "mine.py")).seed == seed
    for folder in (tmp_path, tmp_path / "configs"):
        (folder / "pretrain_digits.py").write_text(neighbour)
    for folder, seed in ((tmp_path, 0), (tmp_path / "configs", 7)):
        assert config_file.load(str(folder / "mine.py")).seed == seed
    assert sys.modules["configs"] is before


def test_maskdm_answers_a_wrong_command_with_the_nearest(capsys):
    assert __main__.main(["trian", "--config=x"]) == 2
    said = capsys.readouterr().err
    assert said.startswith("error: 'trian' is not a command of maskdm; expected one of train, ")
    assert said.endswith("; type maskdm train\n")
    assert __main__.main([]) == 2
    assert capsys.readouterr().err.endswith("type maskdm --help\n")


def test_the_help_of_maskdm_lists_every_command_and_ends_with_0(capsys):
    assert __main__.main(["--help"]) == 0
    text = capsys.readouterr().out
    for name in [*__main__.MODES, *__main__._PROGRAMS]:
        assert f"\nmaskdm {name} " in text, name


@pytest.mark.parametrize("name", ["prepare", "report", "digest"])
def test_maskdm_passes_its_arguments_to_the_program(name, capsys, monkeypatch):
    monkeypatch.setattr("sys.argv", ["maskdm"])
    handler = signal.getsignal(signal.SIGINT)
    try:
        assert __main__.main([name, "--widht=3"]) == 2
    finally:
        signal.signal(signal.SIGINT, handler)
    assert "--widht is not a flag" in capsys.readouterr().err
