"""`make audit` against a file of advisories instead of the public list: what is in it is found, by name."""

import http.server
import json
import os
import re
import subprocess
import sys
import threading
from pathlib import Path

import pytest

pytest.importorskip("pip_audit", reason="pip-audit is not installed; `make audit` installs it, and runs these tests")

MAKEFILE = (Path(__file__).resolve().parents[1] / "Makefile").read_text("utf-8")
OPTIONS = re.search(r"-m pip_audit (.*) --requirement", MAKEFILE)[1].split()

ADVISORY = {
    "id": "PYSEC-2026-1",
    "summary": "made up for this test",
    "affected": [
        {
            "package": {"name": "torch", "ecosystem": "PyPI"},
            "versions": ["2.9.0"],
            "ranges": [{"type": "ECOSYSTEM", "events": [{"introduced": "0"}, {"fixed": "2.10.0"}]}],
        }
    ],
}


@pytest.fixture
def advisories(tmp_path):
    """The address of a server that answers as OSV does, from the list in tmp_path/advisories.json."""
    path = tmp_path / "advisories.json"
    path.write_text(json.dumps([ADVISORY]))

    class Handler(http.server.BaseHTTPRequestHandler):
        def do_POST(self):
            query = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
            found = [
                advisory
                for advisory in json.loads(path.read_text())
                for affected in advisory["affected"]
                if affected["package"] == query["package"] and query["version"] in affected["versions"]
            ]
            answer = json.dumps({"vulns": found} if found else {}).encode()
            self.send_response(200)
            self.send_header("Content-Length", str(len(answer)))
            self.end_headers()
            self.wfile.write(answer)

        def log_message(self, *arguments):
            pass

    with http.server.HTTPServer(("127.0.0.1", 0), Handler) as server:
        thread = threading.Thread(target=server.serve_forever)
        thread.start()
        yield f"http://127.0.0.1:{server.server_port}"
        server.shutdown()
        thread.join()


def audit(tmp_path, address, *requirements):
    """The command of `make audit`, with its options, on these requirements."""
    path = tmp_path / "installed.txt"
    path.write_text("\n".join(requirements) + "\n")
    environment = {name: value for name, value in os.environ.items() if not name.lower().endswith("_proxy")}
    environment |= {"PIP_AUDIT_VULNERABILITY_SERVICE": "osv", "PIP_AUDIT_OSV_URL": address}
    command = [sys.executable, "-m", "pip_audit", *OPTIONS, "--cache-dir", tmp_path / "cache", "--requirement", path]
    return subprocess.run(command, env=environment, capture_output=True, text=True, timeout=120)


def test_nothing_known_passes(tmp_path, advisories):
    done = audit(tmp_path, advisories, "torch==2.13.0", "numpy==2.4.0")
    assert done.returncode == 0, done.stderr
    assert "No known vulnerabilities found" in done.stderr


def test_a_known_vulnerability_fails_by_name(tmp_path, advisories):
    done = audit(tmp_path, advisories, "numpy==2.4.0", "torch==2.9.0")
    assert done.returncode == 1
    row = next(line for line in done.stdout.splitlines() if "PYSEC-2026-1" in line)
    assert row.split()[:4] == ["torch", "2.9.0", "PYSEC-2026-1", "2.10.0"]


def test_a_list_that_cannot_be_reached_fails(tmp_path):
    assert audit(tmp_path, "http://127.0.0.1:9", "torch==2.13.0").returncode != 0
