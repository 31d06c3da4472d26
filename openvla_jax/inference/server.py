"""The policy over HTTP: `/act` as clients of OpenVLA and OpenVLA-OFT speak it, and paths for batches and operators.

Errors are real status codes with {"error": reason}. See docs/serving.md. `process.py` runs it.
"""

import asyncio
import concurrent.futures
import contextlib
import dataclasses
import hmac
import json
import logging
import time
from collections.abc import AsyncIterator, Awaitable, Callable
from typing import Any

import fastapi
import jax
import numpy as np
import prometheus_client
from fastapi import FastAPI, Response
from flax import nnx
from starlette.concurrency import run_in_threadpool
from starlette.requests import ClientDisconnect

import openvla_jax
from openvla_jax.checkpoint.contract import CheckpointError
from openvla_jax.errors import InputError, NonFiniteError
from openvla_jax.inference import wire
from openvla_jax.inference.batcher import Batcher, QueueFullError, StoppedError
from openvla_jax.inference.early import EarlyResponse
from openvla_jax.inference.policy import TEXT_LENGTHS, NonFiniteActionError, ObservationError, Policy, Request
from openvla_jax.inference.wire import BadRequestError
from openvla_jax.models.quantize import BlockedQTensor, QTensor, count_bytes

MAX_REASON = 500  # characters: reasons quote what was sent
LATENCY_BUCKETS = (0.002, 0.005, 0.01, 0.02, 0.05, 0.1, 0.2, 0.5, 1.0, 2.0, 5.0, 10.0)


@dataclasses.dataclass(frozen=True)
class Settings:
    max_batch: int = 16
    wait_ms: float = 4.0  # how long the first request of a batch waits for others
    max_queue: int = 64
    max_body_mb: float = 16.0
    body_seconds: float = 30.0  # within which a body must have arrived
    token: str | None = None  # clients send "Authorization: Bearer TOKEN"
    reference_errors: bool = False  # "error" with status 200, as the reference's server answers


class RefusedError(Exception):
    """A request that is answered with a status of its own; `early` if its body was not read to the end."""

    def __init__(self, status: int, reason: str, headers: dict[str, str] | None = None, early: bool = False):
        super().__init__(reason)
        self.status, self.headers, self.early = status, headers or {}, early


class Metrics:
    """Prometheus metrics of one server, in a registry of their own."""

    def __init__(self, policy: Policy):
        self.registry = prometheus_client.CollectorRegistry()
        made: dict[str, Any] = {"registry": self.registry}
        self.requests = prometheus_client.Counter("openvla_requests", "Requests", ["path", "status"], **made)
        self.latency = prometheus_client.Histogram(
            "openvla_request_seconds", "From the whole body read to the answer", buckets=LATENCY_BUCKETS, **made
        )
        self.waited = prometheus_client.Histogram(
            "openvla_queue_seconds", "Wait of a request for its batch", buckets=LATENCY_BUCKETS, **made
        )
        self.decode = prometheus_client.Histogram(
            "openvla_decode_seconds", "Decoding of a batch", buckets=LATENCY_BUCKETS, **made
        )
        self.batch = prometheus_client.Histogram(
            "openvla_batch_size", "Requests in a batch", buckets=(1, 2, 4, 8, 16, 32, 64), **made
        )
        self.waiting = prometheus_client.Gauge("openvla_waiting_requests", "Requests in the queue", **made)
        for name, what, read in (
            ("openvla_action_tokens_total", "Action tokens decoded", lambda: policy.decoded_tokens),
            ("openvla_action_tokens_outside_total", "Of which the free argmax was none", lambda: policy.outside_tokens),
            (
                "openvla_compiled_programs",
                "Shapes compiled; more after the start is a stall",
                lambda: len(policy.programs),
            ),
        ):
            prometheus_client.Gauge(name, what, **made).set_function(read)

    def observe(self, size: int, waited: Any, took: float) -> None:
        self.batch.observe(size)
        self.decode.observe(took)
        for seconds in waited:
            self.waited.observe(seconds)


