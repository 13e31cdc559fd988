"""Serving: three Ray Serve deployments behind OpenAI's chat protocol.

    client ─► front ─► Api (checks, fetches, formats) ─► Decoder (an engine) ─► deltas back
                            └─► VisionEncoder (tower, projector, cache) ─┘ embeddings, by reference

`Api` never holds an embedding: the encoder answers with a reference, which it hands to the decoder. Requests without an
image never touch the encoder. With `colocate` the decoder's process encodes too, and there is no second deployment.

The stages themselves are `pipelines.stages`; pixels, prompts and sampling are `artemis_vlm`.
"""

from __future__ import annotations

import asyncio
import inspect
import logging
import os
import shutil
import signal
import tempfile
import threading
import time
import uuid
from collections.abc import AsyncGenerator, Callable, Coroutine, Iterator, Mapping
from contextlib import ExitStack, aclosing, contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any, Final, TypeVar

from fastapi import FastAPI, Request
from fastapi.responses import HTMLResponse, JSONResponse, Response, StreamingResponse
from ray import serve
from ray.exceptions import ActorDiedError, ActorUnavailableError, ObjectLostError, RayActorError, RayError, RayTaskError
from ray.serve.context import _get_global_client  # nothing public tells where Serve listens
from ray.serve.exceptions import BackPressureError, DeploymentUnavailableError, RayServeException
from ray.util import metrics

from artemis_vlm.engines import EngineConfig
from artemis_vlm.errors import RunError, SampleError
from artemis_vlm.graft import load_config
from pipelines import openai
from pipelines.door import Door, Doors
from pipelines.fetch import FetchConfig, Fetcher
from pipelines.front import Front, FrontConfig, Refusal
from pipelines.guard import Guard, Keys, error_response
from pipelines.local import ROOM_TIMEOUT_S, check_room, free_ports, is_alone, join_or_start
from pipelines.machine import check_device
from pipelines.openai import AnswerFormat, ApiError, ChatRequest
from pipelines.stages import API_CPUS, SECONDS, Decoder, Grown, Job, ServeConfig, Stage, TooLong, VisionEncoder
from pipelines.storage import fetch_model, is_remote, local_path

logger = logging.getLogger("ray.serve")
T = TypeVar("T")

APP: Final = "a3"
#: A rolling update starts a new replica before it ends an old one; if the new one fails, the old ones go on.
SURGE_PERCENT: Final = 25
PAGE: Final = Path(__file__).with_name("page.html")
#: How Ray Serve runs the replicas: one event loop for requests, calls and Serve itself, since nothing here blocks it; logs
#: in files alone, written when there are many. Half the time of a request that computes nothing.
REPLICA_ENV: Final = {
    "RAY_SERVE_RUN_USER_CODE_IN_SEPARATE_THREAD": "0",
    "RAY_SERVE_RUN_ROUTER_IN_SEPARATE_LOOP": "0",
    "RAY_SERVE_LOG_TO_STDERR": "0",
    "RAY_SERVE_REQUEST_PATH_LOG_BUFFER_SIZE": "1000",
}
#: Seconds between looks at which stages are up.
WATCH_S: Final = 0.25
#: What a call raises when the replica behind it has gone.
GONE: Final = (ActorDiedError, ActorUnavailableError, RayActorError, ObjectLostError)


