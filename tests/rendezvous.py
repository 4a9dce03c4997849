"""Horovod again in the same processes: hvd.shutdown() and hvd.init(), over Gloo."""

from __future__ import annotations

import os
from typing import Any

from horovod.runner.common.util.hosts import get_host_assignments, parse_hosts
from horovod.runner.http.http_server import RendezvousServer

_servers = []  # whose threads serve as long as the process lives


def restart(hvd: Any) -> None:
    """End Horovod on every rank and begin again; `hvd` is its module for the framework.

    Through a new rendezvous server, as the elastic driver has a new round for each start. In
    horovodrun's own one a rank may still find the address that another had before the restart,
    and then waits in vain for it to answer.
    """
    port = None
    if hvd.rank() == 0:
        server = RendezvousServer()
        port = server.start()
        server.init(get_host_assignments(parse_hosts(f"localhost:{hvd.size()}"), hvd.size()))
        _servers.append(server)
    port = hvd.broadcast_object(port, root_rank=0, name="rendezvous")
    hvd.shutdown()
    os.environ["HOROVOD_GLOO_RENDEZVOUS_PORT"] = str(port)
    hvd.init(process_sets="dynamic")
