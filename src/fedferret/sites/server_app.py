"""The process that runs as the ServerApp: it takes the run's task from the SuperLink and runs the recipe.

    wait for the sites  ->  runner.run(recipe, folder), with an engine over FlowerTransport(grid)
                            too few replies: log it, wait for the sites, resume from the log

Flower would start a process that unpacks the run package and imports the modules that the package names. This process
runs the installed fedferret instead; it follows `flwr/superlink/runtime/run_serverapp.py`. The run's folder can always
be resumed; `serve` starts this process again.

An error that nobody foresaw is written to RUN/server/server_app.log with its traceback. The message that was
being read is in RUN/server/reading (``strikes.py``).
"""

from __future__ import annotations

import argparse
import time
import traceback
from collections.abc import Callable, Iterator, Mapping
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

from fedferret.config import load
from fedferret.core.errors import RunError, TooFewClients, UserError
from fedferret.data.pinned import OPTION
from fedferret.disk import update_bytes
from fedferret.engines.flower import FlowerTransport, Roster
from fedferret.engines.flower_link import PATIENCE, RECONNECTS, Link
from fedferret.engines.replay import Protection, SequenceNumbers
from fedferret.engines.transport import NoSeal
from fedferret.runner import pinned_files, run
from fedferret.sites import state
from fedferret.sites.credentials import read_server
from fedferret.sites.flower_process import LOOPBACK, quiet_flower, secret
from fedferret.sites.members import Members
from fedferret.sites.nginx import upload_limit
from fedferret.sites.runtime import authorised, client_of_task
from fedferret.sites.signing import ServerSeal
from fedferret.sites.strikes import AGAIN, CRASHED, NotingSeal, Reading
from fedferret.sites.supervisor import terminable
from fedferret.tracking import events
from fedferret.tracking.pins import check_files

FIRST_PAUSE = 5.0  # seconds before a round with too few replies is run again; doubled each time
LONGEST_PAUSE = 60.0  # seconds; Flower accepts a site that lost its connection again after at most 62

app = ServerApp()


@app.main()
def main(grid: Grid, context: Context) -> None:
    """Run the recipe in the folder that the context names, until the run is finished.

    Args:
        grid: of the Flower run.
        context: its node_config has folder, pki ("": insecure), left_out, accept_changed_data, and wait and patience
            in seconds.
    Raises:
        UserError: for a mistake in the recipe.
        RunError: if the run cannot go on.
    """
    folder = Path(str(context.node_config["folder"]))
    recipe = load(folder / state.FOLDER / "recipe.toml")
    accepts = bool(context.node_config["accept_changed_data"])
    if (folder / events.FILE).exists():  # now, and not when the sites have come
        check_files(folder, pinned_files(recipe, accepts))
    members = Members(folder, recipe)
    state.write(folder, state.LIMITS, {"upload": upload_limit(update_bytes(recipe))})  # before any site may call
    link = Link(grid)  # type: ignore[arg-type]  # the grid of ``task_of``
    pki = str(context.node_config["pki"])
    roster = Roster(link, members.names(), asks=not pki)
    seal = ServerSeal(read_server(Path(pki))) if pki else NoSeal()
    reading = Reading(folder, str(context.node_config["left_out"]), signed=seal.signs)
    protection = Protection(NotingSeal(seal, reading), SequenceNumbers(folder / state.FOLDER / "sequence"))
    patience, pause = float(context.node_config["patience"]), FIRST_PAUSE
    messages = state.MessageLog(folder)

    def connected(seconds: float = PATIENCE) -> dict[str, int]:
        roster.approve(members.names())
        nodes = roster(seconds)
        state.write(folder, "names", {str(node): name for name, node in nodes.items()})
        return nodes

    transport = FlowerTransport(link, connected, messages.traffic, watch=reading)
    gather(connected, members, float(context.node_config["wait"]))
    newest, progressed = messages.newest_round(), time.monotonic()
    while True:
        try:
            run(
                recipe,
                folder,
                _log,
                transport=transport,
                protection=protection,
                changes=lambda: members.effective(connected()),
                on_message=messages.record,
                on_client=reading.reading,
                accept_changed_data=accepts,
            )
            return
        except TooFewClients as error:
            if messages.newest_round() > newest:
                newest, progressed, pause = messages.newest_round(), time.monotonic(), FIRST_PAUSE
            if time.monotonic() - progressed + pause > patience:
                raise
            _log(f"{error}. The round is run again in {pause:.0f} seconds.")
            time.sleep(pause)
            pause = min(2 * pause, LONGEST_PAUSE)
            gather(connected, members, pause)


