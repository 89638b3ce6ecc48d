"""The pages: each command in them is one that its program accepts, and each link leads somewhere.

A fenced block after the comment <!-- run --> is run as it stands, in a folder of its own, on small
images with a small network. Every other command is read by the real parser of its program, its
config is loaded and checked, and then it stops. Fields and commands in the text are checked too.
"""

import ast
import importlib
import os
import pathlib
import re
import shlex
import shutil
import subprocess
import sys
import unittest.mock
import zipfile
from typing import NamedTuple

import numpy as np
import pytest
from conftest import ROOT

from maskdm_jax import __main__ as maskdm
from maskdm_jax import config_file, images, main
from maskdm_jax.config import FIELDS, default_config
from maskdm_jax.run import command_line

PAGES = [ROOT / "README.md", ROOT / "CONTRIBUTING.md", *sorted((ROOT / "docs").glob("*.md"))]
# Programs of others: only their names are known here.
OTHERS = {"cd", "gcloud", "gcsfuse", "git", "kubectl", "tensorboard", "tfds", "wandb"}

_FENCE = re.compile(
    r"(?P<run><!-- run -->\n)?^```(?P<language>\w*)\n(?P<text>.*?)^```$", re.M | re.S
)
_GROUPS = {name.partition(".")[0] for name in FIELDS if "." in name}


class Block(NamedTuple):
    """A fenced block of a page."""

    page: str
    line: int
    language: str
    text: str
    run: bool


def blocks(page: pathlib.Path) -> list[Block]:
    text = page.read_text()
    return [
        Block(
            page.name,
            text.count("\n", 0, found.start("language")) + 1,
            found["language"],
            found["text"],
            found["run"] is not None,
        )
        for found in _FENCE.finditer(text)
    ]


def prose(page: pathlib.Path) -> str:
    return _FENCE.sub("", page.read_text())


def spans(page: pathlib.Path) -> list[str]:
    """What stands in `backticks` in the text of a page."""
    return [" ".join(span.split()) for span in re.findall(r"`([^`]+)`", prose(page))]


BLOCKS = [block for page in PAGES for block in blocks(page)]


def commands(text: str) -> list[list[str]]:
    """The words of each command of a shell script; the variables that it sets are filled in."""
    variables, found = {"JOB_COMPLETION_INDEX": "0"}, []  # this one is set by Kubernetes
    for line in text.replace("\\\n", " ").splitlines():
        for name, value in variables.items():
            line = re.sub(rf"\${name}\b", lambda _, value=value: value, line)
        words = shlex.split(line, comments=True)
        assigned = {}
        while words and re.match(r"[A-Z_]+=", words[0]):
            name, _, value = words.pop(0).partition("=")
            assigned[name] = value
        if words:
            found.append(words)
        else:
            variables |= assigned
    return found


class Accepted(BaseException):
    """Ends a program once its command line is read."""


@pytest.fixture
def accept(monkeypatch):
    """Checks a command without running it."""
    parse = command_line.Parser.parse

    def stop(self, argv=None):
        raise Accepted(parse(self, argv))

    monkeypatch.chdir(ROOT)
    monkeypatch.setattr(command_line.Parser, "parse", stop)
    monkeypatch.setattr(sys, "path", list(sys.path))

    def read(program, arguments):
        monkeypatch.setattr(sys, "argv", ["program", *arguments])
        with unittest.mock.patch.dict(os.environ), pytest.raises(Accepted) as accepted:
            program()
        values = accepted.value.args[0]
        if "config" in values:
            config_file.load(values.config, values.changes)
        else:
            for change in values.changes:
                config_file.set_field(default_config(), change)

    def check(words):
        name, *rest = words
        name = name.removeprefix(".venv/bin/")
        if rest[-1:] == ["--help"] or rest[:2] == ["-m", "pytest"]:
            pass
        elif name == "python" and rest[0] == "-m":
            package = rest[1] + ".__main__" * (ROOT / rest[1].replace(".", "/")).is_dir()
            read(lambda: importlib.import_module(package).main(), rest[2:])
        elif name == "python" and rest[0].endswith("main.py"):
            read(main.main, rest[1:])
        elif name == "python":
            module = rest[0].removesuffix(".py").replace("/", ".")
            read(lambda: importlib.import_module(module).main(), rest[1:])
        elif name == "maskdm" and rest[0] in main.MODES:
            read(lambda: main.main(rest[0]), rest[1:])
        elif name == "maskdm":
            module, first = maskdm._PROGRAMS[rest[0]]
            check(["python", "-m", module.removesuffix(".__main__"), *first, *rest[1:]])
        elif name == "sbatch":
            read(main.main, rest[rest.index("launch/slurm.sbatch") + 1 :])
        elif name == "launch/keep_running.sh":
            check([word for word in rest if not word.startswith("--restarts=")])
        elif name.startswith("launch/"):
            at = rest.index("--") if "--" in rest else len(rest)
            done = subprocess.run(
                [name, *rest[:at], "--dry-run", *rest[at:]],
                env={**os.environ, "PYTHON": "python"},
                capture_output=True,
                text=True,
            )
            assert done.returncode == 0, done.stderr
            for line in done.stdout.splitlines():
                if line.startswith(f"{ROOT}/launch/keep_running.sh"):
                    check(["launch/keep_running.sh", *shlex.split(line)[1:]])
            if name.endswith("tpu_pod.sh") and at < len(rest):
                read(main.main, rest[at + 1 :])
        elif name == "make":
            targets = re.findall(r"^([\w-]+):", (ROOT / "Makefile").read_text(), re.M)
            assert {word for word in rest if "=" not in word} <= set(targets)
        elif name == "pip":
            setup = (ROOT / "setup.py").read_text()
            for extra in re.findall(r"(?:\.|maskdm_jax)\[([\w,-]+)\]", " ".join(rest)):
                assert all(f'"{each}": [' in setup for each in extra.split(",")), extra
        else:
            assert name in OTHERS, f"no rule for {name}: {shlex.join(words)}"
        files = [
            word for word in rest if re.fullmatch(r"(configs|launch|studies|tests)/[\w/.]+", word)
        ]
        assert all((ROOT / file).exists() for file in files)

    return check