@serve.deployment
@serve.ingress()
class Api:
    """HTTP in, HTTP out. Holds no weights and no pixels."""

    def __init__(self, config: ServeConfig, decoder: Any, encoder: Any = None, doors: str = "") -> None:
        self.config, self.decoder, self.encoder = config, decoder, encoder
        self.doors = doors
        self.door: Door | None = None
        self.fetcher = Fetcher(config.fetch)
        self.started = int(time.time())
        self.running = 0
        #: Replicas that run, by deployment; empty until the first look.
        self.stages: dict[str, int] = {}
        self.watcher: asyncio.Task[None] | None = None
        self.requests = metrics.Counter("a3_requests", "Chat requests with a key, by status.", ("status",))
        self.seconds = metrics.Histogram("a3_request_seconds", "From request to the end of its answer.", SECONDS)
        self.first_token = metrics.Histogram("a3_first_token_seconds", "From request to the first text.", SECONDS)
        self.in_flight = metrics.Gauge("a3_requests_running", "Requests that run or wait in this Api.")

    async def __serve_build_asgi_app__(self) -> Any:
        # Plain routes: Serve ships this class without the names that only its annotations use, which FastAPI would read.
        app = FastAPI(docs_url=None, redoc_url=None, openapi_url=None)
        app.add_route("/", self.page, methods=["GET"])
        app.add_route("/health", self.health, methods=["GET"])
        app.add_route("/ready", self.ready, methods=["GET"])
        app.add_route("/v1/models", self.models, methods=["GET"])
        app.add_route("/v1/models/{name:path}", self.model, methods=["GET"])
        app.add_route("/v1/chat/completions", self.chat, methods=["POST"])
        app.add_exception_handler(ApiError, lambda _, error: error_response(error))
        app.add_exception_handler(404, lambda *_: error_response(ApiError(404, "there is nothing at this path")))
        app.add_exception_handler(405, _other_method)
        guarded = Guard(app, Keys(self.config.key_hashes), self.config.max_body_bytes, self.config.body_timeout_s)
        if os.path.isdir(self.doors):  # else the front is on another node
            self.door = Door(Path(self.doors), guarded)
            await self.door.open()
        return guarded

    async def __del__(self) -> None:
        if self.door is not None:
            await self.door.close()

    async def page(self, _: Request) -> Response:
        policy = "default-src 'none'; style-src 'unsafe-inline'; script-src 'unsafe-inline'; connect-src 'self'; "
        policy += "img-src blob: data:"
        text = PAGE.read_text().replace("{{MODEL}}", _html(self.config.model_name))
        return HTMLResponse(text, headers={"Content-Security-Policy": policy, "X-Content-Type-Options": "nosniff"})

    async def health(self, _: Request) -> Response:
        return JSONResponse({"status": "ok"})

    async def ready(self, _: Request) -> Response:
        """200 when every stage has a replica; says which has not."""
        await self._watch()
        missing = [stage for stage in self._needed() if not self.stages.get(stage)]
        return JSONResponse({"ready": not missing, "missing": missing}, 503 if missing else 200)

    async def models(self, _: Request) -> Response:
        return JSONResponse({"object": "list", "data": [self._model_card()]})

    async def model(self, request: Request) -> Response:
        self._check_model(request.path_params["name"])
        return JSONResponse(self._model_card())

    async def chat(self, request: Request) -> Response:
        started = time.perf_counter()
        if self.watcher is None:
            self.watcher = asyncio.create_task(self._keep_watch())
        asked = await self._asked(request)
        answer = AnswerFormat(f"chatcmpl-{uuid.uuid4().hex}", self.config.model_name)
        if not asked.stream:
            with self._turn(started):
                grown = await self._guarded(self._complete(asked, answer.id), asked, started)
            reason = grown.finish_reason or "stop"
            return JSONResponse(answer.whole(grown.pieces, reason, grown.usage))
        stream = self._stream(asked, answer, started)
        first = await anext(stream)  # what fails before the first text has a status of its own
        return StreamingResponse(
            _chained(first, stream), media_type="text/event-stream", headers={"Cache-Control": "no-store"}
        )

    async def _asked(self, request: Request) -> ChatRequest:
        try:
            # Also keeps other sites' pages out, whose forms cannot send this type unasked.
            if request.headers.get("content-type", "").split(";")[0].strip().lower() != "application/json":
                raise ApiError(400, "the Content-Type must be application/json")
            asked = openai.parse_chat(await request.body())
            self._check_model(asked.model)
        except ApiError as error:
            self.requests.inc(tags={"status": str(error.status)})
            raise
        return asked

    async def _stream(self, asked: ChatRequest, answer: AnswerFormat, started: float) -> AsyncGenerator[str, None]:
        shown = False
        try:
            with self._turn(started):
                async with aclosing(self._grow(asked, answer.id, started)) as source:
                    async for grown in source:
                        text = _events(asked, answer, grown)
                        if not shown:
                            self.first_token.observe(time.perf_counter() - started)
                            text = answer.first() + text
                        shown = True
                        yield text
        except ApiError as error:
            if not shown:
                raise
            # The status is out already: an event says that the answer is not whole, and no [DONE] follows.
            yield openai.event(error.body())

    async def _grow(self, asked: ChatRequest, answer_id: str, started: float) -> AsyncGenerator[Grown, None]:
        """The decoder's stream, started anew once if its replica goes before the first text."""
        for attempt in (1, 2):
            calls: list[Any] = []
            shown = ended = False
            try:
                stream = await self._guarded(self._start(asked, answer_id, calls, stream=True), asked, started)
                while not ended:
                    grown = await self._guarded(anext(stream), asked, started)
                    ended = grown.finish_reason is not None
                    yield grown
                    shown = True
                return
            except ApiError as error:
                if shown or attempt == 2 or error.code != "replica_gone":
                    raise
            finally:
                if not ended:
                    _cancel(calls)

    async def _complete(self, asked: ChatRequest, answer_id: str) -> Grown:
        """The decoder's whole answer, asked for anew once if a replica goes."""
        for attempt in (1, 2):
            calls: list[Any] = []
            done = False
            try:
                response = await self._start(asked, answer_id, calls, stream=False)
                grown: Grown = await response
                done = True
                return grown
            except (*GONE, RayTaskError, RayServeException) as error:
                if attempt == 2 or not isinstance(_cause(error), GONE):
                    raise
                logger.warning("a replica went while %s ran; trying once more", answer_id)
            finally:
                if not done:
                    _cancel(calls)
        raise AssertionError("unreachable")

    async def _start(self, asked: ChatRequest, answer_id: str, calls: list[Any], stream: bool) -> Any:
        """Sends a request to both stages; every call made is put in `calls`."""
        images: list[Any] = [await self._image(url) for url in asked.image_urls()]
        if images and self.encoder is not None:
            # As arguments these are references, and Serve asks the decoder when the embeddings are there: its load counts
            # no request that waits for them.
            images = [self.encoder.encode.remote(data) for data in images]
            calls += images
        job = job_of(asked, answer_id)
        if stream:
            response = self.decoder.options(stream=True).generate.remote(job, *images)
        else:
            response = self.decoder.complete.remote(job, *images)
        calls.append(response)
        return response

    async def _image(self, url: str) -> bytes:
        if url[:5].lower() == "data:":
            return await asyncio.to_thread(openai.image_of_data_uri, url)
        return await self.fetcher.fetch(url)

    async def _guarded(self, work: Any, asked: ChatRequest, started: float) -> Any:
        """Awaits within the request's deadline and while there is an encoder for its images; errors as the client's."""
        task = asyncio.ensure_future(work)
        images = bool(self.encoder is not None and asked.image_urls())
        try:
            while not task.done():
                if images and self.stages.get("VisionEncoder") == 0:
                    raise ApiError(
                        503, "no vision encoder is running; text alone still works", code="unavailable", retry_after=5
                    )
                left = self.config.deadline_s - (time.perf_counter() - started)
                if left <= 0:
                    raise ApiError(504, f"the answer was not complete within {self.config.deadline_s:g} s", code="timeout")
                await asyncio.wait([task], timeout=min(left, WATCH_S))
            return task.result()
        except ApiError:
            raise
        except StopAsyncIteration:
            raise ApiError(503, "the answer broke off", code="replica_gone", retry_after=1) from None
        except Exception as error:
            raise api_error(error) from error
        finally:
            if not task.done():
                task.cancel()

    @contextmanager
    def _turn(self, started: float) -> Iterator[None]:
        """One of the requests that may run at once."""
        if self.running >= self.config.max_requests:
            self.requests.inc(tags={"status": "429"})
            raise ApiError(429, "the server is at its limit of requests; try again in a moment", retry_after=1)
        self.running += 1
        self.in_flight.set(self.running)
        status = "499"  # the client left
        try:
            yield
            status = "200"
        except ApiError as error:
            status = str(error.status)
            raise
        finally:
            self.running -= 1
            self.in_flight.set(self.running)
            self.requests.inc(tags={"status": status})
            self.seconds.observe(time.perf_counter() - started)

    async def _keep_watch(self) -> None:
        while True:
            try:
                await self._watch()
            except Exception:
                logger.exception("could not ask which stages are up")
            await asyncio.sleep(WATCH_S)

    async def _watch(self) -> None:
        status = await asyncio.to_thread(serve.status)
        application = status.applications.get(serve.get_replica_context().app_name)
        deployments = application.deployments if application else {}
        self.stages = {name: d.replica_states.get("RUNNING", 0) for name, d in deployments.items()}

    def _needed(self) -> list[str]:
        return ["Decoder"] + ([] if self.encoder is None else ["VisionEncoder"])

    def _check_model(self, name: str) -> None:
        if name != self.config.model_name:
            message = f"this server has no model {name[:80]!r}; it has {self.config.model_name!r}"
            raise ApiError(404, message, "model", "model_not_found")

    def _model_card(self) -> dict[str, Any]:
        return {"id": self.config.model_name, "object": "model", "created": self.started, "owned_by": "artemis-vlm"}


