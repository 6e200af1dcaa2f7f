"""The long proofs, run by `make soak`; each leaves its table under docs/."""

from __future__ import annotations

import os
import random
import signal
import subprocess
import sys
import textwrap
import time
from pathlib import Path
from typing import Any

import pytest

from tests.killing import runs
from tests.test_factory import OVERRIDES, contents

pytestmark = pytest.mark.soak
REPO = Path(__file__).parent.parent


def write_table(name: str, title: str, header: list[str], rows: list[list[object]], note: str = "") -> None:
    """Write docs/<name>.md: the table of one proof, below a `note` on how to read it."""
    above = ["Made by `make soak`.", "", *([note, ""] if note else [])]
    lines = [f"# {title}", "", *above, f"| {' | '.join(header)} |", "|" + "---|" * len(header)]
    lines += [f"| {' | '.join(str(cell) for cell in row)} |" for row in rows]
    (REPO / "docs" / f"{name}.md").write_text("\n".join(lines) + "\n")


_DRIVER = """
    import os, signal, sys
    from pathlib import Path
    from factory import pipeline
    from factory.__main__ import main
    from factory.committer import Committer
    from tests.killing import noted_tasks

    def die():
        os.kill(os.getpid(), signal.SIGKILL)

    commit, count = Committer._commit, 0

    def counted(self, operation, units):
        global count
        count += 1
        kind = "append" if units else "update"
        print(f"commit {count} {kind} {self._name}", flush=True)
        if (sys.argv[1], sys.argv[2]) == (str(count), "before"):
            die()
        commit(self, operation, units)
        if (sys.argv[1], sys.argv[2]) == (str(count), "after"):
            die()

    Committer._commit = counted
    pipeline.tasks = noted_tasks(Path(sys.argv[3]))
    sys.exit(main(sys.argv[4:]))
"""


def _drive(
    ray_address: str, films: Path, root: Path, at: str, where: str, kill_after: float | None = None
) -> tuple[int, str]:
    sets = [part for override in [*OVERRIDES, "commit_every=1"] for part in ("--set", override)]
    notes, build = root.with_name(f"{root.name}-runs"), ("build", str(films), "--root", str(root))
    notes.mkdir(exist_ok=True)
    driver = subprocess.Popen(
        [sys.executable, "-c", textwrap.dedent(_DRIVER), at, where, str(notes), *build, *sets],
        cwd=REPO,
        env={**os.environ, "RAY_ADDRESS": ray_address},
        stdout=subprocess.PIPE,
        text=True,
    )
    try:
        output, _ = driver.communicate(timeout=kill_after)
    except subprocess.TimeoutExpired:
        driver.kill()
        output, _ = driver.communicate()
    return driver.returncode, output or ""


def test_kill_matrix_of_the_driver(ray_session: str, films: Path, small_dataset: Path, tmp_path: Path) -> None:
    """SIGKILL before and after each commit of a build, and at seeded random times; then the same command again."""
    started = time.monotonic()
    code, output = _drive(ray_session, films, tmp_path / "whole", "never", "never")
    seconds = time.monotonic() - started
    assert code == 0
    commits = [line.split()[1:] for line in output.splitlines() if line.startswith("commit ")]
    assert len(commits) >= 6
    expected = contents(small_dataset)
    assert contents(tmp_path / "whole") == expected
    rng = random.Random(0)
    cases = [
        (number, f"{where} commit {number}, {kind} {table}", where)
        for number, kind, table in commits
        for where in ("before", "after")
    ]
    timed = [(f"after {delay:.1f} s", delay) for delay in (rng.uniform(2, seconds) for _ in range(8))]
    rows: list[list[object]] = []
    plans = [(name, number, where, None) for number, name, where in cases]
    plans += [(name, "never", "never", delay) for name, delay in timed]
    for index, (name, number, where, delay) in enumerate(plans):
        root = tmp_path / f"case{index}"
        code, _ = _drive(ray_session, films, root, number, where, kill_after=delay)
        assert delay or code == -signal.SIGKILL, name
        said = _again(ray_session, films, root, expected)
        ran = runs(tmp_path / f"case{index}-runs")
        first = "killed" if code == -signal.SIGKILL else f"ended {code}"
        rows.append([name, first, len(ran) - len(set(ran)), said])
    title = "Kill matrix: SIGKILL of the driver, then the same command again"
    write_table("kill-matrix", title, ["when", "first run", "units run again", "tables after the second run"], rows)
    assert {row[3] for row in rows} == {"equal to the undisturbed run's"}
    # What the ledger holds is not run again: at most the units in hand are, and one update that was not committed.
    appends = {name for number, name, where, _ in plans if name.split(", ")[-1].startswith("append")}
    assert all(row[2] <= (1 if row[0] in appends else 2) for row in rows)


def _again(ray_address: str, films: Path, root: Path, expected: dict) -> str:
    deadline = time.monotonic() + 60
    while True:  # the killed driver's tasks may hold the root's files for a moment, never its lock
        code, output = _drive(ray_address, films, root, "never", "never")
        if code == 0:
            return "equal to the undisturbed run's" if contents(root) == expected else "DIFFERENT"
        if time.monotonic() > deadline:
            return f"exit code {code}: {output[-200:]}"


def full_size_losses(
    adapter: Any, unet: Any, features: tuple[int, ...], *, steps: int, learning_rate: float
) -> list[float]:
    """The losses of optimizer steps on one random batch of one, with latents of 16x16; `features` is a shape."""
    import torch

    from trainer.loss import noise_loss

    optimizer = torch.optim.AdamW(adapter.parameters(), lr=learning_rate, weight_decay=0.01)
    inputs = torch.randn(1, 4, 16, 16), torch.tensor([500]), torch.randn(1, 77, 768), torch.randn(features)
    noise, losses = torch.randn(1, 4, 16, 16), []
    for _ in range(steps):
        loss = noise_loss(adapter(unet, *inputs), noise)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    return losses


def test_a_full_size_step(tmp_path: Path) -> None:
    """Optimise the full-size adapter on a full-size, random-weight UNet (fp32, batch 1, 16x16 latents)."""
    import torch
    from diffusers import UNet2DConditionModel

    from trainer.adapter import Adapter, AdapterConfig

    torch.manual_seed(0)
    unet = UNet2DConditionModel(
        sample_size=64, cross_attention_dim=768, block_out_channels=(320, 640, 1280, 1280), attention_head_dim=8
    ).requires_grad_(False)
    adapter = Adapter.for_unet(unet, AdapterConfig(cross_attention_dim=768, embedding_dim=1280, dim=768))
    adapter.attach(unet)
    counted = [sum(p.numel() for p in module.parameters()) for module in (adapter, unet)]
    counted[1] -= sum(p.numel() for p in adapter.ip_adapter.parameters())  # attached: counted with the UNet too
    assert counted == [49_087_488, 859_520_964]
    start = time.monotonic()
    losses = full_size_losses(adapter, unet, (1, 257, 1280), steps=3, learning_rate=1e-5)
    seconds = (time.monotonic() - start) / 3
    assert losses[0] > losses[1] > losses[2]
    assert all(p.grad is None for name, p in unet.named_parameters() if "_ip" not in name)
    adapter.save_pretrained(tmp_path / "adapter")
    rows = [["adapter parameters", counted[0]], ["UNet parameters", counted[1]], ["seconds per step", f"{seconds:.1f}"]]
    rows += [[f"loss, step {i}", f"{loss:.4f}"] for i, loss in enumerate(losses, start=1)]
    write_table("full-size-step", "A full-size step: SD v1.5's UNet with random weights, on CPU", ["", ""], rows)
