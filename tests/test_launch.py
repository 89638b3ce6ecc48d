"""launch/: what the scripts would run, and when they run it again. No cluster is needed."""

import os
import pathlib
import re
import shlex
import signal
import stat
import subprocess
import sys
import tarfile
import time

import pytest
import yaml

ROOT = pathlib.Path(__file__).parents[1]
POD = ["launch/tpu_pod.sh"]
NAMED = ["--name=maskdm", "--zone=us-west4-a"]
HOST = [
    "launch/gpu_host.sh", "--pretrain=configs/pretrain_celeba64.py:paper",
    "--finetune=configs/finetune_celeba64.py:paper",
]  # fmt: skip
AWKWARD = "--config.data.image_size=(128, 128)"  # needs quotes in every shell


def run(command, **env):
    return subprocess.run(
        command, cwd=ROOT, env={**os.environ, **env}, capture_output=True, text=True, timeout=60
    )


def dry_run(command, **env):
    """The commands that a script prints, each as its list of arguments."""
    result = run([command[0], command[1], "--dry-run", *command[2:]], **env)
    assert result.returncode == 0, result.stderr
    return [shlex.split(line) for line in result.stdout.splitlines()]


def stub(folder, name, script):
    """Writes a program of that name; returns a PATH in which it comes first."""
    folder.mkdir(exist_ok=True)
    (folder / name).write_text(f"#!/usr/bin/env bash\n{script}\n")
    (folder / name).chmod(stat.S_IRWXU)
    return f"{folder}{os.pathsep}{os.environ['PATH']}"


def test_shell_scripts_pass_shellcheck():
    shellcheck = pathlib.Path(sys.executable).parent / "shellcheck"
    result = run([shellcheck, *ROOT.glob("launch/*.sh"), ROOT / "launch" / "slurm.sbatch"])
    assert result.returncode == 0, result.stdout


def test_a_gpu_host_trains_both_stages_and_draws(tmp_path):
    commands = dry_run([*HOST, f"--workdir={tmp_path}", "--", AWKWARD], PYTHON="/usr/bin/python3")
    start = [f"{ROOT}/launch/keep_running.sh", "/usr/bin/python3", f"{ROOT}/main.py"]
    finetune = [*start, HOST[2].replace("finetune=", "config="), f"--workdir={tmp_path}/finetune"]
    assert commands == [
        [
            *start,
            HOST[1].replace("pretrain=", "config="),
            f"--workdir={tmp_path}/pretrain",
            AWKWARD,
        ],
        [*finetune, f"--config.init.path={tmp_path}/pretrain", AWKWARD],
        [*finetune, "--mode=sample", AWKWARD],
    ]


def test_a_gpu_host_takes_a_bucket_and_no_folder_of_that_name():
    commands = dry_run([*HOST, "--workdir=gs://b/runs"], PYTHON="python")
    assert [command[4] for command in commands] == [
        "--workdir=gs://b/runs/pretrain", *["--workdir=gs://b/runs/finetune"] * 2
    ]  # fmt: skip
    assert commands[1][5] == "--config.init.path=gs://b/runs/pretrain"


def test_paths_are_those_of_the_folder_in_which_a_script_is_started(tmp_path):
    (tmp_path / "own.py").write_text("")
    path = stub(tmp_path / "bin", "python", 'printf "%s\\n" "$@"')
    shown = dict(cwd=tmp_path, capture_output=True, text=True, check=True)
    host = [ROOT / HOST[0], "--pretrain", "own.py:x", "--finetune", "cifar10:finetune"]
    host += ["--workdir", "my runs", "--dry-run"]
    # main.py resolves them, since gpu_host.sh stays in the folder.
    for python in ("bin/python", "python"):
        env = {**os.environ, "PATH": path, "PYTHON": python}
        first, second, _ = subprocess.run(host, env=env, **shown).stdout.splitlines()
        assert shlex.split(first)[1:] == [
            python, f"{ROOT}/main.py", "--config=own.py:x", f"--workdir={tmp_path}/my runs/pretrain"
        ]  # fmt: skip
        assert "--config=cifar10:finetune" in shlex.split(second)
    env = {**os.environ, "PATH": path}
    demo = subprocess.run([ROOT / "launch/demo.sh", "out"], env=env, **shown).stdout.splitlines()
    assert {f"--workdir={tmp_path}/out/pretrain", f"--out={tmp_path}/out/report.html"} <= {*demo}