def _other_method(_: Request, error: Any) -> Response:
    return error_response(ApiError(405, "this path has another method"), Allow=error.headers["Allow"])


def api_error(error: BaseException) -> ApiError:
    """An error of the stages or on the way to them, as the client sees it."""
    cause = _cause(error)
    if isinstance(cause, TooLong):
        return ApiError(400, str(cause), "messages", "context_length_exceeded")
    if isinstance(cause, SampleError):
        return ApiError(400, str(cause))
    if isinstance(cause, BackPressureError):
        return ApiError(429, "the server is at its limit of requests; try again in a moment", retry_after=1)
    if isinstance(cause, GONE):
        return ApiError(503, "a part of the server went away while it answered", code="replica_gone", retry_after=1)
    if isinstance(cause, (DeploymentUnavailableError, RunError)):
        return ApiError(503, "a part of the server is not available", code="unavailable", retry_after=1)
    logger.error("a request failed", exc_info=error)
    return ApiError(500, "the server failed; its log says why")


def _cause(error: BaseException) -> BaseException:
    if isinstance(error, RayTaskError):
        return error.cause  # type: ignore[no-any-return]
    # Serve's own, with what befell the encoder behind it, where the decoder was to be asked with an embedding.
    return error.__cause__ if isinstance(error.__cause__, GONE) else error


