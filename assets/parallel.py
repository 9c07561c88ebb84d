"""Train on several processes, which share each batch: their number must divide its size.

    mpirun -n 2 python -m assets.parallel             the networks of gan.py, into out/
    mlx.launch -n 2 -- .venv/bin/python -m assets.parallel conv    those of assets/conv.py, into conv/

mpirun is Open MPI's (`apt-get install openmpi-bin`; root adds --allow-run-as-root); on a Mac, it
needs MLX_MPI_LIBNAME with the path of libmpi.dylib. Where each core has a process, set
OPENBLAS_NUM_THREADS=1. mlx.launch takes TCP, also over several machines with the project at one
path (`--hosts 10.0.0.1,10.0.0.2`); on NVIDIA, NCCL and a GPU for each process. Two processes on the
one GPU of a Mac gain nothing, and Metal ends one that waits for some five seconds. NCCL, Macs and
`--backend jaccl` have not been run. To resume a run, all processes must see its folder.
"""

import contextlib
import io
import os
import sys
import zlib

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


def train(group, images, out="out", **options) -> dict:
    """gan.train for all processes of the group. Raises gan.Refused in each of them if they were not
    given the same, or if their number does not divide the batch."""
    images, path = gan.as_images(images), gan.Path(out).expanduser() / gan.CHECKPOINT
    done = gan.load(path)[1]["epoch"] if path.exists() else 0
    mine = {"images (crc32)": zlib.crc32(images), "epochs done": done}
    mine |= {name: x for name, x in options.items() if not callable(x)}
    crc = mx.array([zlib.crc32(repr(mine).encode())], mx.uint32)
    same = len(set(mx.distributed.all_gather(crc, group=group).tolist())) == 1
    gan.require(same, f"the processes differ; this one, {group.rank()}, has {mine}")
    n, batch_size = group.size(), options.get("batch_size", gan.BATCH_SIZE)
    gan.require(batch_size % n == 0, f"{n} processes must divide batch_size {batch_size}")
    with contextlib.redirect_stdout(io.StringIO() if group.rank() else sys.stdout):
        return gan.train(images, out, group=group, **options)


def end(kind, error, traceback) -> None:
    if issubclass(kind, (gan.Refused, OSError, FloatingPointError)):
        print(f"parallel.py: {error}", file=sys.stderr)
    else:
        sys.__excepthook__(kind, error, traceback)
    sys.stderr.flush()
    os._exit(1)


if __name__ == "__main__":
    out = sys.argv[1] if sys.argv[1:] else "out"
    if out not in PAIRS:
        sys.exit(f"parallel.py: {out} is none of {', '.join(PAIRS)}")
    gan.use_own_cache()
    train(init_group(), gan.load_mnist(), out, resume=True, **PAIRS[out])
