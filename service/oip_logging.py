"""The log settings of the Open Inference Protocol: Triton's switches for Python's one level."""

import json
import logging
from typing import Any

from service.errors import InputError
from service.settings import Settings

_LEVELS = (("log_errors", logging.ERROR), ("log_warnings", logging.WARNING), ("log_info", logging.INFO))


def log_settings(settings: Settings) -> dict[str, Any]:
    """The settings as they are now."""
    level = logging.getLogger().getEffectiveLevel()
    return {
        "log_file": "",
        **{name: level <= least for name, least in reversed(_LEVELS)},
        "log_verbose_level": int(level <= logging.DEBUG),
        "log_format": settings.log_format,
    }


def wanted_level(wanted: dict[str, Any], settings: Settings) -> int:
    """The one level of Python's logging that the switches describe, those not given as they are. Raises InputError."""
    present = log_settings(settings)
    for name, value in wanted.items():
        if name not in present:
            raise InputError(
                "invalid_body", f"unknown log setting {name[:64]!a}; the settings are {', '.join(present)}"
            )
        if type(value) is not type(present[name]):
            raise InputError("invalid_body", f"log setting {name} must be like {json.dumps(present[name])}")
        if isinstance(value, str) and value != present[name]:
            raise InputError("not_implemented", f"log setting {name} cannot be changed while the service runs")
    described = {**present, **wanted}
    if described["log_verbose_level"]:
        off = next((name for name, _ in _LEVELS if wanted.get(name) is False), None)
        if off:
            raise InputError("invalid_body", f"log_verbose_level needs {off}; set log_verbose_level to 0 as well")
        return logging.DEBUG
    level = logging.CRITICAL
    switches = [described[name] for name, _ in _LEVELS]
    if sorted(switches, reverse=True) != switches:
        raise InputError("invalid_body", "log_info needs log_warnings, and log_warnings needs log_errors")
    for on, (_, least) in zip(switches, _LEVELS, strict=True):
        level = least if on else level
    return level
