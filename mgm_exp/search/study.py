"""Where a study is kept, and how it is opened: a journal, SQLite, a database, or a server in front of one."""

from __future__ import annotations

import warnings
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from mgm_exp.config import Direction
from mgm_exp.errors import ConfigError, MissingDependencyError, UserError
from mgm_exp.record import redact_text

if TYPE_CHECKING:
    from optuna import Study
    from optuna.pruners import BasePruner
    from optuna.samplers import BaseSampler
    from optuna.storages import BaseStorage

JOURNAL = "study.journal"
SQLITE = "study.db"
# A study server (mgm_exp.study_server): Optuna's gRPC proxy in front of a database.
GRPC = "grpc://"
# A writer of SQLite waits so long for another one.
_SQLITE_TIMEOUT_S = 60.0
_SERVER_TIMEOUT_S = 10.0


def storage_place(wanted: str | None, folder: Path) -> str:
    """``sweep.storage`` as a path or URL that means the same in every process.

    Args:
        wanted: None: the journal in ``folder``; ``sqlite``: a database in it; a path of a journal; a URL.
        folder: The sweep's folder.
    """
    if wanted is None:
        return str(folder / JOURNAL)
    if wanted == "sqlite":
        return f"sqlite:///{folder / SQLITE}"
    if wanted.startswith("sqlite:///"):
        path = wanted.removeprefix("sqlite:///")
        return wanted if path.startswith("/") or not path else f"sqlite:///{Path(path).absolute()}"
    return wanted if "://" in wanted else str(Path(wanted).expanduser().absolute())


def open_storage(place: str) -> BaseStorage:
    """The storage at a place; see :func:`storage_place`.

    Raises:
        ConfigError: it is no URL of a database.
        MissingDependencyError: its driver is not installed.
        UserError: the database does not answer, or the file cannot be written.
    """
    quiet()
    if "://" not in place:
        from optuna.storages import JournalStorage

        from mgm_exp.search.journal import StudyJournal

        path = Path(place)
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            return JournalStorage(StudyJournal(path))
        except PermissionError as error:
            raise UserError(f"sweep.storage={path} cannot be written ({error.strerror}).") from error
    return _server(place) if place.startswith(GRPC) else open_database(place)


def _server(url: str) -> BaseStorage:
    from optuna.storages import GrpcStorageProxy

    host, _, port = url.removeprefix(GRPC).rstrip("/").rpartition(":")
    if not host or not port.isdecimal() or "@" in host:
        raise ConfigError(
            f"sweep.storage={redact_text(url)} is no address of a study server: grpc://HOST:PORT is one.",
            advice="mgm-exp study-server DATABASE starts one and says its address.",
        )
    try:
        storage = GrpcStorageProxy(host=host, port=int(port))
        storage.wait_server_ready(_SERVER_TIMEOUT_S)
    except ImportError as error:
        raise MissingDependencyError(
            f"sweep.storage={url} needs the package grpcio, which is not installed.", advice="pip install grpcio"
        ) from error
    except ConnectionError as error:
        raise UserError(
            f"sweep.storage={url}: no study server answers there within {_SERVER_TIMEOUT_S:g} s.",
            advice="Start it with mgm-exp study-server DATABASE --host ADDRESS; check name, port and firewall.",
        ) from error
    return storage


def open_database(url: str) -> BaseStorage:
    """The storage in a database; raises as :func:`open_storage`."""
    from optuna.storages import RDBStorage
    from sqlalchemy.exc import ArgumentError, NoSuchModuleError, OperationalError

    shown = redact_text(url)
    settings: dict[str, Any] = {"pool_pre_ping": True}
    if url.startswith("sqlite"):
        settings = {"connect_args": {"timeout": _SQLITE_TIMEOUT_S}}
    try:
        return RDBStorage(url, engine_kwargs=settings)
    except ImportError as error:
        raise MissingDependencyError(
            f"sweep.storage={shown} needs a driver that is not installed: {str(error).splitlines()[0]}",
            advice="For PostgreSQL: pip install 'psycopg[binary]' and postgresql+psycopg://HOST/DATABASE.",
        ) from error
    except (ArgumentError, NoSuchModuleError, ValueError) as error:
        raise ConfigError(
            f"sweep.storage={shown} is no database URL ({str(error).splitlines()[0]}).",
            advice="Leave it out (a file in the sweep's folder), or give sqlite, sqlite:///FILE or "
            "postgresql+psycopg://HOST/DATABASE.",
        ) from error
    except OperationalError as error:
        raise UserError(
            f"sweep.storage={shown} does not answer: {redact_text(str(error.orig).splitlines()[0])}",
            advice="Check host, port, user and password (PGUSER, PGPASSWORD); nothing was started.",
        ) from error


def open_study(
    storage: BaseStorage,
    name: str,
    directions: Sequence[Direction],
    sampler: BaseSampler,
    pruner: BasePruner,
) -> Study:
    """The study of this name, made as needed.

    Raises:
        UserError: it is there, with other objectives.
    """
    import optuna

    wanted = [direction.value for direction in directions]
    directed = [optuna.study.StudyDirection[direction.name.upper()] for direction in directions]
    study = optuna.create_study(
        storage=storage, study_name=name, directions=directed, sampler=sampler, pruner=pruner, load_if_exists=True
    )
    there = [direction.name.lower() for direction in study.directions]
    if there != wanted:
        raise UserError(
            f"The study {name} was begun with the directions {there}, and now they are {wanted}.",
            advice="Give sweep.name=ANOTHER: a study keeps its objectives.",
        )
    return study


def trial_of(study: Study, number: int) -> Any:
    """The trial of a number, to go on with, in whatever process."""
    import optuna

    storage = study._storage
    trial_id = storage.get_trial_id_from_study_id_trial_number(study._study_id, number)
    return optuna.trial.Trial(study, trial_id)


def quiet() -> None:
    """Optuna says less: what a trial did is said by the sweep, in its own words."""
    import optuna

    optuna.logging.set_verbosity(optuna.logging.WARNING)
    warnings.filterwarnings("ignore", category=optuna.exceptions.ExperimentalWarning)
