"""Where is Square's nut, by the features of a run from images?  python -m benchmark.feature_probe RUN_DIR

Networks are trained on the first 16 rollouts of the replay, and tried on the others.
"""

import io
import sys
from pathlib import Path

import torch
import torch.nn as nn

torch.manual_seed(0)
states, objects, slots = [], [], []
for slot, path in enumerate(sorted(Path(sys.argv[1]).glob("checkpoint0.replay*"))):
    rollout = torch.load(io.BytesIO(path.read_bytes()[32:]), weights_only=True)["newest"]
    valid = rollout["valid"] > 0
    states.append(rollout["state"][:-1][valid])
    objects.append(rollout["object"][:-1][valid])
    slots.append(torch.full((int(valid.sum()),), slot))
x, y, slot = torch.cat(states), torch.cat(objects), torch.cat(slots)
train = slot < 16
x = (x - x[train].mean(0)) / (x[train].std(0) + 1e-4)
mean, scale = y[train].mean(0), y[train].std(0) + 1e-6
for name, seen in ("features and state", x), ("state", x[:, :9]):
    sizes = seen.shape[1], 256, y.shape[1]
    layers = nn.Linear(sizes[0], 256), nn.SiLU(), nn.Linear(256, 256), nn.SiLU(), nn.Linear(256, sizes[2])
    network, steps = nn.Sequential(*layers), 4000
    optimizer = torch.optim.Adam(network.parameters(), 1e-3, weight_decay=1e-5)
    given, wanted = seen[train], ((y - mean) / scale)[train]
    for step in range(steps):
        optimizer.param_groups[0]["lr"] = 1e-3 * (1 - step / steps)
        i = torch.randint(len(given), (512,))
        loss = (network(given[i]) - wanted[i]).square().mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    with torch.no_grad():
        error = (network(seen[~train]) * scale + mean - y[~train])[:, :3].abs() * 1000
    print(name, "median error of the nut's x, y, z in mm:", error.median(0).values.tolist())