def gather(connected: Callable[[], Mapping[str, int]], members: Members, seconds: float) -> None:
    """Wait until all sites are connected, or the time is over; sites that connect later join the next rounds.

    Args:
        connected: returns the node id of each connected site.
        members: of the run; they may come and go meanwhile.
        seconds: how long to wait.
    """
    end, known = time.monotonic() + seconds, set[str]()
    while True:
        nodes = connected()
        for name in sorted(nodes.keys() - known):
            known.add(name)
            _log(f"{name} is connected ({len(nodes.keys() & known)} of {len(members.names())}).")
        if nodes.keys() >= {*members.awaited()} or time.monotonic() > end:
            return
        time.sleep(0.5)


@contextmanager
def task_of(run_id: int, address: str, secret: bytes, authority: Path | None) -> Iterator[tuple[Grid, Context]]:
    """Take the task of a Flower run that was just started; yield the run's grid and context.

    Args:
        run_id: of the Flower run.
        address: of the SuperLink, HOST:PORT.
        secret: what the SuperLink requires for tasks.
        authority: the certificate to trust; None: no TLS.
    Raises:
        RunError: if the SuperLink gives no task for the run.
    """
    token = _token(run_id, address, secret, authority)
    grid = HttpGrid(address, authority is None, authority.read_bytes() if authority else None, token=token)
    grid._retry_invoker.max_time = RECONNECTS  # the default is to retry without end, past every deadline
    client = grid._runtime_client
    beating = client_of_task(address, token, authority)  # a client that no exchange bounds in time
    heartbeat = HeartbeatSender(make_task_heartbeat_fn_http(beating))
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
        with suppress(httpx.HTTPError):  # the SuperLink ended
            client.PushTaskOutput(PushTaskOutputRequest(sub_status=status, details=""))
        grid.close()
        beating.close()


def _token(run_id: int, address: str, secret: bytes, authority: Path | None, patience: float = 30.0) -> str:
    end = time.monotonic() + patience
    with closing(authorised(address, secret, authority)) as client:
        while time.monotonic() < end:
            response = client.AcquireTask(AcquireTaskRequest(supported_task_types=[TaskType.SERVER_APP]))
            if response.token and response.task.run_id == run_id:
                return str(response.token)
            time.sleep(0.1)
    raise RunError("the SuperLink gave no task for the run")


def _log(line: str) -> None:
    print(line, flush=True)


def start() -> int:
    """Run `python -m fedferret.sites server_app FOLDER --run ID ...`; return `fedferret run`'s exit code, or AGAIN."""
    parser = argparse.ArgumentParser()
    parser.add_argument("folder", type=Path)
    parser.add_argument("--run", type=int, required=True)
    parser.add_argument("--port", type=int, required=True)
    parser.add_argument("--pki", type=Path)
    parser.add_argument("--wait", type=float, required=True)
    parser.add_argument("--patience", type=float, required=True)
    parser.add_argument("--left-out", default="")
    parser.add_argument(OPTION, action="store_true")
    given = parser.parse_args()
    known = secret(given.folder / state.FOLDER)
    settings: UserConfig = {"folder": str(given.folder), "pki": str(given.pki or "")}
    settings |= {"wait": given.wait, "patience": given.patience, "left_out": given.left_out}
    settings["accept_changed_data"] = given.accept_changed_data
    try:
        authority = given.pki / "ca.crt" if given.pki else None
        task = task_of(given.run, f"{LOOPBACK}:{given.port}", known, authority)
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
        _log(f"The SuperLink refused a request ({type(error).__name__}: {error}).")
        return AGAIN
    except KeyboardInterrupt:  # from `serve`, which logs why; or from Flower, if the SuperLink lost this run
        return AGAIN
    except SystemExit:  # of Flower: it said why
        return AGAIN
    except BaseException as error:
        log = given.folder / state.FOLDER / "server_app.log"
        with log.open("a") as file:
            file.write(f"{time.strftime('%Y-%m-%d %H:%M:%S')}\n{traceback.format_exc()}\n")
        _log(f"An error that nobody foresaw ({type(error).__name__}): see {log}.")
        return CRASHED
