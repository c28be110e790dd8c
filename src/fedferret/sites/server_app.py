"""The process that plays the ServerApp: it takes the run's task from the SuperLink beside it and plays the recipe.

    wait for the sites  ->  runner.run(recipe, folder), its engine over FlowerTransport(grid)
                            too few answered: say so, wait for the sites, go on from the log

It stands where Flower would start a process that unpacks a package and imports what that names; follows
`flwr/superlink/runtime/run_serverapp.py`. However it ends, the run's folder is resumable; `serve` starts it again.
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import closing, contextmanager, suppress
from pathlib import Path

import httpx
from flwr.app import Context, UserConfig
from flwr.common.constant import SubStatus
from flwr.common.serde import context_from_proto, run_from_proto
from flwr.proto.runtime_pb2 import AcquireTaskRequest, PullTaskInputRequest, PushTaskOutputRequest
from flwr.serverapp import Grid, ServerApp
from flwr.supercore.constant import TaskType
from flwr.supercore.heartbeat import HeartbeatSender, make_task_heartbeat_fn_http
from flwr.supercore.run import RunNotRunningException
from flwr.supercore.task_identity import TaskIdentity
from flwr.superlink.grid import HttpGrid

from fedferret.config import Recipe, load
from fedferret.core.errors import RunError, TooFewClients, UserError
from fedferret.engines.flower import FlowerTransport, Roster
from fedferret.runner import run as play
from fedferret.sites import state
from fedferret.sites.flower_process import LOOPBACK, quiet_flower, secret
from fedferret.sites.runtime import authorised
from fedferret.sites.supervisor import terminable

RECONNECTS = 15.0  # seconds in which a request to the SuperLink is tried again; then `serve` begins anew
AGAIN = 75  # exit code: as sysexits.h has it, a failure that may be over at the next try
FIRST_PAUSE = 5.0  # seconds before a round that too few answered is played again; doubled each time
LONGEST_PAUSE = 60.0  # a site that was cut off is let in again after 62 at most

app = ServerApp()


@app.main()
def main(grid: Grid, context: Context) -> None:
    """Play the recipe in the folder that the context names, to its end."""
    folder = Path(str(context.node_config["folder"]))
    recipe = load(folder / state.FOLDER / "recipe.toml")
    approved = approved_sites(recipe)
    roster = Roster(grid, approved, asks=bool(context.node_config["insecure"]))
    patience, pause = float(context.node_config["patience"]), FIRST_PAUSE
    messages = state.MessageLog(folder)

    def connected() -> dict[str, int]:
        nodes = roster()
        state.write(folder, "names", {str(node): name for name, node in nodes.items()})
        return nodes

    transport = FlowerTransport(grid, connected, messages.traffic)
    gather(connected, approved, float(context.node_config["wait"]))
    last, moved = messages.rounds(), time.monotonic()
    while True:
        try:
            play(recipe, folder, _log, transport=transport, record=messages.message)
            return
        except TooFewClients as error:
            if messages.rounds() > last:
                last, moved, pause = messages.rounds(), time.monotonic(), FIRST_PAUSE
            if time.monotonic() - moved + pause > patience:
                raise
            _log(f"{error}. It is played again in {pause:.0f} seconds.")
            time.sleep(pause)
            pause = min(2 * pause, LONGEST_PAUSE)
            gather(connected, approved, pause)


def approved_sites(recipe: Recipe) -> list[str]:
    """The sites of the run. Raises UserError for a recipe whose clients are no sites."""
    if recipe.data_source != "sites":
        raise UserError(
            f'data.source="{recipe.data_source}": only sites can be served; set source="sites" and name them in sites'
        )
    return sorted(recipe.data.sites)  # type: ignore[attr-defined]  # of the source of that name


def gather(connected: Callable[[], Mapping[str, int]], approved: Sequence[str], seconds: float) -> None:
    """Wait for all sites, but not longer than that; those who come later are used from then on."""
    end, known = time.monotonic() + seconds, set[str]()
    while True:
        nodes = connected()
        for name in sorted(nodes.keys() - known):
            known.add(name)
            _log(f"{name} is connected ({len(known)} of {len(approved)}).")
        if len(nodes) == len(approved) or time.monotonic() > end:
            return
        time.sleep(0.5)


@contextmanager
def task_of(run: int, address: str, secret: bytes, authority: Path | None) -> Iterator[tuple[Grid, Context]]:
    """The grid of a run that the SuperLink has just been told of. Raises RunError when its task is not to be had."""
    token = _token(run, address, secret, authority)
    grid = HttpGrid(address, authority is None, authority.read_bytes() if authority else None, token=token)
    grid._retry_invoker.max_time = RECONNECTS  # or it tries for ever, past every deadline
    client = grid._runtime_client
    heartbeat = HeartbeatSender(make_task_heartbeat_fn_http(client))
    heartbeat.start()
    status = SubStatus.FAILED
    try:
        given = client.PullTaskInput(PullTaskInputRequest())
        TaskIdentity.task_id, TaskIdentity.run_id = given.task_id, given.run.run_id
        TaskIdentity.node_id = given.context.node_id
        grid.set_run(run_from_proto(given.run))
        yield grid, context_from_proto(given.context)
        status = SubStatus.COMPLETED
    finally:
        grid._retry_invoker.max_tries = 1
        if heartbeat.is_running:
            heartbeat.stop()
        with suppress(httpx.HTTPError):  # a SuperLink that is gone
            client.PushTaskOutput(PushTaskOutputRequest(sub_status=status, details=""))
        grid.close()


def _token(run: int, address: str, secret: bytes, authority: Path | None, patience: float = 30.0) -> str:
    end = time.monotonic() + patience
    with closing(authorised(address, secret, authority)) as client:
        while time.monotonic() < end:
            answer = client.AcquireTask(AcquireTaskRequest(supported_task_types=[TaskType.SERVER_APP]))
            if answer.token and answer.task.run_id == run:
                return str(answer.token)
            time.sleep(0.1)
    raise RunError("the SuperLink gave no task for the run")


def _log(line: str) -> None:
    print(line, flush=True)


def start() -> int:
    """`python -m fedferret.sites.server_app FOLDER --run ID ...`; exits as `fedferret run` does, or with AGAIN."""
    parser = argparse.ArgumentParser()
    parser.add_argument("folder", type=Path)
    parser.add_argument("--run", type=int, required=True)
    parser.add_argument("--port", type=int, required=True)
    parser.add_argument("--authority", type=Path)
    parser.add_argument("--wait", type=float, required=True)
    parser.add_argument("--patience", type=float, required=True)
    given = parser.parse_args()
    known = secret(given.folder / state.FOLDER)
    settings: UserConfig = {"folder": str(given.folder), "insecure": given.authority is None}
    settings |= {"wait": given.wait, "patience": given.patience}
    try:
        task = task_of(given.run, f"{LOOPBACK}:{given.port}", known, given.authority)
        with terminable(), quiet_flower(), task as (grid, context):
            context.node_config = settings
            app(grid, context)
        return 0
    except UserError as error:
        _log(f"fedferret: {error}")
        return 2
    except RunError as error:
        _log(f"fedferret: {error}")
        return 1
    except (httpx.HTTPError, RunNotRunningException) as error:
        _log(f"The SuperLink does not take what it is sent ({type(error).__name__}: {error}).")
        return AGAIN
    except KeyboardInterrupt:  # by `serve`, which says why; or by Flower, where the SuperLink forgot this run
        return AGAIN


if __name__ == "__main__":
    raise SystemExit(start())
