"""Two processes train one model, with its chains fused: the same as one process without."""

from __future__ import annotations

import os
import socket
import subprocess
import sys
from pathlib import Path

import pytest
import torch

PROGRAM = """
import os, sys
import torch
from torch import nn
from torch.nn.parallel import DistributedDataParallel
import fastconv
sys.path.insert(0, os.path.join({root!r}, "tests"))
from forwards import SumAfterShortcut

torch.set_num_threads(1)
rank = int(sys.argv[1])
if rank >= 0:
    torch.distributed.init_process_group("gloo", rank=rank, world_size=2)
model = SumAfterShortcut().double()
torch.manual_seed(1)
images = torch.randn(3, 2, 2, 4, 6, 5, dtype=torch.float64)  # steps, processes, batch
if rank >= 0:
    fastconv.optimize(model)
    assert type(model).__name__.startswith("Fused")
step_of = torch.optim.SGD(model.parameters(), 0.1, momentum=0.9)
trained = model if rank < 0 else DistributedDataParallel(model, find_unused_parameters=True)
for step in images:
    step_of.zero_grad()
    if rank < 0:  # normalised apart, as in two processes, and the first one's averages kept
        state = None
        for batch in step:
            (trained(batch).square().mean() / 2).backward()
            if state is None:
                state = {{k: b.clone() for k, b in model.named_buffers()}}
        for key, buffer in model.named_buffers():
            buffer.copy_(state[key])
    else:
        trained(step[rank]).square().mean().backward()
    step_of.step()
if rank <= 0:
    torch.save(dict(model.state_dict()), sys.argv[2])
if rank >= 0:
    torch.distributed.destroy_process_group()
"""


@pytest.mark.skipif(not torch.distributed.is_available(), reason="this PyTorch has no torch.distributed")
def test_two_processes(tmp_path):
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = str(free.getsockname()[1])
    program = PROGRAM.format(root=str(Path(__file__).resolve().parents[1]))
    environment = {**os.environ, "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port}
    files = {rank: str(tmp_path / f"{rank}.pt") for rank in (-1, 0, 1)}
    running = [
        subprocess.Popen([sys.executable, "-c", program, str(rank), file], env=environment)
        for rank, file in files.items()
    ]
    assert [process.wait(timeout=300) for process in running] == [0, 0, 0]
    wanted, found = torch.load(files[-1]), torch.load(files[0])
    assert list(wanted) == list(found)
    for key, value in wanted.items():
        if "running" not in key:  # DDP copies the first process's averages before each step
            torch.testing.assert_close(found[key], value, rtol=1e-8, atol=1e-8)
