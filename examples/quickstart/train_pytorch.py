"""One network, trained without and with compression: mpirun -np 2 python train_pytorch.py"""

import horovod.torch as hvd
import torch

from gq_horovod.torch import GlobalQSGD

hvd.init()
torch.set_num_threads(1)
torch.manual_seed(hvd.rank())  # every rank has samples of its own
samples = torch.randn(2048, 64)
classes = (samples[:, :32].norm(dim=1) > samples[:, 32:].norm(dim=1)).long()

for compression in (hvd.Compression.none, GlobalQSGD):
    torch.manual_seed(0)  # all begin with the same weights
    layers = torch.nn.Linear(64, 256), torch.nn.ReLU(), torch.nn.Linear(256, 2)
    model = torch.nn.Sequential(*layers)
    optimizer = hvd.DistributedOptimizer(
        torch.optim.Adam(model.parameters(), lr=0.003),
        named_parameters=model.named_parameters(),
        compression=compression,  # the one line that changes
    )
    for _ in range(100):
        optimizer.zero_grad()
        loss = torch.nn.functional.cross_entropy(model(samples), classes)
        loss.backward()
        optimizer.step()
    mean = hvd.allreduce(loss.detach(), name="loss").item()
    if hvd.rank() == 0:
        print(f"{compression.__name__:15} loss after 100 steps: {mean:.4f}")
