"""Which tests a session collects."""

import os

# tests/parallel and parallel_tf run inside the ranks of a Horovod job, which tests/launch starts
# (Open MPI and horovodrun set these). To run some of it by hand:
#     .venv/bin/mpirun -np 2 .venv/bin/python -m pytest tests/parallel -k name
IN_A_RANK = "OMPI_COMM_WORLD_RANK" in os.environ or "HOROVOD_RANK" in os.environ

collect_ignore = [] if IN_A_RANK else ["parallel", "parallel_tf"]
