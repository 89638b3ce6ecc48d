import json

import numpy as np
import pytest

from configs import finetune_digits, pretrain_digits
from maskdm_jax import config as config_lib
from maskdm_jax import images, report
from maskdm_jax.errors import ConfigError


def fake_run(workdir, config, losses):
    workdir.mkdir()
    (workdir / "config.json").write_text(config_lib.to_json(config))
    records = [
        {"step": 10 * i, "loss": loss, "images_per_s": 100.0} for i, loss in enumerate(losses, 1)
    ]
    (workdir / "metrics.jsonl").write_text("".join(json.dumps(r) + "\n" for r in records))


def test_the_report_has_both_stages_and_pictures(tmp_path):
    first, second = tmp_path / "w1", tmp_path / "w2"
    fake_run(first, pretrain_digits.get_config(), [1.0, 0.5, 0.3])
    fake_run(second, finetune_digits.get_config(), [0.4, 0.3, 0.2])
    with pytest.raises(ConfigError, match="holds no samples"):
        report.write_report(first, second, tmp_path / "out")
    folder = second / "samples" / "step30_ema"
    folder.mkdir(parents=True)
    for name in ("000000.png", "000001.png", "grid.png"):
        images.save_png(folder / name, np.zeros((4, 4, 1), np.uint8))
    (folder / "settings.json").write_text('{"step": 30, "weights": "ema"}')
    path = report.write_report(first, second, tmp_path / "out")
    text = path.read_text()
    assert "| masked pre-training | 10 |" in text and "| 30 | 100 | 0.6000 |" in text
    assert "2 images, drawn" in text
    for picture in ("samples.png", "loss.png"):
        assert picture in text and (path.parent / picture).stat().st_size > 0


def test_a_folder_that_is_not_a_run_is_named(tmp_path, capsys):
    flags = [f"--pretrain={tmp_path}", f"--finetune={tmp_path}", f"--out={tmp_path}"]
    assert report.main(flags) == 2
    assert "holds no metrics.jsonl" in capsys.readouterr().err
