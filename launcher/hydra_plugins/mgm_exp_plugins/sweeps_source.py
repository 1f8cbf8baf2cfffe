"""Config source ``mgm-sweeps://``: makes the files of ``sweeps/`` the choices of the group ``sweeps``.

``sweeps/`` lies beside ``conf/`` so that ready-made sweeps are found at first sight; the repository root itself cannot
be a search path, for its other folders would show up as groups.
"""

from __future__ import annotations

from hydra.core.object_type import ObjectType
from hydra.plugins.config_source import ConfigLoadError, ConfigResult, ConfigSource

GROUP = "sweeps"


class SweepsConfigSource(ConfigSource):
    """Reads ``sweeps/NAME.yaml`` as the choice ``NAME`` of the group ``sweeps``."""

    def __init__(self, provider: str, path: str) -> None:
        from hydra._internal.core_plugins.file_config_source import FileConfigSource

        from mgm_exp.bootstrap import SWEEPS

        super().__init__(provider=provider, path=path)
        self.files = FileConfigSource(provider=provider, path=f"file://{SWEEPS}")

    @staticmethod
    def scheme() -> str:
        return "mgm-sweeps"

    def available(self) -> bool:
        return self.files.available()

    def load_config(self, config_path: str) -> ConfigResult:
        inside = _inside(config_path)
        if inside is None:
            raise ConfigLoadError(f"Config not found : {config_path}")
        result = self.files.load_config(inside)
        result.path = f"{self.scheme()}://"
        return result

    def is_group(self, config_path: str) -> bool:
        inside = _inside(config_path)
        return config_path == "" or inside == "" or (inside is not None and self.files.is_group(inside))

    def is_config(self, config_path: str) -> bool:
        inside = _inside(config_path)
        return bool(inside) and self.files.is_config(str(inside))

    def list(self, config_path: str, results_filter: ObjectType | None) -> list[str]:
        if config_path == "":
            return [] if results_filter == ObjectType.CONFIG else [GROUP]
        inside = _inside(config_path)
        return [] if inside is None else self.files.list(inside, results_filter)


def _inside(config_path: str) -> str | None:
    """The path below ``sweeps/``; None where it lies elsewhere."""
    if config_path == GROUP:
        return ""
    return config_path[len(GROUP) + 1 :] if config_path.startswith(GROUP + "/") else None