def make_app(policy: Policy, settings: Settings | None = None) -> FastAPI:
    """The application: warm up the policy first (`warm_up`), or the first requests wait for compilation."""
    settings = settings or Settings()
    metrics = Metrics(policy)
    batcher = Batcher(policy, settings.max_batch, settings.wait_ms / 1000, settings.max_queue, metrics.observe)
    metrics.waiting.set_function(lambda: batcher.waiting)
    limit = int(settings.max_body_mb * 2**20)

    @contextlib.asynccontextmanager
    async def lifespan(app: FastAPI) -> AsyncIterator[None]:
        yield
        await run_in_threadpool(batcher.stop)

    app = FastAPI(title="openvla_jax", lifespan=lifespan, docs_url=None, redoc_url=None, openapi_url=None)
    app.state.batcher = batcher

    def prepare(payload: dict[str, Any]) -> Request:
        return policy.prepare(wire.read_observation(payload, policy.contract.observation.cameras))

    def asked_for(payload: dict[str, Any], chunk: np.ndarray) -> np.ndarray:
        """Returns the first action for a request with `image`, as OpenVLA's server, else all, as OpenVLA-OFT's."""
        return chunk[0] if "image" in payload else chunk

    async def decide(requests: list[Request]) -> list[np.ndarray]:
        if len(requests) > settings.max_queue:
            raise RefusedError(413, f"{len(requests)} requests in one body: at most {settings.max_queue}")
        try:
            futures = batcher.submit(requests)
        except QueueFullError as error:
            raise RefusedError(503, f"{error}: try again", {"Retry-After": "1"}) from None
        except StoppedError as error:
            raise RefusedError(503, str(error), {"Retry-After": "10"}) from None
        return await asyncio.gather(*map(_chunk, range(len(futures)), futures))

    async def act(body: bytes) -> Response:
        def read() -> tuple[Request, dict[str, Any], bool]:
            payload, encoded = wire.read_payload(wire.loads(body))
            return prepare(payload), payload, encoded

        request, payload, encoded = await run_in_threadpool(read)
        (chunk,) = await decide([request])
        answer = asked_for(payload, chunk)
        # In kind: clients that send an array get arrays back, those that send a picture read plain numbers.
        if not encoded and not any(isinstance(value, dict) for value in wire.image_values(payload).values()):
            return _json(answer.tolist())
        value = answer if answer.ndim == 1 else list(answer)  # OpenVLA-OFT's clients take a list of arrays
        return _json(wire.dumps(value) if encoded else value)

    async def act_batch(body: bytes) -> Response:
        def read() -> tuple[list[Request], list[dict[str, Any]]]:
            value = wire.loads(body)
            if not isinstance(value, dict) or set(value) != {"requests"} or not isinstance(value["requests"], list):
                raise BadRequestError('send {"requests": [{image, instruction, ...}, ...]}')
            if not value["requests"]:
                raise BadRequestError("'requests' is empty")
            prepared, payloads = [], []
            for row, item in enumerate(value["requests"]):
                try:
                    payloads.append(wire.read_payload(item)[0])
                    prepared.append(prepare(payloads[-1]))
                except InputError as error:
                    raise BadRequestError(f"request {row}: {error}") from None
            return prepared, payloads

        requests, payloads = await run_in_threadpool(read)
        chunks = await decide(requests)
        return _json({"actions": [asked_for(*row).tolist() for row in zip(payloads, chunks, strict=True)]})

    async def info(body: bytes) -> Response:
        return _json(describe(policy, settings))

    async def prometheus(body: bytes) -> Response:
        text = prometheus_client.generate_latest(metrics.registry)
        return Response(text, media_type=prometheus_client.CONTENT_TYPE_LATEST)

    def route(method: str, path: str, handle: Callable[[bytes], Awaitable[Response]]) -> None:
        async def endpoint(request: fastapi.Request) -> Response:
            response = await _answer(request, handle, settings, limit, metrics)
            if method == "POST":
                metrics.requests.labels(path, str(response.status_code)).inc()
            return response

        app.add_route(path, endpoint, methods=[method])  # FastAPI's own kind takes longer, to find what to inject

    route("POST", "/act", act)
    route("POST", "/act_batch", act_batch)
    route("GET", "/info", info)
    route("GET", "/metrics", prometheus)

    @app.get("/health", response_model=None)
    async def health() -> Response:
        return _json({"status": "ok"})

    return app


async def _chunk(row: int, future: "concurrent.futures.Future[np.ndarray]") -> np.ndarray:
    try:
        return await asyncio.wrap_future(future)
    except NonFiniteActionError as error:
        raise NonFiniteActionError(f"request {row}: {error}") from None