@pytest.mark.parametrize("block", BLOCKS, ids=lambda block: f"{block.page}:{block.line}")
def test_each_command_is_one_that_its_program_accepts(block, accept):
    if block.language == "sh":
        of_page = [each for each in BLOCKS if (each.page, each.language) == (block.page, "sh")]
        before = "".join(each.text for each in of_page if each.line < block.line)
        for words in commands(before + block.text)[len(commands(before)) :]:
            accept(words)
    elif block.language == "python":
        for node in ast.walk(ast.parse(block.text)):
            if isinstance(node, ast.ImportFrom) and node.module.startswith("maskdm_jax"):
                module = importlib.import_module(node.module)
                for alias in node.names:
                    if not hasattr(module, alias.name):
                        importlib.import_module(f"{node.module}.{alias.name}")
    else:
        assert block.language == "" and not block.run


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_commands_and_fields_in_the_text_exist(page, accept):
    for span in spans(page):
        if re.match(r"(make|pip install) \w|(python|maskdm|launch/\S+\.sh) .*--", span):
            accept(shlex.split(span))
        for name, value in re.findall(
            r"""--config\.([\w.]+)(?:=("[^"]*"|'[^']*'|[^\s"]+))?""", span
        ):
            if name == "FIELD":
                continue
            assert name in FIELDS, span
            if value and not re.search(r"\.\.\.|\b[A-Z]{1,}\b(?!')", value):
                config_file.set_field(default_config(), f"{name}={shlex.split(value)[0]}")
        group, _, leaf = span.partition("=")[0].partition(".")
        if group in _GROUPS and re.fullmatch(r"[a-z]\w*", leaf):
            is_module = (ROOT / "maskdm_jax" / group / f"{leaf}.py").exists() or leaf == "py"
            assert is_module or f"{group}.{leaf}" in FIELDS, span