def test_a_gpu_host_installs_only_if_no_interpreter_is_given(tmp_path, monkeypatch):
    monkeypatch.delenv("PYTHON", raising=False)
    # A checkout without .venv.
    for name in ("launch", "configs"):
        (tmp_path / name).symlink_to(ROOT / name)
    result = run([f"{tmp_path}/{HOST[0]}", "--dry-run", *HOST[1:], "--workdir=w"])
    commands = [shlex.split(line) for line in result.stdout.splitlines()]
    python = f"{tmp_path}/.venv/bin/python"
    assert commands[:2] == [
        ["python3", "-m", "venv", f"{tmp_path}/.venv"],
        [*f"{python} -m pip install --quiet -c {tmp_path}/constraints.txt -e".split(),
         f"{tmp_path}[gpu]"],
    ]  # fmt: skip
    assert [c[:3] for c in commands[3:]] == [
        [f"{tmp_path}/launch/keep_running.sh", python, f"{tmp_path}/main.py"]
    ] * 3


def test_a_pod_is_created_filled_started_followed_and_deleted():
    gcloud = ["gcloud", "compute", "tpus"]
    ssh = [*gcloud, "tpu-vm", "ssh", "maskdm", "--zone=us-west4-a"]
    create = [*POD, "create", *NAMED, "--type=v5litepod-16", "--spot", "--project=p"]
    assert dry_run(create) == [[
        *gcloud, "tpu-vm", "create", *_named("--project=p"), "--accelerator-type=v5litepod-16",
        "--version=v2-alpha-tpuv5-lite", "--spot",
    ]]  # fmt: skip
    assert dry_run([*POD, "create", *NAMED, "--type=v5p-128", "--queued"]) == [[
        *gcloud, "queued-resources", "create", "maskdm", "--node-id=maskdm", "--zone=us-west4-a",
        "--accelerator-type=v5p-128", "--runtime-version=v2-alpha-tpuv5",
    ]]  # fmt: skip

    tar, scp, install = dry_run([*POD, "install", *NAMED])
    assert tar[0] == "tar" and f"--directory={ROOT}" in tar
    archive = tar[3].removeprefix("--file=")
    assert scp == [
        *gcloud, "tpu-vm", "scp", archive, "maskdm:maskdm_jax.tar.gz", "--zone=us-west4-a",
        "--worker=all",
    ]  # fmt: skip
    assert install[:-1] == [*ssh, "--worker=all"]
    remote = shlex.split(install[-1].removeprefix("--command="))
    assert not any("nfs" in word or "/mnt" in word for word in remote) and remote[-1] == ".[tpu]"

    (start,) = dry_run([
        *POD, "start", *NAMED, "--", "--config=configs/pretrain_celebahq.py", "--workdir=gs://b/W1",
        AWKWARD,
    ])  # fmt: skip
    assert start[:-1] == [*ssh, "--worker=all"]
    remote = shlex.split(start[-1].removeprefix("--command="))
    at = remote.index("main.py")
    assert remote[at - 3 : at] == ["launch/keep_running.sh", "--restarts=10", ".venv/bin/python"]
    assert remote[at + 2 : at + 5] == ["--workdir=gs://b/W1", AWKWARD, ">"]

    (logs,) = dry_run([*POD, "logs", *NAMED])
    assert logs[:-1] == [*ssh, "--worker=0"] and "tail" in logs[-1]
    (stop,) = dry_run([*POD, "stop", *NAMED])
    assert stop == [*ssh, "--worker=all", "--command=xargs kill < ~/maskdm.pid"]
    assert dry_run([*POD, "delete", *NAMED]) == [
        [*gcloud, "tpu-vm", "delete", *_named(), "--quiet"]
    ]
    assert dry_run([*POD, "delete", *NAMED, "--queued"]) == [
        [*gcloud, "queued-resources", "delete", *_named(), "--force", "--quiet"]
    ]


def test_a_share_is_mounted_if_it_is_named():
    *_, install = dry_run([*POD, "install", *NAMED, "--nfs=10.0.0.2:/my share"])
    remote = shlex.split(install[-1].removeprefix("--command="))
    at = remote.index("10.0.0.2:/my share")
    assert remote[at - 4 : at] == ["sudo", "mount", "-t", "nfs"] and "nfs-common" in remote


def test_a_pod_gets_the_code_and_nothing_else_from_the_checkout(tmp_path):
    install = [*POD, "install", *NAMED]
    assert run(dry_run(install, TMPDIR=str(tmp_path))[0]).returncode == 0
    with tarfile.open(tmp_path / "maskdm_jax.tar.gz") as archive:
        names = set(archive.getnames())
    assert {"main.py", "configs/pretrain_digits.py", "launch/keep_running.sh"} <= names
    assert {name.split("/")[0] for name in names} == {
        "main.py", "maskdm_jax", "configs", "launch", "README.md", "setup.py", "pyproject.toml",
        "constraints.txt",
    }  # fmt: skip
    assert not any("__pycache__" in name for name in names)


