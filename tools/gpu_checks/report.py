"""The table of a check, in Markdown and JSON."""

from __future__ import annotations

import json
import platform
import subprocess
import time
from importlib import metadata
from pathlib import Path

from gpu_checks.common import REPOSITORY

PACKAGES = ("torch", "megatron-core", "transformer-engine", "apex")


def machine() -> dict:
    """GPU, driver and versions, without importing what may be broken."""
    versions = {}
    for name in PACKAGES:
        try:
            versions[name] = metadata.version(name)
        except metadata.PackageNotFoundError:
            versions[name] = None
    return {
        "day": time.strftime("%Y-%m-%d"),
        "gpu": _output(["nvidia-smi", "--query-gpu=name,driver_version", "--format=csv,noheader"]) or None,
        "commit": _output(["git", "-C", str(REPOSITORY), "rev-parse", "--short", "HEAD"]) or None,
        "python": platform.python_version(),
        "packages": versions,
    }


def write(folder: Path, size: str, rows: list[dict]) -> str:
    """Writes gpu_check.json and gpu_check.md, and returns the latter. Called after each part: what a crash leaves is
    whole."""
    about = machine()
    record = {"machine": about, "size": size, "seconds": sum(row["seconds"] for row in rows), "parts": rows}
    (folder / "gpu_check.json").write_text(json.dumps(record, indent=2) + "\n", encoding="utf-8")
    versions = ", ".join(f"{name} {version}" for name, version in about["packages"].items() if version)
    device = (about["gpu"] or "a CPU").splitlines()[0]
    lines = [
        f"{about['day']}, {device}, {versions}, commit {about['commit']}, size {size}",
        "",
        "| part | status | seconds | result |",
        "|---|---|---|---|",
    ]
    for row in rows:
        detail = row["detail"].replace("|", "\\|")
        lines.append(f"| {row['part']} | {row['status']} | {row['seconds']:.0f} | {detail} |")
    text = "\n".join(lines) + "\n"
    (folder / "gpu_check.md").write_text(text, encoding="utf-8")
    return text


def _output(words: list[str]) -> str:
    try:
        return subprocess.run(words, capture_output=True, text=True, timeout=20).stdout.strip()
    except (OSError, subprocess.TimeoutExpired):
        return ""
