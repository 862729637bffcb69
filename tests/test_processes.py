"""Two processes with 8 pairs each do what one process does with 16."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

SCRIPT = """
import torch, torch.distributed as dist, torch.nn.functional as F
from img2vid.objectives import Contrastive, Step, Surroundings
from img2vid.leaving import leave_processes
from tests.test_objectives import batch, text_model

torch.set_num_threads(1)
dist.init_process_group("gloo")
rank, world = dist.get_rank(), dist.get_world_size()
whole = batch(16)
mine = {"clip": whole["clip"][rank * 8 : rank * 8 + 8], "caption": whole["caption"][rank * 8 : rank * 8 + 8]}

def gradients(model, given, chunk, loss, train_text, **ranks):
    objective = Contrastive(loss, train_text=train_text)
    objective.setup(Surroundings(model, **ranks))
    value = objective(Step(model, given, chunk))["contrastive_loss"]
    model.zero_grad()
    value.backward()
    return value.detach(), {name: p.grad for name, p in model.named_parameters() if p.grad is not None}

for loss in ("clip", "siglip"):
    for train_text in (True, False):
        expected, target = gradients(text_model(init_logit_bias=-2.0), whole, None, loss, train_text)
        for chunk in (None, 3):
            model = text_model(init_logit_bias=-2.0)
            value, found = gradients(model, mine, chunk, loss, train_text, rank=rank, world_size=world)
            dist.all_reduce(value)
            assert abs(value / world - expected) < 1e-5, (loss, chunk, value / world, expected)
            assert found.keys() == target.keys()
            for name, gradient in found.items():
                dist.all_reduce(gradient)  # the mean over processes, as DistributedDataParallel takes it
                away = (gradient / world - target[name]).abs().max() / target[name].abs().max().clamp(min=1e-3)
                assert away < 1e-5, (loss, train_text, chunk, name, away.item())
leave_processes()
if rank == 0:
    print("same")
"""


@pytest.mark.multiprocess
def test_two_times_eight_is_sixteen(tmp_path):
    script, root = tmp_path / "script.py", Path(__file__).parents[1]
    script.write_text(SCRIPT)
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2", str(script)]
    environment = os.environ | {"PYTHONPATH": str(root), "OMP_NUM_THREADS": "1"}
    done = subprocess.run(command, cwd=root, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert "same" in done.stdout
