"""Names on the hub: what is taken for one, and that a hub that does not answer is asked once and not waited for."""

import os
import socket
import subprocess
import sys
from pathlib import Path

import pytest

from tokenformer import hub

ROOT = Path(__file__).resolve().parent.parent
ASK = """
import sys
from pathlib import Path
from tokenformer import hub
hub.SECONDS = 0.5
try:
    hub.download("owner/name", ("*.json",))
except ValueError as error:
    print(error)
copy = Path(sys.argv[1], "hub", "models--owner--name")  # as the hub's own library keeps it
(copy / "snapshots" / "abc").mkdir(parents=True)
(copy / "refs").mkdir()
(copy / "refs" / "main").write_text("abc")
(copy / "snapshots" / "abc" / "config.json").write_text("{}")
print(hub.download("owner/name", ("*.json",)))
"""


@pytest.mark.parametrize(
    ("place", "named"),
    [
        ("owner/name-1.5", True),
        ("here/name", False),  # there is a folder `here`
        ("here", False),
        ("owner/tokenizer.json", False),
        ("owner/pytorch_model.bin", False),
        ("some/place/name", False),
        ("/owner/name", False),
        ("~/name", False),
        ("../name", False),
        ("name", False),
    ],
)
def test_what_can_only_be_a_place_on_the_disk_is_no_name_on_the_hub(
    place: str, named: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    Path("here").mkdir()
    assert hub.is_on_hub(place) == named
    assert hub.is_on_hub(place, without_owner=True) == (named or place == "name")


def requests(server: socket.socket) -> list[bytes]:
    """The first line of what each caller that waits at `server` has asked for."""
    server.settimeout(0.1)
    lines = []
    try:
        while True:
            lines.append(server.accept()[0].recv(1000).split(b"\r\n")[0])
    except TimeoutError:
        return lines


def test_a_hub_that_does_not_answer_is_asked_once_and_its_cache_does(tmp_path: Path) -> None:
    with socket.create_server(("127.0.0.1", 0)) as silent:  # it takes calls, and says nothing
        place = {"HF_ENDPOINT": f"http://127.0.0.1:{silent.getsockname()[1]}", "HF_HOME": str(tmp_path)}
        rest = {key: value for key, value in os.environ.items() if not key.startswith("HF_")}
        environment = {**rest, **place, "PYTHONPATH": str(ROOT)}
        command = [sys.executable, "-c", ASK, str(tmp_path)]
        done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=60)
        asked = [line for line in requests(silent) if b"owner/name" in line]
    assert done.returncode == 0, done.stderr
    first, second = done.stdout.splitlines()  # without a copy in the cache, and, the control, with one
    start = "owner/name: no such file or folder here, and not to be had from the hub (it cannot be reached: "
    assert first.startswith(start)
    assert second == str(tmp_path / "hub" / "models--owner--name" / "snapshots" / "abc")
    assert asked == [b"GET /api/models/owner/name HTTP/1.1"] * 2  # once each