async def _answer(
    request: fastapi.Request,
    handle: Callable[[bytes], Awaitable[Response]],
    settings: Settings,
    limit: int,
    metrics: Metrics,
) -> Response:
    """Returns the handler's response, or an error response with the reason."""
    posted, early, headers = request.method == "POST", False, {}
    try:
        if not _authorized(request, settings):
            raise RefusedError(401, "a bearer token is needed", {"WWW-Authenticate": "Bearer"}, early=True)
        body = await _read_body(request, limit, settings.body_seconds)
        began = time.perf_counter()
        response = await handle(body)
        if posted:
            metrics.latency.observe(time.perf_counter() - began)
        return response
    except RefusedError as error:
        status, reason, headers, early = error.status, str(error), error.headers, error.early
    except ClientDisconnect:  # nobody reads this answer
        status, reason = 400, "the connection was closed before the body had arrived"
    except (BadRequestError, ObservationError) as error:
        status, reason = 400, str(error)
    except (NonFiniteError, CheckpointError) as error:  # the policy is at fault
        logging.error("a request failed: %s", error)
        status, reason = 500, str(error)
    except InputError as error:  # the policy's own refusals: key, instruction
        status, reason = 422, str(error)
    except Exception:
        logging.exception("a request failed")
        status, reason = 500, "internal error; the server's log has it"
    if settings.reference_errors and posted and status != 401:
        return _json("error")
    content = {"error": reason if len(reason) <= MAX_REASON else f"{reason[:MAX_REASON]}..."}
    return EarlyResponse(wire.dumps(content), status, headers) if early else _json(content, status, headers)


async def _read_body(request: fastapi.Request, limit: int, seconds: float) -> bytes:
    declared = request.headers.get("content-length", "")
    too_large = f"the body is larger than {limit} bytes (--max_body_mb)"
    if declared.isdecimal() and int(declared[:20]) > limit:
        raise RefusedError(413, too_large, early=True)
    parts, size, more = [], 0, True
    try:
        async with asyncio.timeout(seconds):
            while more:
                message = await request.receive()
                if message["type"] == "http.disconnect":
                    raise ClientDisconnect
                more = message.get("more_body", False)
                parts.append(message.get("body", b""))
                size += len(parts[-1])
                if size > limit:
                    raise RefusedError(413, too_large, early=more)
    except TimeoutError:
        raise RefusedError(408, f"the body did not arrive within {seconds:g} s", early=True) from None
    return b"".join(parts)


def _authorized(request: fastapi.Request, settings: Settings) -> bool:
    if settings.token is None:
        return True
    given = request.headers.get("authorization", "").encode("latin-1", "replace")
    return hmac.compare_digest(given, f"Bearer {settings.token}".encode())


def _json(value: Any, status: int = 200, headers: dict[str, str] | None = None) -> Response:
    return Response(wire.dumps(value), status, headers, media_type="application/json")


# ---------------------------------------------------------------------------------------------------------------------
# Before and about
# ---------------------------------------------------------------------------------------------------------------------


def warm_up(policy: Policy, max_batch: int, log: Callable[[str], None] = print) -> float:
    """Runs every shape that requests can ask for once, so that none waits for compilation; returns seconds."""
    began, contract = time.perf_counter(), policy.contract
    sizes = sorted({min(2**n, max_batch) for n in range(max_batch.bit_length() + 1)})
    by_dim = {contract.action_dim(key): key for key in contract.statistics}
    for dim, key in sorted(by_dim.items()):
        shortest = policy.blank_request(dataset=key)
        longest = contract.preprocessing.text_length - dim * contract.action.horizon - 1
        buckets = [
            length
            for shorter, length in zip((0, *TEXT_LENGTHS), TEXT_LENGTHS, strict=False)
            if shorter < longest and length >= len(shortest.prompt)
        ]
        for bucket in buckets:
            length = min(bucket, longest)
            prompt = (shortest.prompt * length)[:length]
            for batch in sizes:
                policy.act([dataclasses.replace(shortest, prompt=prompt)], batch)
                log(f"warm: batch {batch}, text {bucket}, {dim} dimensions ({time.perf_counter() - began:.1f} s)")
    policy.reset_counters()
    return time.perf_counter() - began


def describe(policy: Policy, settings: Settings) -> dict[str, Any]:
    """What `/info` says: the contract, and how it is served."""
    contract, device = policy.contract, jax.local_devices()[0]
    modules = (module for _, module in nnx.iter_modules(policy.model))
    kinds = {module.kind for module in modules if isinstance(module, QTensor | BlockedQTensor)}
    return {
        "model": contract.model.to_dict(),
        "observation": dataclasses.asdict(contract.observation),
        "action": dataclasses.asdict(contract.action),
        "preprocessing": dataclasses.asdict(contract.preprocessing),
        "statistics": {
            key: {"action_dim": contract.action_dim(key), "action": stats["action"]}
            for key, stats in contract.statistics.items()
        },
        # Settings may be infinite, and then become text.
        "training": json.loads(json.dumps(dict(contract.training), default=str), parse_constant=str),
        "device": f"{device.platform}: {device.device_kind}",
        "devices": len(jax.tree.leaves(policy.model)[0].devices()),
        "dtype": str(policy.model.dtype),
        "quantization": kinds.pop() if kinds else None,
        "weight_bytes": count_bytes(policy.model),
        "constrained": policy.constrained,
        "max_batch": settings.max_batch,
        "version": openvla_jax.__version__,
    }