def job_of(asked: ChatRequest, answer_id: str) -> Job:
    return Job(
        id=answer_id,
        messages=asked.plain_messages(),
        tools=asked.plain_tools(),
        thinking=asked.thinking,
        limit=asked.limit,
        temperature=1.0 if asked.temperature is None else asked.temperature,
        top_p=1.0 if asked.top_p is None else asked.top_p,
        seed=asked.seed,
        stop=asked.stops,
    )


def _events(asked: ChatRequest, answer: AnswerFormat, grown: Grown) -> str:
    text = "".join(map(answer.piece, grown.pieces))
    if grown.finish_reason is not None:
        text += answer.last(grown.finish_reason)
        if asked.stream_options and asked.stream_options.include_usage:
            text += answer.usage(grown.usage)
        text += openai.DONE
    return text


async def _chained(first: str, rest: AsyncGenerator[str, None]) -> AsyncGenerator[str, None]:
    try:
        yield first
        async for text in rest:
            yield text
    finally:
        await rest.aclose()


def _cancel(calls: list[Any]) -> None:
    for call in calls:
        try:
            call.cancel()
        except (RayError, RayServeException) as error:
            # Of a call that has failed, Ray raises the failure here too; who awaited it has been told already.
            logger.debug("a call had ended before it was cancelled: %s", type(error).__name__)


def _html(text: str) -> str:
    return text.replace("&", "&amp;").replace("<", "&lt;").replace('"', "&quot;")


# --- putting it together ---------------------------------------------------------------------------------------------


