"""``python -m ironmoe.bench.benchmarks.gpu``: test and measure everything on this GPU, within a
given number of minutes.

It needs torch, and Triton on a GPU; transformers and the other peers are measured only where they
are installed. Every result is on disk at once, so a kill loses nothing but the piece that was under
way: ``--resume`` goes on from there.
"""

import argparse
import signal
import sys
from pathlib import Path

from ironmoe.bench.benchmarks.gpu.jobs import KINDS
from ironmoe.bench.benchmarks.gpu.options import DTYPES, make_options
from ironmoe.bench.benchmarks.gpu.run import run_bench_gpu
from ironmoe.bench.benchmarks.shapes import SHAPES
from ironmoe.bench.common.user_error import UserError


def main(arguments: list[str] | None = None) -> int:
    """Run the command line. The exit status is 2 for an option that cannot be used."""
    options = _parser().parse_args(arguments)
    signal.signal(signal.SIGTERM, _interrupt)
    try:
        return run_bench_gpu(make_options(**vars(options)))
    except (UserError, OSError) as error:
        print(f"ironmoe: {error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        return 130


def _interrupt(*_: object) -> None:
    """A polite kill ends the run as Ctrl-C does."""
    raise KeyboardInterrupt


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="python -m ironmoe.bench.benchmarks.gpu", description=__doc__
    )

    parser.add_argument(
        "--device",
        default="auto",
        help="auto, cuda, or cpu, which rehearses the program on tiny layers",
    )
    parser.add_argument("--dtype", default="bfloat16", help=", ".join(DTYPES))
    parser.add_argument(
        "--shapes",
        action="append",
        help="names separated by commas, or one layer as T,d,n,E,K; may be repeated; by default "
        "all: " + ", ".join(s.name for s in SHAPES),
    )

    parser.add_argument(
        "--minutes",
        type=float,
        default=9.0,
        help="stop after so many minutes, and report what was measured until then",
    )
    parser.add_argument(
        "--only",
        help="separated by commas: " + "; ".join(f"{kind}: {what}" for kind, what in KINDS.items()),
    )
    parser.add_argument("--skip-tests", action="store_true", help="do everything but the tests")
    parser.add_argument(
        "--tune",
        action="store_true",
        help="also try other block sizes, and propose rows for their table",
    )

    parser.add_argument(
        "--resume",
        action="store_true",
        help="go on with the newest run in --out that was interrupted",
    )
    parser.add_argument("--out", type=Path, help="folder of the results, by default bench/results")
    return parser


if __name__ == "__main__":
    sys.exit(main())
