"""Tells Ray that AWS will take this spot machine: `python infra/spot_notice.py [--metadata URL]`, on every worker.

AWS announces it at the machine's metadata address two minutes before. Ray then drains the node: nothing new is placed
there, and training saves. Ends once it has told.
"""

import argparse
import json
import subprocess
import sys
import time
import urllib.error
import urllib.request
from datetime import UTC, datetime

_METADATA = "http://169.254.169.254"
_POLL_S = 5.0
_ANSWER_S = 2.0
_TOKEN_S = "60"


def notice(metadata: str) -> dict[str, str] | None:
    """What AWS announces, as {"action": …, "time": …}; None where it announces nothing, or does not answer now."""
    try:
        token = _ask(f"{metadata}/latest/api/token", "PUT", {"X-aws-ec2-metadata-token-ttl-seconds": _TOKEN_S})
        told = _ask(f"{metadata}/latest/meta-data/spot/instance-action", "GET", {"X-aws-ec2-metadata-token": token})
    except (urllib.error.URLError, TimeoutError, ConnectionError):
        return None
    announced: dict[str, str] = json.loads(told)
    return announced


def _ask(url: str, method: str, headers: dict[str, str]) -> str:
    request = urllib.request.Request(url, method=method, headers=headers)
    with urllib.request.urlopen(request, timeout=_ANSWER_S) as answer:
        return str(answer.read().decode())


def seconds_left(announced: dict[str, str], now: datetime) -> int:
    """Whole seconds until the machine goes, at least one."""
    return max(int((datetime.fromisoformat(announced["time"]) - now).total_seconds()), 1)


def drain(seconds: int) -> int:
    """Tell Ray that this node goes in so many seconds; the exit status of its command."""
    words = ["ray", "drain-node", "--reason", "DRAIN_NODE_REASON_PREEMPTION", "--reason-message", "spot notice"]
    return subprocess.run([*words, "--deadline-remaining-seconds", str(seconds)], check=False).returncode


def main() -> int:
    """Wait for the notice and pass it on, again where Ray does not take it."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--metadata", default=_METADATA, help="the machine's metadata address")
    asked = parser.parse_args()
    while True:
        announced = notice(asked.metadata)
        if announced and drain(seconds_left(announced, datetime.now(UTC))) == 0:
            print(f"spot: {announced['action']} at {announced['time']}; Ray knows", flush=True)
            return 0
        time.sleep(_POLL_S)


if __name__ == "__main__":
    sys.exit(main())
