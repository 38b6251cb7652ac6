"""What a serving process tells its operators beside its metrics: log lines of JSON, and traces.

Nothing here sees a client's text.
"""

from __future__ import annotations

import logging
import os
from typing import Any

from bentoml.exceptions import InvalidArgument
from pythonjsonlogger.core import RESERVED_ATTRS
from pythonjsonlogger.json import JsonFormatter

# What BentoML's filter adds to format its own lines with.
_THEIRS = ("component", "levelname_bracketed", "trace_msg", "service_name")


def log_as_json() -> None:
    """Give the handlers that BentoML has set up for this process a formatter of JSON lines."""
    formatter = JsonFormatter(
        "{asctime}{levelname}{name}{process}{message}",
        style="{",
        datefmt="%Y-%m-%dT%H:%M:%S%z",
        rename_fields={"asctime": "time", "levelname": "level", "name": "logger"},
        reserved_attrs=[*RESERVED_ATTRS, *_THEIRS],
    )
    for name in (None, "bentoml", "uvicorn.error"):
        for handler in logging.getLogger(name).handlers:
            handler.setFormatter(formatter)
    logging.getLogger("ad2kit").setLevel(logging.INFO)


def tracing() -> dict[str, Any]:
    """Return BentoML's tracing: to the collector that OpenTelemetry's own variables name, or none.

    Spans cost a fifth of the event loop's time even where nobody collects them.

    Raises:
        InvalidArgument: a share of requests that is no number in [0, 1].
    """
    base = os.environ.get("OTEL_EXPORTER_OTLP_ENDPOINT", "").rstrip("/")
    endpoint = os.environ.get("OTEL_EXPORTER_OTLP_TRACES_ENDPOINT", base and f"{base}/v1/traces")
    if not endpoint:
        return {"excluded_urls": [".*"]}
    share = os.environ.get("OTEL_TRACES_SAMPLER_ARG", "1")
    try:
        rate = float(share)
    except ValueError:
        rate = -1.0
    if not 0 <= rate <= 1:
        raise InvalidArgument(
            f"OTEL_TRACES_SAMPLER_ARG is the share of requests that is traced, expected a number "
            f"from 0 to 1, found {share!r}"
        )
    collector = {"protocol": "http", "endpoint": endpoint}
    return {"exporter_type": "otlp", "sample_rate": rate, "otlp": collector}
