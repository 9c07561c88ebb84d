"""Train on several processes, which share each batch: their number must divide its size.

    mpirun -n 2 python -m assets.parallel             the networks of gan.py, into out/
    mlx.launch -n 2 -- .venv/bin/python -m assets.parallel conv    those of assets/conv.py, into conv/

mpirun is Open MPI's (`apt-get install openmpi-bin`; root adds --allow-run-as-root). Where each core
has a process, set OPENBLAS_NUM_THREADS=1. mlx.launch takes TCP, and for several machines, with the
project at the same path, `--hosts 10.0.0.1,10.0.0.2`. NCCL (NVIDIA) and `--backend jaccl`
(Thunderbolt) have not been run. All processes need the same images and options, which `train`
compares. Process 0 writes: all see the run's folder, or none but process 0, and then the run cannot
be resumed. The losses are those of one process, to rounding.
"""

import os
import sys

import gan  # isort: skip: before MLX, for OpenBLAS
import mlx.core as mx

from assets import conv

PAIRS = {"out": {}, "conv": conv.OPTIONS}  # options of train, by the run's folder


def init_group() -> mx.distributed.Group:
    """The processes that mpirun or mlx.launch has started. From here on, an error in one of them
    ends it at once, and with it all: at a regular exit, it would wait for the others for ever."""
    if sys.platform == "linux":  # the name that MLX looks for is part of a -dev package
        os.environ.setdefault("MLX_MPI_LIBNAME", "libmpi.so.40")
    group = mx.distributed.init()
    if group.size() == 1:
        sys.exit("parallel.py: start it by Open MPI's mpirun or by mlx.launch, with -n 2 or more")
    sys.excepthook = end
    return group


def end(kind, error, traceback) -> None:
    if issubclass(kind, (gan.Refused, OSError, FloatingPointError)):
        print(f"parallel.py: {error}", file=sys.stderr)
    else:
        sys.__excepthook__(kind, error, traceback)
    sys.stderr.flush()
    os._exit(1)


if __name__ == "__main__":
    group = init_group()
    out = sys.argv[1] if sys.argv[1:] else "out"
    gan.train(gan.load_mnist(), out, resume=True, group=group, **PAIRS[out])
    if group.rank() == 0:
        print(f"finished: see {out}")
