"""Look for known vulnerabilities in the packages that are installed beside this Python.

    python scripts/audit.py

Ends with 1 where one is known. A machine that reaches packages need not reach advisories: then one line says that
nothing was looked up, and that is no failure.
"""

import json
import os
import subprocess
import sys
import sysconfig
from pathlib import Path
from typing import Any

TOOL = "pip-audit>=2.9,<3"
# What is said where the service, or the tool itself, is not to be had; anything else is a fault.
UNREACHED = ("connect", "timed out", "serviceerror", "httperror", "resolv")
SECONDS = 180


def audit() -> tuple[list[dict[str, Any]], str]:
    """What the tool says of each package; or nothing, and the reason."""
    uv = Path(sys.executable).with_name("uv")
    command = [str(uv), "tool", "run", "--quiet", "--from", TOOL, "pip-audit", "--path", sysconfig.get_path("purelib")]
    environment = {**os.environ, "UV_NATIVE_TLS": "1", "UV_SYSTEM_CERTS": "1"}
    try:
        done = subprocess.run(
            [*command, "--format", "json", "--progress-spinner", "off", "--timeout", "15"],
            capture_output=True,
            text=True,
            timeout=SECONDS,
            env=environment,
            check=False,
        )
    except subprocess.TimeoutExpired:
        return [], f"no answer in {SECONDS} s"
    if done.stdout.strip():
        packages: list[dict[str, Any]] = json.loads(done.stdout)["dependencies"]
        return packages, "it knows none of the packages"
    last = (done.stderr.strip().splitlines() or ["no output"])[-1].strip()
    if not any(word in done.stderr.lower() for word in UNREACHED):
        sys.exit(f"audit: {TOOL} failed: {last}")
    return [], last


def main() -> None:
    packages, reason = audit()
    looked_up = [package for package in packages if "skip_reason" not in package]
    if not looked_up:
        print(f"audit: the advisory service could not be reached ({reason}); nothing was looked up")
        return
    known = [(package, advisory) for package in looked_up for advisory in package["vulns"]]
    for package, advisory in known:
        fixed = ", ".join(advisory["fix_versions"]) or "no release yet"
        print(f"audit: {package['name']} {package['version']}: {advisory['id']}, fixed in {fixed}")
    print(f"audit: {len(looked_up)} packages looked up, {len(known)} known vulnerabilities")
    sys.exit(bool(known))


if __name__ == "__main__":
    main()
