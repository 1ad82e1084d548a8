"""The README's ten lines run as they stand (with fewer images, so that it takes seconds)."""

import re
from pathlib import Path

import torch

import planish

README = Path(__file__).parent.parent / "README.md"


def test_the_ten_lines(monkeypatch, capsys, tmp_path):
    torch.set_num_threads(1)
    (block,) = re.findall(r"```python\n(.*?)```", README.read_text(encoding="utf-8"), re.DOTALL)
    lines = [line for line in block.splitlines() if line.strip()]
    assert len(lines) <= 12
    assert "epochs=6" in block
    load = planish.load_data

    def fewer(*args, **kwargs):
        data = load(*args, **kwargs)
        some = list(range(1280))
        data.train, data.train_labels = torch.utils.data.Subset(data.train, some), data.train_labels[:1280]
        data.test = torch.utils.data.Subset(data.test, list(range(500)))
        return data

    monkeypatch.setattr(planish, "load_data", fewer, raising=False)
    monkeypatch.chdir(tmp_path)  # it writes files
    exec(compile(block.replace("epochs=6", "epochs=1"), str(README), "exec"), {})
    shown = capsys.readouterr().out
    assert "conv1.3.weight" in shown
    assert "w3a3" in shown
    assert "top1" in shown
    assert (tmp_path / "model.safetensors").stat().st_size < (tmp_path / "model.onnx").stat().st_size < 400_000
    assert float(re.search(r"'top1': ([0-9.]+)", shown)[1]) > 0.6


def test_every_command_of_the_readme_parses():
    import shlex

    from planish.cli.main import _parse

    text = README.read_text(encoding="utf-8")
    commands = re.findall(
        r"^(planish (?:run|flatten|quantize|evaluate|diagnose|compare|methods)\b.*?)(?:  .*)?$", text, re.MULTILINE
    )
    assert len(commands) >= 6
    for command in commands:
        assert type(_parse(shlex.split(command)[1:])).__name__.lower() == command.split()[1]