def build_app(config: ServeConfig, doors: str = "") -> Any:
    """The Serve application: `Api` and two stages, or one.

    Args:
        doors: folder in which an Api on the front's node opens its door.

    Raises:
        ArtemisError: no such model or device; a server that runs stays as it is.
    """
    check_device(config.device, here=is_alone())
    model = fetch_model(config.model)
    load_config(model.path)
    # One commit and one folder for every replica, whenever it starts and wherever.
    pinned = model.origin if is_remote(model.origin) else str(local_path(config.model))
    config = replace(config, model=pinned, name=config.model_name)
    decoder = _sized(Decoder, config, config.decoder_stage).bind(config)
    stages = [decoder] if config.colocate else [decoder, _sized(VisionEncoder, config, config.encoder_stage).bind(config)]
    front_end: Any = Api
    front = front_end.options(
        num_replicas=config.api_replicas,
        max_ongoing_requests=4 * config.max_requests,  # above what the Api refuses by itself, so that it does the refusing
        graceful_shutdown_timeout_s=config.deadline_s,
        max_surge_percent=SURGE_PERCENT,
        ray_actor_options={"num_cpus": API_CPUS, "runtime_env": {"env_vars": REPLICA_ENV}},
    )
    return front.bind(config, *stages, doors=doors)


def build(arguments: dict[str, Any]) -> Any:
    """For `serve run` and `serve deploy`: `build_app` from the keys of a YAML file.

    Raises:
        ArtemisError: as `build_app`; or a key is missing, unknown or has its place elsewhere in the file.
    """
    if elsewhere := sorted({"host", "port"} & arguments.keys()):
        raise RunError(f"args has the key {elsewhere[0]}, which does nothing there; put it under the file's http_options")
    if "model" not in arguments:
        raise RunError("args has no key model; expected an A3 folder, an s3:// URI or a hub id")
    nested = {"engine": EngineConfig, "encoder_stage": Stage, "decoder_stage": Stage, "fetch": FetchConfig}
    fields: dict[str, Any] = dict(arguments)
    for key in nested.keys() & fields.keys():
        fields[key] = _made(nested[key], fields[key], f"args.{key}")
    fields["key_hashes"] = tuple(fields.get("key_hashes", ()))
    return build_app(_made(ServeConfig, fields, "args"))


def _made(kind: Callable[..., T], given: Mapping[str, Any], place: str) -> T:
    """A dataclass of a YAML file's keys."""
    known = inspect.signature(kind).parameters
    if unknown := sorted(given.keys() - known.keys()):
        raise RunError(f"{place} has the unknown key {unknown[0]}; expected some of {', '.join(known)}")
    return kind(**given)


def _sized(deployment: Any, config: ServeConfig, stage: Stage) -> Any:
    scaling = {
        "min_replicas": stage.min_replicas,
        "max_replicas": stage.max_replicas,
        "target_ongoing_requests": stage.target_ongoing,
        "upscale_delay_s": 2.0,
        "downscale_delay_s": 30.0,
        "look_back_period_s": 15.0,  # replicas report every 10 s
    }
    return deployment.options(
        autoscaling_config=scaling,
        max_ongoing_requests=config.max_requests,
        max_queued_requests=config.max_requests,
        health_check_period_s=0.5,
        max_surge_percent=SURGE_PERCENT,
        graceful_shutdown_timeout_s=config.deadline_s,
        ray_actor_options={
            "num_cpus": stage.num_cpus,
            "num_gpus": stage.num_gpus,
            "resources": stage.resources,
            "runtime_env": {"env_vars": REPLICA_ENV},
        },
    )


