"""``mgm-exp study-server``: one process between a database and very many trials.

Optuna's gRPC proxy. It keeps what it has read, so that a database meets one client rather than a thousand, and an
SQLite file meets one writer and needs no shared file system. There is neither a password nor encryption: whoever
reaches the port can read and change every study in the database, so it listens on this machine only unless it is told
otherwise.
"""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from mgm_exp.errors import ConfigError, MissingDependencyError, UserError
from mgm_exp.record import redact_text
from mgm_exp.search import open_database, storage_place
from mgm_exp.signals import stop_on_signals

# Requests that are worked on at the same time; further ones wait.
THREADS = 16


def serve(database: str, *, host: str, port: int) -> None:
    """Serves until a signal asks it to stop.

    Args:
        database: A URL of SQLite or of a database server.
        host: Address to listen on.
        port: Port to listen on.

    Raises:
        ConfigError: it is no database.
        MissingDependencyError: grpcio, or the database's driver, is not installed.
        UserError: the database does not answer, or the port is in use.
        Interrupted: a signal; what had arrived was answered.
    """
    if "://" not in database or database.startswith("grpc://"):
        raise ConfigError(
            f"mgm-exp study-server serves a database, and {redact_text(database)} is none: Optuna's proxy cannot serve "
            "a journal.",
            advice="Give sqlite:///FILE or postgresql+psycopg://HOST/DATABASE.",
        )
    try:
        import grpc
    except ImportError as error:
        raise MissingDependencyError(
            "mgm-exp study-server needs the package grpcio, which is not installed.", advice="pip install grpcio"
        ) from error
    from optuna.storages import get_storage
    from optuna.storages._grpc.auto_generated.api_pb2_grpc import add_StorageServiceServicer_to_server
    from optuna.storages._grpc.servicer import OptunaStorageProxyService

    storage = get_storage(open_database(storage_place(database, Path.cwd())))
    # As optuna.storages.run_grpc_proxy_server, which does not say when a port is taken: two servers would share it.
    server = grpc.server(ThreadPoolExecutor(max_workers=THREADS), options=[("grpc.so_reuseport", 0)])
    add_StorageServiceServicer_to_server(OptunaStorageProxyService(storage), server)
    try:
        port = server.add_insecure_port(f"{host}:{port}")
    except RuntimeError as error:
        raise UserError(
            f"mgm-exp study-server cannot listen on {host}:{port}.", advice="Give another --host or --port."
        ) from error
    server.start()
    address = f"sweep.storage=grpc://{host}:{port}"
    with stop_on_signals():
        try:
            print(f"{address} (no password: whoever reaches it can change every study)", flush=True)
            server.wait_for_termination()
        finally:
            server.stop(grace=5.0).wait()  # what has arrived is answered
