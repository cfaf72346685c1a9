"""The report again, from what a results folder holds:  python -m scaling.report DIR [--serve]"""

import argparse
import contextlib
import sys
from collections.abc import Sequence

from scaling import storage, terminal
from scaling.report.page import build


@terminal.outliving_its_reader()
def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        prog="python -m scaling.report",
        description="Write report.html and figures from the records and fits of a results folder.",
    )
    parser.add_argument(
        "results",
        help="results folder of a sweep, as in results/chinchilla or gs://bucket/chinchilla; or that of a "
        "group in it, as in results/known_entropy/source=markov",
    )
    parser.add_argument("--out", help="the HTML file (default: report.html in the folder)")
    parser.add_argument(
        "--serve", action="store_true",
        help="show it on the loopback address, and again as cells of a running sweep end, until interrupted",
    )  # fmt: skip
    parser.add_argument("--port", type=int, help="of --serve (default: one that is free)")
    args = parser.parse_args(argv)
    try:
        if args.port is not None and not args.serve:
            raise ValueError("--port is of --serve: write that too")
        if args.serve and args.out:
            raise ValueError("--serve shows report.html of the folder: write it without --out")
        if args.serve:
            return _serve(args.results, args.port or 0)
        print(build(args.results, args.out))
    except ValueError as e:
        print(f"error: {e}", file=sys.stderr)
        return 2
    except storage.errors() as e:
        print(f"error: {args.results}: {storage.first_line(e)}", file=sys.stderr)
        return 2
    return 0


def _serve(results: str, port: int) -> int:
    from scaling.report.serving import Server

    try:
        server = Server(storage.folder(results), port)
    except (OSError, OverflowError) as e:
        raise ValueError(f"--port {port}: {storage.first_line(e)}: write another") from None
    with server:
        server.page()
        print(f"{server.address} shows {results}; interrupt to end", flush=True)
        with contextlib.suppress(KeyboardInterrupt):
            server.serve_forever()
    return 0


if __name__ == "__main__":
    sys.exit(main())