class Server:
    """A running server: the Serve application on a loopback port, and the front that others reach, in a thread here."""

    def __init__(self, config: ServeConfig, build: Callable[[ServeConfig, str], Any] | None = None) -> None:
        """Returns when it answers; what fails leaves nothing behind.

        Args:
            build: in place of `build_app`.

        Raises:
            RunError: the application did not come up, it runs on this cluster already, the cluster has no room for it, or
                the address is taken; the text has the reason.
        """
        self.config = config
        self.url = f"http://{f'[{config.host}]' if ':' in config.host else config.host}:{config.port}"
        with ExitStack() as begun:
            doors = Path(tempfile.mkdtemp(prefix="a3-"))  # short, and its user's alone
            begun.callback(shutil.rmtree, doors)
            application = (build or build_app)(config, str(doors))  # a wrong name is told before anything starts
            alone = is_alone()
            join_or_start(config.logical_cpus)
            _check_absent()
            running = _running_proxy()
            host, port = running or ("127.0.0.1", free_ports(1)[0])
            self._open((host, port), doors, begun)
            check_room(config.least, 0 if alone else ROOM_TIMEOUT_S)
            begun.callback(_leave_serve, running is None)
            if running is None:
                serve.start(proxy_location="HeadOnly", http_options={"host": host, "port": port})
            _deploy(application)
            with self._binding():
                self._do(self.front.start())
            self._begun = begun.pop_all()

    def _open(self, proxy: tuple[str, int], doors: Path, begun: ExitStack) -> None:
        """Takes the address, for nobody yet."""
        config = self.config
        limits = FrontConfig(body_timeout_s=config.body_timeout_s, max_body_bytes=config.max_body_bytes)
        self.front = Front(proxy, limits, self._check, lambda *a: _refusal(ApiError(*a)), Doors(doors))
        self.keys = Keys(config.key_hashes)
        self._loop = asyncio.new_event_loop()
        self._thread = threading.Thread(target=self._loop.run_forever, name="front", daemon=True)
        self._thread.start()
        begun.callback(self._end_loop)
        with self._binding():
            self._do(self.front.bind(config.host, config.port))
        begun.callback(lambda: self._do(self.front.stop()))

    @contextmanager
    def _binding(self) -> Iterator[None]:
        try:
            yield
        except OSError as error:
            raise RunError(f"{self.config.host}:{self.config.port} cannot be bound: {error.strerror}") from error

    def _check(self, path: str, headers: Mapping[bytes, bytes]) -> Refusal | None:
        try:
            self.keys.check(path, headers.get(b"authorization", b""))
        except ApiError as error:
            return _refusal(error)
        return None

    def _do(self, work: Coroutine[Any, Any, T]) -> T:
        return asyncio.run_coroutine_threadsafe(work, self._loop).result()

    def stop(self) -> None:
        """Takes no more connections, lets those that are open end within the deadline, and ends the application."""
        self._do(self.front.stop())
        deadline = time.monotonic() + self.config.deadline_s
        while self.front.connections and time.monotonic() < deadline:
            time.sleep(0.1)
        self._begun.close()

    def _end_loop(self) -> None:
        self._loop.call_soon_threadsafe(self._loop.stop)
        self._thread.join()
        self._loop.close()


def _check_absent() -> None:
    if found := serve.status().applications.get(APP):
        raise RunError(
            f"an application {APP} is on this cluster already ({found.status.value}); stop the job that runs it, or remove "
            f"it: python -c \"from ray import serve; serve.delete('{APP}')\""
        )


def _running_proxy() -> tuple[str, int] | None:
    """Where the Ray Serve that this cluster runs listens; None where it runs none."""
    client = _get_global_client(raise_if_no_controller_running=False)
    if client is None:
        return None
    host = client.http_config.host
    return "127.0.0.1" if host in (None, "0.0.0.0") else host, client.http_config.port


def _deploy(application: Any) -> None:
    try:
        serve.run(application, name=APP, route_prefix="/")
    except (RuntimeError, RayError, RayServeException) as error:
        raise RunError(f"the server did not start: {_cause(error)}") from error


def _leave_serve(began_here: bool) -> None:
    """Removes the application, and Serve with it if nobody else uses it."""
    if began_here and not serve.status().applications.keys() - {APP}:
        serve.shutdown()
    else:
        serve.delete(APP)


def _refusal(error: ApiError) -> Refusal:
    return Refusal(error.status, error.body(), error.headers())


def run(config: ServeConfig) -> None:
    """Serves until SIGTERM or Ctrl+C, then ends gracefully."""
    stop = threading.Event()
    server = Server(config)
    for number in (signal.SIGTERM, signal.SIGINT):  # after Ray has started, which sets handlers of its own
        signal.signal(number, lambda *_: stop.set())
    print(f"serving {config.model_name} at {server.url}/ (a page) and {server.url}/v1 (OpenAI's API)", flush=True)
    stop.wait()
    print("letting running requests end", flush=True)
    server.stop()
