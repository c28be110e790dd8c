"""A whole federation over Flower with real processes: the bits of one process, whatever is killed."""

from __future__ import annotations

import itertools
import signal
import socket
from collections.abc import Mapping
from pathlib import Path

import pytest

pytest.importorskip("flwr")

from typer.testing import CliRunner

from federation import (
    CountingProxy,
    Federation,
    federation,
    free_port,
    messages,
    private_states,
    records,
    wait,
    write_recipe,
)
from fedferret import load_recipe, run
from fedferret.cli import app
from fedferret.tracking import events
from fedferret.tracking.audit import read_audit


def join(made: Federation, site: str, address: str, *more: str) -> None:
    made.start(site, "join", address, "--name", site, "--data", f"{site}.jsonl", *more)


@pytest.mark.slow(seconds=150)
def test_two_sites_give_the_bits_of_one_process_at_little_cost_whatever_is_killed(tmp_path: Path) -> None:
    """Two rounds undisturbed, which are measured; then every kind of process is killed. Models are personal: what each
    site keeps to itself ends with the same bits too. With certificates and over nginx the four hospitals run
    (``test_four_hospitals.py``).
    """
    sites = ["ward-1", "ward-2"]
    clients = {"per_round": 2, "min_clients": 2, "held_out": 0.3}
    recipe = write_recipe(tmp_path, sites, 4, clients=clients, algorithm={"name": "fedsa-lora"})
    run(load_recipe(recipe), out=tmp_path / "alone", log=lambda line: None)
    with (
        socket.create_server(("127.0.0.1", 0)) as outside,
        federation(
            tmp_path, HTTPS_PROXY=f"http://127.0.0.1:{outside.getsockname()[1]}", HTTP_PROXY="http://127.0.0.1:1"
        ) as made,
    ):
        port = free_port()
        wires = {site: CountingProxy(port) for site in sites}
        serve = ("serve", "run.toml", "--out", "served", "--listen", f"127.0.0.1:{port}", "--insecure")
        made.start("serve", *serve)
        for site, wire in wires.items():
            join(made, site, f"127.0.0.1:{wire.port}", "--insecure")
        made.wait_for("serve", "round 2/4: held-out")
        served = tmp_path / "served"
        undisturbed(tmp_path, served, wires)
        assert all("requests and responses are not signed" in made.output(name) for name in ("serve", *sites))

        made.kill("resident", "ward-1")
        made.kill("client_app", "ward-2")
        made.kill("server_app")
        made.kill("flower-superlink")
        made.wait_for("serve", "Resuming after round")
        made.wait_for("serve", "round 3/4: held-out")
        assert made.signal("serve", signal.SIGINT) == 130  # Ctrl-C, and the same command again
        assert not [line for _, line in made.running() if "served" in line]
        made.kill("flower-supernode", "ward-1")
        made.start("serve", *serve)
        assert made.end("serve") == 0, made.output("serve")
        assert records(served) == records(tmp_path / "alone")
        scored = [events.read(folder).evaluations[4].clients for folder in (served, tmp_path / "alone")]
        assert scored[0] == scored[1] and set(scored[0]) == set(sites), "what sites hold out is scored where it is"
        kept = private_states(tmp_path.glob("sites/*/runs/*/clients/*.state"))
        assert kept == private_states(tmp_path.glob("alone/state/clients/*.state")) and set(kept) == set(sites)
        assert not list(tmp_path.glob("**/.tmp*")), "no torn file"
        for site in sites:
            assert "version 4" in made_output(made, "nodes", "served", site), "to score, a site catches up"
        made.start("serve", *serve)
        assert made.end("serve") == 0
        assert made.output("serve").strip().endswith("runs it again.\nThe run is finished: served/report.html")

        outside.setblocking(False)
        with pytest.raises(BlockingIOError):
            outside.accept()  # nothing was reported or fetched
        assert not list(tmp_path.rglob("flower/apps")), "no run package was unpacked"
        assert made.signal("ward-1", signal.SIGTERM) == 130
        assert made.signal("ward-2", signal.SIGKILL) == -signal.SIGKILL  # its processes end with it
        wait(lambda: made.running() == [], lambda: f"left behind: {made.running()}")


def undisturbed(root: Path, served: Path, wires: Mapping[str, CountingProxy]) -> None:
    """What two rounds cost: one trainer's process each, and kilobytes."""
    seen = list(itertools.takewhile(lambda event: event.get("round") != 3, messages(served)))  # the third has begun
    rounds = [each for each in events.read(served).rounds.values() if each.round > 1]
    print(f"a round beyond training: {[round(each.seconds - each.seconds_local / len(wires), 1) for each in rounds]} s")
    for site, wire in wires.items():
        assert len({event["process"] for event in seen if event["client"] == site and "process" in event}) == 1
        audit = [event for event in read_audit(root / "sites" / site) if event["round"] <= 2]
        payload = sum(event["payload_bytes"] for event in audit)
        message = sum(event["framed_bytes"] for event in audit)
        traffic = [event for event in seen if event["what"] == "traffic" and event["client"] == site]
        assert message == sum(event["payload_down"] + event["payload_up"] for event in traffic)
        framed_bytes = sum(event["framed_down"] + event["framed_up"] for event in traffic)
        crossed = wire.up + wire.down
        print(f"{site}, 2 rounds: payload {payload}, messages {message}, framed {framed_bytes}, socket {crossed} bytes")
        assert 0 < payload < message < framed_bytes < crossed
        assert crossed < 300_000, "kilobytes: no model is sent (its weights have 362,496 bytes)"


def made_output(made: Federation, *arguments: str) -> str:
    """A site's line in the output of `fedferret nodes`."""
    command, folder, site = arguments
    outcome = CliRunner().invoke(app, [command, str(made.folder / folder)], env={"COLUMNS": "200"})
    (line,) = [line for line in outcome.output.splitlines() if line.startswith(site)]
    return line