def anchors(page: pathlib.Path) -> set[str]:
    """The anchors of a page's headings, as GitHub makes them."""
    headings = re.findall(r"^#+ (.+)$", prose(page), re.M)
    plain = [re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-") for heading in headings]
    return {
        name + f"-{plain[:i].count(name)}" * (name in plain[:i]) for i, name in enumerate(plain)
    }


@pytest.mark.parametrize(
    "page", [*PAGES, ROOT / "benchmarks" / "RESULTS.md"], ids=lambda page: page.name
)
def test_each_link_leads_to_a_file_and_a_heading(page):
    text = re.sub(r"`[^`]*`", "", prose(page))
    links = re.findall(r"\]\(([^)]+)\)", text) + re.findall(r"^\[[^\]]+\]: (\S+)$", text, re.M)
    labels = set(re.findall(r"\]\[([^\]]+)\]", text))
    assert labels == set(re.findall(r"^\[([^\]]+)\]: \S+$", text, re.M))
    for link in links:
        if link.startswith("http"):
            continue
        path, _, anchor = link.partition("#")
        target = page.parent / path if path else page
        assert target.exists(), link
        assert not anchor or anchor in anchors(target), link


def test_the_readme_links_every_page():
    linked = set(re.findall(r"\]\(docs/(\w+\.md)\)", (ROOT / "README.md").read_text()))
    assert linked == {page.name for page in (ROOT / "docs").glob("*.md")}


def test_the_tree_of_the_code_names_every_file():
    (tree,) = (b.text for b in BLOCKS if b.page == "code.md")
    listed = re.findall(r"\b[\w.]+\.(?:py|sh|sbatch|yaml|ipynb)\b", tree)
    folders = ("maskdm_jax", "configs", "launch", "benchmarks", "notebooks", "studies")
    files = [path for folder in folders for path in (ROOT / folder).rglob("*.*")]
    names = {p.name for p in files if p.suffix in (".py", ".sh", ".sbatch", ".yaml", ".ipynb")}
    assert names == {*listed, "__init__.py"}


# Appended to the commands that are run. Such images, such a network: a few seconds each.
SMALL = {
    "data.image_size": "(32, 32)", "data.crop": "center", "model.width": 32, "model.depth": 3,
    "model.num_heads": 2, "model.dtype": "float32", "optim.warmup_steps": 1,
    "train.batch_size": 8, "train.log_every_steps": 1,
    "train.sample_every_steps": 0, "sample.num": 4, "sample.steps": 2, "sample.batch_size": 4,
    "eval.num": 4, "eval.metrics": "swd", "eval.ema_stds": "",
}  # fmt: skip
FLAGS = [f"--config.{name}={value}" for name, value in SMALL.items()]
PYTHON = f"""#!/bin/bash
case $1 in
  main.py) set -- "$@" --config.train.num_steps=$STEPS {shlex.join(FLAGS)} ;;
  -m) [[ $2 != maskdm_jax.quality.score ]] || set -- "$@" --metrics swd ;;
esac
exec {sys.executable} "$@"
"""


def run(page: pathlib.Path, folder: pathlib.Path, steps: int) -> None:
    """Runs the marked blocks of shell of a page, from top to bottom; training ends at `steps`."""
    env = {
        **os.environ,
        "STEPS": str(steps),
        "HOME": str(folder / "home"),
        "PATH": f"{folder / 'bin'}:{os.environ['PATH']}",
        "PYTHONPATH": str(ROOT),
        "XLA_FLAGS": os.environ["TEST_XLA_FLAGS"],
    }
    for block in blocks(page):
        if block.run and block.language == "sh":
            done = subprocess.run(
                ["bash", "-euo", "pipefail", "-c", block.text],
                cwd=folder, env=env, capture_output=True, text=True,
            )  # fmt: skip
            assert done.returncode == 0, f"{page.name}:{block.line}\n{done.stdout}{done.stderr}"


@pytest.fixture(scope="module")
def workplace(tmp_path_factory):
    """A folder with photos in ~/photos, and after the commands of the README with W1 and W2."""
    folder = tmp_path_factory.mktemp("docs")
    (folder / "bin").mkdir()
    for name, text in {"python": PYTHON, "pip": "#!/bin/sh\n"}.items():
        (folder / "bin" / name).write_text(text)
        (folder / "bin" / name).chmod(0o755)
    for name in ("main.py", "configs"):
        (folder / name).symlink_to(ROOT / name)
    pixels = np.random.default_rng(0).integers(0, 256, (16, 40, 36, 3), np.uint8)
    photos = folder / "home" / "photos"
    photos.mkdir(parents=True)
    with zipfile.ZipFile(folder / "faces.zip", "w") as faces:
        for i, image in enumerate(pixels):
            images.save_png(photos / f"{i}.png", image)
            images.save_png(folder / "face.png", image[:32, :32])
            faces.write(folder / "face.png", f"train/{i}.png")
    run(ROOT / "README.md", folder, steps=2)
    return folder


def test_the_commands_of_the_readme_run(workplace):
    assert len(list(workplace.glob("W2/samples/step2_ema*/00000?.png"))) == 4


@pytest.mark.slow
@pytest.mark.parametrize(
    "page",
    [p for p in PAGES[1:] if any(block.run and block.language == "sh" for block in blocks(p))],
    ids=lambda page: page.name,
)
def test_the_commands_of_a_page_run(page, workplace, tmp_path):
    folder = tmp_path / "folder"
    shutil.copytree(workplace, folder, symlinks=True)
    (drawn,) = folder.glob("W2/samples/*")
    (drawn.parent / "FOLDER").symlink_to(drawn)
    run(page, folder, steps=3)


def test_the_python_of_the_api_page_runs(workplace, monkeypatch):
    monkeypatch.chdir(workplace)
    noise = np.random.default_rng(0).normal(size=(2, 32, 32, 3)).astype(np.float32)
    names = {"numpy": np, "x0": noise.clip(-1, 1), "eps": noise, "x_t": noise, "t": 400}
    for block in blocks(ROOT / "docs" / "api.md"):
        if block.run and block.language == "python":
            few = block.text.replace("2000,", "8,").replace("features=768", "metrics=('swd',)")
            exec(compile(few, f"api.md:{block.line}", "exec"), names)
