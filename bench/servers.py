"""The servers that `serve.py` compares, each in a process of its own: one artefact, other servers.

    AD2KIT_BENCH_MODEL=FOLDER AD2KIT_BENCH_WORKERS=2 python bench/servers.py NAME --port PORT

`uvicorn` is ad2kit's engine and batcher behind plain uvicorn and no framework: what BentoML's
layers are measured against. The others are what their documentation shows for such a model, with
the same artefact, one thread for each worker, batches of up to 32, and a millisecond of waiting for
a batch to fill where that can be set. `stock BentoML` is BentoML's own batching as it comes (one
worker, and requests that it predicts to be late get 503); `BentoML, fitted` has a worker for each
core, batches of 32 and no such hurry. All answer {"label": ..., ...} or a list of it.
"""

from __future__ import annotations

import argparse
import json
import os
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from collections.abc import Callable

MODEL = Path(os.environ.get("AD2KIT_BENCH_MODEL", "."))
WORKERS = int(os.environ.get("AD2KIT_BENCH_WORKERS", "1"))
BATCH = 32


def classifier() -> Any:
    """Return the engine on one thread."""
    from ad2kit.exporting.classifier import OnnxClassifier

    return OnnxClassifier(MODEL, threads=1)


def uvicorn_app() -> Any:
    """Return ad2kit's engine and batcher as a bare ASGI application."""
    from ad2kit.service.batcher import Batcher

    engine = classifier()
    batcher = Batcher(engine.run, max_batch_tokens=4096, max_queue_texts=1024)

    async def app(scope: Any, receive: Any, send: Any) -> None:
        if scope["type"] != "http":
            return
        body, more = b"", True
        while more:
            message = await receive()
            body += message.get("body", b"")
            more = message.get("more_body", False)
        encodings = engine.encode(json.loads(body)["texts"])
        logits = await batcher.submit(encodings)
        found = [each.as_dict() for each in engine.predictions(encodings, logits)]
        content = json.dumps({"predictions": found}).encode()
        headers = [
            (b"content-type", b"application/json"),
            (b"content-length", str(len(content)).encode()),
        ]
        await send({"type": "http.response.start", "status": 200, "headers": headers})
        await send({"type": "http.response.body", "body": content})

    return app


def fastapi_app() -> Any:
    """Return FastAPI around a transformers pipeline that runs the artefact by optimum."""
    import onnxruntime
    from fastapi import FastAPI
    from optimum.onnxruntime import ORTModelForSequenceClassification
    from transformers import AutoTokenizer, pipeline

    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = 1
    model = ORTModelForSequenceClassification.from_pretrained(
        MODEL, session_options=options, trust_remote_code=False
    )
    tokenizer = AutoTokenizer.from_pretrained(MODEL, trust_remote_code=False)
    pipe = pipeline("text-classification", model=model, tokenizer=tokenizer)
    app = FastAPI()

    @app.post("/classify")  # type: ignore[untyped-decorator]
    def classify(request: dict[str, Any]) -> Any:
        return pipe(request["text"], truncation=True)

    return app


def run_uvicorn(port: int) -> None:
    """Serve an application of this file by several workers of uvicorn."""
    import uvicorn

    name = "uvicorn_app" if sys.argv[1] == "uvicorn" else "fastapi_app"
    sys.path.insert(0, str(Path(__file__).parent))
    uvicorn.run(
        f"servers:{name}",
        factory=True,
        port=port,
        workers=WORKERS,
        log_level="warning",
        access_log=False,
    )


def run_litserve(port: int) -> None:
    """Serve by LitServe with its batching."""
    import litserve
    from server_litserve import Api  # its processes import what they serve

    server = litserve.LitServer(
        Api(max_batch_size=BATCH, batch_timeout=0.001, api_path="/classify"),
        accelerator="cpu",
        workers_per_device=WORKERS,
    )
    server.run(port=port, generate_client_file=False, log_level="warning")


def run_mosec(port: int) -> None:
    """Serve by mosec, whose HTTP layer is native code."""
    sys.argv = ["mosec", "--port", str(port), "--timeout", "30000", "--log-level", "error"]
    from mosec import Runtime, Server
    from server_mosec import Inference

    server = Server()
    server.register_runtime(
        {"/classify": [Runtime(Inference, num=WORKERS, max_batch_size=BATCH, max_wait_time=1)]}
    )
    server.run()


STOCK = """
import bentoml, servers

@bentoml.service({service})
class Stock:
    def __init__(self) -> None:
        self.engine = servers.classifier()

    @bentoml.api({api}, route="/classify")
    def classify(self, texts: list[str]) -> list[dict]:
        return [each.as_dict() for each in self.engine.predict(texts)]
"""


def run_stock(port: int) -> None:
    """Serve by BentoML with the batching that it has built in: as it comes, or fitted."""
    folder = Path(os.environ["AD2KIT_BENCH_SCRATCH"])
    service, api = "", "batchable=True"
    if sys.argv[1] == "BentoML, fitted":
        service = f"workers={WORKERS}, traffic={{'timeout': 30}}"
        api += f", max_batch_size={BATCH}"
    (folder / "stock.py").write_text(STOCK.format(service=service, api=api))
    path = os.pathsep.join([str(Path(__file__).parent), os.environ.get("PYTHONPATH", "")])
    os.chdir(folder)
    os.execve(  # noqa: S606
        sys.executable,
        [sys.executable, "-m", "bentoml", "serve", "stock:Stock", "--port", str(port)],
        {**os.environ, "PYTHONPATH": path, "BENTOML_DO_NOT_TRACK": "true"},
    )


SERVERS: dict[str, Callable[[int], None]] = {
    "uvicorn": run_uvicorn,
    "stock BentoML": run_stock,
    "BentoML, fitted": run_stock,
    "FastAPI + pipeline": run_uvicorn,
    "LitServe": run_litserve,
    "mosec": run_mosec,
}


def main() -> None:
    """Serve until told to stop."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("name", choices=SERVERS)
    parser.add_argument("--port", type=int, required=True)
    arguments = parser.parse_args()
    SERVERS[arguments.name](arguments.port)


if __name__ == "__main__":
    main()