def _named(*more):
    return ["maskdm", "--zone=us-west4-a", *more]


@pytest.mark.parametrize(
    "action, rest",
    [("install", []), ("install", ["--nfs=a:/b"]), ("start", ["--", "--config=c", "--workdir=w"])],
)
def test_what_a_pod_would_run_is_a_valid_shell_command(action, rest):
    remote = dry_run([*POD, action, *NAMED, *rest])[-1][-1].removeprefix("--command=")
    assert run(["bash", "-n", "-c", remote]).returncode == 0


@pytest.mark.parametrize(
    "command, expected",
    [
        (POD, "the action is ''"),
        ([*POD, "dance"], "the action is 'dance'"),
        ([*POD, "create", "--name=a"], "--name or --zone is missing"),
        ([*POD, "create", *NAMED], "--type is missing"),
        ([*POD, "create", "--name", "a", "--zone", "b", "--type", "h100"], "--type is 'h100'"),
        ([*POD, "create", *NAMED, "--type=h100"], "--type is 'h100'"),
        ([*POD, "install", *NAMED, "--nfs=share"], "--nfs is 'share'"),
        ([*POD, "start", *NAMED], "main.py's arguments are missing"),
        ([*POD, "logs", *NAMED, "--loud"], "unknown argument --loud"),
        (HOST, "--workdir is missing"),
        ([*HOST[:2], "--workdir=w"], "--finetune is ''"),
        ([HOST[0], "--pretrain=configs/no.py", "--workdir=w"], "--pretrain is 'configs/no.py'"),
        ([*HOST[:2], "--finetune=cifar", "--workdir=w"], "--finetune is 'cifar'"),
        ([*HOST, "--workdir"], "--workdir is missing"),
        ([*HOST, "--workdir", "--dry-run"], "--workdir has no value"),
        ([*POD, "create", "--name", *NAMED], "--name has no value"),
        ([*HOST, "--workdir=w", "--fast"], "unknown argument --fast"),
        (["launch/slurm.sbatch"], "expected a job with main.py's arguments"),
        (["launch/keep_running.sh"], "the command ''; expected"),
        (["launch/keep_running.sh", "--restarts=many", "true"], "--restarts is 'many'"),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_wrong_arguments_are_one_sentence_and_status_2(command, expected):
    result = run(["bash", *command])
    assert result.returncode == 2 and not result.stdout
    assert result.stderr.startswith("error: ") and result.stderr.count("\n") == 1
    assert expected in result.stderr


def test_a_pod_of_the_jobset_takes_the_code_from_the_bucket(bucket_dir, tmp_path):
    jobset = yaml.safe_load((ROOT / "launch" / "k8s_jobset.yaml").read_text())
    pod = jobset["spec"]["replicatedJobs"][0]["template"]["spec"]["template"]["spec"]
    (container,) = pod["containers"]
    (shell,) = container["args"]
    env = {variable["name"]: variable["value"] for variable in container["env"]}
    with tarfile.open(tmp_path / "code.tar.gz", "w:gz") as archive:
        archive.add(ROOT / "main.py", "main.py")
    code = (tmp_path / "code.tar.gz").read_bytes()
    (bucket_dir / "maskdm_jax.tar.gz").write_bytes(code)
    stub(tmp_path / "bin", "pip", "exit 0")
    path = stub(
        tmp_path / "bin", "python",
        f'[[ $1 == -c ]] && exec {sys.executable} "$@"; ls; printf "%s\\n" "$@"',
    )  # fmt: skip
    done = run(
        ["bash", "-c", shell.replace("/tmp/", f"{tmp_path}/")],
        **env | {"BUCKET": str(bucket_dir).removeprefix("gs://")},
        PATH=path,
        FSSPEC_GCS_TOKEN="anon",
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout.split() == [
        "code.tar.gz", "main.py", "main.py", "--config=configs/pretrain_celebahq.py",
        f"--workdir={bucket_dir}/W1", f"--config.data.dir={bucket_dir}/tfds",
        "--config.data.local_dir=/data",
    ]  # fmt: skip


# Ends with the next of the given statuses at each run, and then always with the last.
_COUNTED = 'read -r first rest < $1; echo "${rest:-$first}" > $1; echo ran; exit "$first"'


@pytest.mark.parametrize(
    "statuses, restarts, expected_runs, expected_status",
    [
        ("0", 3, 1, 0),
        ("75 75 0", 0, 3, 0),
        ("2", 3, 1, 2),
        ("1", 3, 1, 1),
        ("70", 0, 1, 70),
        ("134 75 137 0", 2, 4, 0),
        ("134", 2, 3, 134),
    ],
)
def test_a_command_is_run_again_if_that_can_help(
    tmp_path, statuses, restarts, expected_runs, expected_status
):
    (tmp_path / "statuses").write_text(statuses + "\n")
    command = ["bash", "-c", _COUNTED, "counted", str(tmp_path / "statuses")]
    keep = ["launch/keep_running.sh", f"--restarts={restarts}", *command]
    result = run(keep, RESTART_PAUSE_S="0")
    assert result.stdout.count("ran") == expected_runs
    assert result.returncode == expected_status


def test_a_signal_is_passed_on_and_nothing_is_run_again(tmp_path):
    saves = f"trap 'echo saved > {tmp_path}/saved; exit 75' TERM; touch {tmp_path}/up; "
    saves += "while true; do sleep 0.1; done"
    process = subprocess.Popen(["launch/keep_running.sh", "bash", "-c", saves], cwd=ROOT)
    deadline = time.time() + 30
    while not (tmp_path / "up").exists():
        assert time.time() < deadline
        time.sleep(0.02)
    process.send_signal(signal.SIGTERM)
    assert process.wait(timeout=30) == 75
    assert (tmp_path / "saved").read_text() == "saved\n"


def test_a_signal_in_the_pause_before_a_restart_prevents_it(tmp_path):
    keep = ["launch/keep_running.sh", "bash", "-c", f"echo ran >> {tmp_path}/runs; exit 75"]
    process = subprocess.Popen(
        keep, cwd=ROOT, env={**os.environ, "RESTART_PAUSE_S": "2"}, stderr=subprocess.PIPE
    )
    assert process.stderr.readline() == b"ended with status 75; starting again\n"
    process.send_signal(signal.SIGTERM)
    assert process.wait(timeout=30) == 75
    assert (tmp_path / "runs").read_text() == "ran\n"


@pytest.mark.parametrize(
    "status, restarted, requeued, expected",
    [
        (0, 0, False, 0),
        (1, 0, False, 1),
        (2, 0, False, 2),
        (75, 50, True, 0),
        (137, 9, True, 0),
        (137, 10, False, 137),
    ],
)
def test_a_slurm_job_queues_itself_again_if_useful(tmp_path, status, restarted, requeued, expected):
    stub(tmp_path, "scontrol", 'echo "scontrol $*"')
    path = stub(tmp_path, "srun", f'printf "%s\\n" "$@" $SLURM_EXIT_ERROR; exit {status}')
    result = run(
        ["bash", "launch/slurm.sbatch", "--config=configs/pretrain_digits.py", AWKWARD],
        PATH=path,
        PYTHON="python",
        SLURM_JOB_ID="17",
        SLURM_SUBMIT_DIR=str(ROOT),
        SLURM_RESTART_COUNT=str(restarted),
    )
    lines = result.stdout.splitlines()
    assert lines[1:5] == ["python", "main.py", "--config=configs/pretrain_digits.py", AWKWARD]
    assert lines[5] == "70"
    assert ("scontrol requeue 17" in lines) == requeued
    assert result.returncode == expected


def test_the_jobset_starts_one_process_on_each_host_of_the_slice():
    text = (ROOT / "launch" / "k8s_jobset.yaml").read_text()
    jobset = yaml.safe_load(text)
    assert jobset["kind"] == "JobSet" and jobset["spec"]["failurePolicy"]["maxRestarts"] > 0
    (slices,) = jobset["spec"]["replicatedJobs"]
    job = slices["template"]["spec"]
    pod = job["template"]["spec"]
    (container,) = pod["containers"]
    rows, columns = map(int, pod["nodeSelector"]["cloud.google.com/gke-tpu-topology"].split("x"))
    hosts = rows * columns // container["resources"]["limits"]["google.com/tpu"]
    assert job["parallelism"] == job["completions"] == hosts
    # A pod that ends restarts all pods, unless a person has to act.
    assert pod["restartPolicy"] == "Never" and job["backoffLimit"] == 0
    (rule,) = job["podFailurePolicy"]["rules"]
    assert rule["action"] == "FailJob" and rule["onExitCodes"]["values"] == [1, 2]
    assert rule["onExitCodes"]["containerName"] == container["name"]
    (mount,), (volume,) = container["volumeMounts"], pod["volumes"]
    assert mount["name"] == volume["name"] and "emptyDir" in volume
    (shell,) = container["args"]
    assert run(["bash", "-n", "-c", shell]).returncode == 0
    config = re.search(r'exec python main.py --config=(\S+) --workdir="gs://\$BUCKET/', shell)
    assert (ROOT / config.group(1)).exists()
    assert f"--config.data.local_dir={mount['mountPath']}" in shell
    assert "BUCKET" in {variable["name"] for variable in container["env"]}
