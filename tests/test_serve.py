"""Serving: the protocol by itself, then real Ray Serve over real HTTP with OpenAI's own client."""

from __future__ import annotations

import asyncio
import base64
import dataclasses
import hashlib
import json
import os
import re
import signal
import socket
import threading
import time
import urllib.request
from collections.abc import AsyncIterator, Iterator
from functools import partial
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import openai as client_library
import pytest
import serving
import torch
import yaml
from ray import serve as ray_serve
from serving import KEY, ask, body, http, picture, replica_pids, turn, uri
from transformers import PreTrainedTokenizerBase

from artemis_vlm import ArtemisVLMForConditionalGeneration, RunError, SampleError, chat, engines, graft
from artemis_vlm.engines import EngineConfig, SamplingParams
from artemis_vlm.image import decode_image, patchify
from artemis_vlm.modeling import normalize
from jobs.serve import main
from pipelines import openai, serve, stages
from pipelines.local import free_ports
from pipelines.openai import AnswerFormat, AnswerParser, ApiError, Piece, Usage
from pipelines.stages import ServeConfig
from pipelines.storage import ModelFolder

NEW = 12


# --- the protocol ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("changes", "param"),
    [
        ({"logprobs": True}, "logprobs"),
        ({"response_format": {"type": "json_object"}}, "response_format"),
        ({"frequency_penalty": 0.5}, "frequency_penalty"),
        ({"presence_penalty": -1}, "presence_penalty"),
        ({"parallel_tool_calls": False}, "parallel_tool_calls"),
        ({"messages": None}, "messages"),
        ({"n": 2}, "n"),
        ({"max_tokens": 0}, "max_tokens"),
        ({"max_tokens": "3"}, "max_tokens"),
        ({"temperature": 3}, "temperature"),
        ({"top_p": 0}, "top_p"),
        ({"top_logprobs": 2}, "top_logprobs"),
        ({"logit_bias": {"1": 1}}, "logit_bias"),
        ({"store": True}, "store"),
        ({"metadata": {"a": "b"}}, "metadata"),
        ({"modalities": ["text", "audio"]}, "modalities"),
        ({"service_tier": "flex"}, "service_tier"),
        ({"stop": ""}, "stop"),
        ({"stop": [""]}, "stop[0]"),
        ({"stop": list("abcde")}, "stop"),
        ({"stream_options": {"include_usage": True}}, "stream_options"),
        ({"messages": []}, "messages"),
        ({"messages": [{"role": "wizard", "content": "a"}]}, "messages[0].role"),
        ({"messages": [{"role": "user", "content": "a", "audio": 1}]}, "messages[0].audio"),
        ({"messages": [{"role": "user", "content": [{"type": "input_audio"}]}]}, "messages[0].content[0]"),
        ({"messages": [{"role": "user", "content": [{"type": "text", "text": "a", "x": 1}]}]}, "messages[0].content[0].x"),
        ({"messages": [{"role": "user"}]}, "messages[0].content"),
        ({"messages": turn("a", *[b"x"] * 9)}, "messages"),
        ({"messages": [{"role": "system", "content": turn("a", b"x")[0]["content"]}]}, "messages[0].content"),
        ({"messages": turn("a", b"x"), "tools": [{"type": "function", "function": {"name": "f"}}]}, "tools"),
        ({"tools": [{"type": "function", "function": {}}]}, "tools[0].function.name"),
    ],
)
def test_what_is_not_supported_is_named(changes: dict[str, Any], param: str) -> None:
    with pytest.raises(ApiError) as error:
        openai.parse_chat(body(**changes))
    assert error.value.status == 400
    assert error.value.param == param
    assert set(error.value.body()["error"]) == {"message", "type", "param", "code"}


def test_what_asks_for_nothing_is_accepted() -> None:
    plain = openai.parse_chat(body())
    nulls = ("stream", "frequency_penalty", "n", "stop", "tools", "logit_bias", "stream_options", "user", "max_tokens")
    assert openai.parse_chat(body(**dict.fromkeys(nulls))) == plain
    penalties = {"frequency_penalty": 0, "presence_penalty": 0.0}
    idle = {"logprobs": False, "response_format": {"type": "text"}, "parallel_tool_calls": True}
    idle |= {"top_logprobs": 0, "logit_bias": {}, "stop": [], "store": False, "metadata": {}, "modalities": ["text"]}
    assert openai.parse_chat(body(**penalties, **idle, service_tier="auto")) == plain
    assert openai.parse_chat(body(n=1)).n == 1
    usage = openai.parse_chat(body(stream=True, stream_options={"include_usage": None})).stream_options
    assert usage is not None
    assert not usage.include_usage
    tools = [{"type": "function", "function": {"name": "f", "parameters": {"default": None}}}]
    assert openai.parse_chat(body(tools=tools)).plain_tools() == tools, "nulls in a schema stay"
    assert openai.parse_chat(body(messages=turn("a", b"x"), tools=tools, tool_choice="none")).plain_tools() is None
    answered = {"role": "assistant", "content": "a", "tool_calls": None, "audio": None}
    assert openai.parse_chat(body(messages=[answered])).plain_messages() == [{"role": "assistant", "content": "a"}]


@pytest.mark.parametrize(
    "data",
    [b"", b"{", b"[]", b"null", b'"a"', b"\xff\xfe", b"[" * 100_000, b'{"model": NaN}',
     body().replace(b"hi", rb"\ud800")],
)  # fmt: skip
def test_bodies_that_are_not_requests(data: bytes) -> None:
    with pytest.raises(ApiError) as error:
        openai.parse_chat(data)
    assert error.value.status == 400


def test_how_many_images_a_turn_holds_is_the_checkpoints(tokenizer: PreTrainedTokenizerBase) -> None:
    messages = openai.parse_chat(body(messages=turn("a", b"x", b"y"))).plain_messages()
    prompt = chat.encode_prompt(tokenizer, messages, image_tokens=[1, 2], max_images_per_turn=2)
    assert prompt.count(chat.image_token_id(tokenizer)) == 3


def test_errors_never_hold_image_data() -> None:
    with pytest.raises(ApiError) as error:
        openai.parse_chat(body(messages=[{"role": "user", "content": [{"type": "image_url", "image_url": uri(picture())}]}]))
    assert "base64" not in str(error.value)
    for bad in ("data:image/png;base64,AA*A", "data:image/svg+xml;base64,AAAA", "data:,x", "data:image/png,AAAA"):
        with pytest.raises(SampleError, match="data URI"):
            openai.image_of_data_uri(bad)
    assert openai.image_of_data_uri(uri(b"abc")) == b"abc"


@pytest.mark.parametrize("size", [1, 3, 1000])
def test_answers_come_apart_into_thoughts_text_and_calls(size: int) -> None:
    text = 'a < b\n</think>\n\nIt is <b>.<tool_call>\n{"name": "f", "arguments": {"x": 1}}\n</tool_call>\n<tool_call>{"na'
    parser = AnswerParser("reasoning")
    pieces = [p for at in range(0, len(text), size) for p in parser.feed(text[at : at + size])]
    pieces += parser.feed("", last=True)
    joined = {c: "".join(p.text for p in pieces if p.channel == c) for c in ("reasoning", "content", "tool_call")}
    assert joined["reasoning"] == "a < b\n"
    assert joined["content"] == 'It is <b>.<tool_call>{"na'
    assert json.loads(joined["tool_call"]) == {"name": "f", "arguments": {"x": 1}}
    whole = AnswerFormat("chatcmpl-0", "m").whole(pieces, "stop", Usage(3, 4))
    call = whole["choices"][0]["message"]["tool_calls"][0]
    assert (call["function"], whole["choices"][0]["finish_reason"]) == ({"name": "f", "arguments": '{"x": 1}'}, "tool_calls")
    assert whole["usage"]["total_tokens"] == 7


def nested(depth: int) -> str:
    return "[" * depth + "]" * depth


@pytest.mark.parametrize(
    "call", ["[1]", '{"name": "f", "arguments": "\\ud800"}', '{"name": "\\udc00"}', nested(5000)], ids=range(4)
)
def test_a_call_that_is_no_call_stays_text(call: str) -> None:
    pieces = list(AnswerParser().feed(f"<tool_call>{call}</tool_call>x", last=True))
    assert pieces == [Piece("content", f"<tool_call>{call}</tool_call>"), Piece("content", "x")]


def called(arguments: str) -> list[dict[str, Any]]:
    call = {"id": "1", "type": "function", "function": {"name": "f", "arguments": arguments}}
    return [*turn("a"), {"role": "assistant", "tool_calls": [call]}, {"role": "tool", "content": "b", "tool_call_id": "1"}]


@pytest.mark.parametrize("arguments", ["{", "[" * 100_000, nested(900), '{"a": "\\ud800"}'], ids=range(4))
def test_arguments_of_a_call_that_are_not_json(arguments: str) -> None:
    with pytest.raises(ApiError, match="the arguments of a tool call are not JSON") as error:
        openai.parse_chat(body(messages=called(arguments))).plain_messages()
    assert error.value.status == 400


def test_arguments_of_a_call_reach_the_prompt(tokenizer: PreTrainedTokenizerBase) -> None:
    for arguments in ("", '{"a": "\\ud83d\\ude00"}', nested(200)):
        messages = openai.parse_chat(body(messages=called(arguments))).plain_messages()
        prompt = tokenizer.decode(chat.encode_prompt(tokenizer, messages))
        assert json.dumps(json.loads(arguments or "{}"), ensure_ascii=False) in prompt


class Half:
    """An engine, and a stage's stream, that break off."""

    async def generate(self, request: engines.Request) -> AsyncIterator[engines.Delta]:
        yield engines.Delta((1,), "half")
        yield engines.Delta((), "", "cancelled")

    async def grow(self, *_: object) -> AsyncIterator[stages.Grown]:
        yield stages.Grown((Piece("content", "half"),), Usage(1, 1))
        raise ApiError(503, "gone")


def test_an_answer_that_breaks_off_is_no_answer() -> None:
    decoder = stages.Decoder.func_or_class
    request = engines.Request("7", (1,), SamplingParams(max_tokens=2))
    stage = SimpleNamespace(engine=Half(), _request=lambda *_: (request, False))
    job = serve.job_of(openai.parse_chat(body()), "7")
    grown: list[stages.Grown] = []

    async def main() -> None:
        async for more in decoder.generate(stage, job):
            grown.append(more)

    with pytest.raises(RunError, match="broke off the request 7"):
        asyncio.run(main())
    assert [g.finish_reason for g in grown] == [None]


def test_requests_are_counted_by_what_became_of_them() -> None:
    api, statuses = serve.Api.func_or_class, []
    counter = SimpleNamespace(inc=lambda tags: statuses.append(tags["status"]))
    gauge = SimpleNamespace(set=lambda _: None, observe=lambda _: None)
    one = SimpleNamespace(config=ServeConfig(model="m"), running=0, requests=counter, _grow=Half().grow)
    one.in_flight = one.seconds = one.first_token = gauge
    one._turn, one._check_model = (partial(f, one) for f in (api._turn, api._check_model))

    async def main() -> str:
        stream = api._stream(one, openai.parse_chat(body()), AnswerFormat("7", "m"), 0.0)
        return "".join([text async for text in stream])

    assert "half" in (said := asyncio.run(main()))
    assert "gone" in said.split("\n\n")[-2]
    for data in (b"{", body(model="other")):
        headers = {"content-type": "application/json"}
        with pytest.raises(ApiError):
            asyncio.run(api._asked(one, SimpleNamespace(headers=headers, body=partial(asyncio.sleep, 0, data))))
    assert statuses == ["503", "400", "404"]


def test_an_open_server_needs_a_key() -> None:
    for host in ("0.0.0.0", "::", "10.0.0.5", "example.org"):
        with pytest.raises(RunError, match="give key_hashes or bind 127"):
            ServeConfig(model="x", host=host)
    ServeConfig(model="x", host="0.0.0.0", key_hashes=("0" * 64,))
    with pytest.raises(RunError, match="sha256 sums in hex"):
        ServeConfig(model="x", key_hashes=("secret",))


@pytest.mark.parametrize(
    "flags",
    ["--deadline-s -1", "--deadline-s nan", "--max-requests 0", "--port 70000", "--api-replicas 0", "--cache-bytes -1",
     "--decoder-stage.num-gpus -1", "--encoder-stage.target-ongoing 0", "--engine.slots 0", "--dtype half16",
     "--device gpu", "--device cuda:99"],
)  # fmt: skip
def test_bad_options_are_one_sentence(
    flags: str, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(serve, "is_alone", lambda: True)
    monkeypatch.setattr(serve, "load_config", lambda *_: pytest.fail("it has begun"))
    assert main(["--model", "x", *flags.split()]) == 1
    out, err = capsys.readouterr()
    assert (out, err.count("\n"), err.startswith("error: ")) == ("", 1, True), err


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        ({"model": "x", "port": 9000}, "args has the key port, which does nothing there; put it under the file's http_op"),
        ({"model": "x", "hots": "::"}, "args has the unknown key hots; expected some of model, name, "),
        ({"model": "x", "engine": {"slot": 1}}, "args.engine has the unknown key slot; expected some of kind, slots, "),
        ({"name": "x"}, "args has no key model; expected an A3 folder"),
    ],
)
def test_keys_of_a_yaml_file_that_do_nothing_are_refused(arguments: dict[str, Any], says: str) -> None:
    with pytest.raises(RunError, match=says):
        serve.build(arguments)


def test_the_shipped_yaml_file_names_what_there_is(a3: Path) -> None:
    described = yaml.safe_load((Path(__file__).parent.parent / "jobs" / "serve.yaml").read_text())
    (application,) = described["applications"]
    assert application["import_path"] == "pipelines.serve:build"
    assert serve.build(application["args"] | {"model": str(a3)}) is not None


def test_every_replica_loads_the_same_model(a3: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def bound(**fields: Any) -> set[tuple[str, str]]:
        api = serve.build_app(ServeConfig(**fields))._bound_deployment
        stages_of = [app._bound_deployment for app in api.init_args[1:]]
        return {(d.init_args[0].model, d.init_args[0].model_name) for d in (api, *stages_of)}

    monkeypatch.chdir(a3.parent)
    assert bound(model=a3.name) == {(str(a3), a3.name)}
    assert bound(model=a3.name, name="tiny") == {(str(a3), "tiny")}
    monkeypatch.setattr(serve, "fetch_model", lambda _: ModelFolder(a3, "hf://org/a3@abc"))
    assert bound(model="org/a3") == {("hf://org/a3@abc", "a3")}


# --- the server ------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module", autouse=True)
def cluster() -> Iterator[None]:
    with serving.cluster(6):
        yield


@pytest.fixture
def theirs(cluster: None) -> Iterator[str]:
    """The address of somebody else's application on the same cluster."""
    port = free_ports(1)[0]
    ray_serve.start(proxy_location="HeadOnly", http_options={"host": "0.0.0.0", "port": port})
    ray_serve.run(serving.Says.bind("theirs"), name="theirs", route_prefix="/theirs")
    yield f"http://127.0.0.1:{port}/theirs"
    ray_serve.shutdown()


def test_a_server_among_others_applications(theirs: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """It comes, refuses a second of its name and goes, and what fails leaves nothing; theirs stays."""
    config = ServeConfig(model="x", port=free_ports(1)[0])
    monkeypatch.setattr(serve, "ROOM_TIMEOUT_S", 0.0)

    def start(build: Any = lambda *_: serving.Says.bind("ours"), **changes: Any) -> serve.Server:
        return serve.Server(dataclasses.replace(config, **changes), build)

    for changes, says in (
        ({"port": int(theirs.split(":")[2].split("/")[0])}, "cannot be bound"),
        ({"decoder_stage": stages.Stage(num_gpus=1)}, "a replica asks for 1 CPU, 1 GPU, and no node of this cluster has"),
    ):
        with pytest.raises(RunError, match=says):
            start(**changes)
        assert ray_serve.status().applications.keys() == {"theirs"}
    server = start()
    assert http(f"{server.url}/")[2] == b"ours"
    with pytest.raises(RunError, match=r"an application a3 is on this cluster already \(RUNNING\); stop the job"):
        start(port=free_ports(1)[0])
    monkeypatch.setattr(serve, "APP", "second")
    with pytest.raises(RunError, match=r"the server did not start: .*Prefix / is being used"):
        start(port=free_ports(1)[0])
    assert http(f"{server.url}/")[2] == b"ours"
    monkeypatch.undo()
    server.stop()
    assert ray_serve.status().applications.keys() == {"theirs"}
    assert http(theirs)[2] == b"theirs"
    with pytest.raises(OSError, match="refused"):
        http(f"{server.url}/")


@pytest.fixture(scope="module")
def config(a3: Path) -> ServeConfig:
    return ServeConfig(
        model=str(a3),
        name="tiny",
        port=free_ports(1)[0],
        dtype="float32",
        key_hashes=(hashlib.sha256(b"another").hexdigest(), hashlib.sha256(KEY.encode()).hexdigest()),
        engine=EngineConfig(slots=4, max_length=600),
        max_requests=16,
        max_body_bytes=200_000,
        body_timeout_s=2.0,
        deadline_s=60.0,
    )


@pytest.fixture(scope="module")
def running(cluster: None, config: ServeConfig) -> Iterator[serve.Server]:
    server = serve.Server(config)
    yield server
    server.stop()


@pytest.fixture(scope="module")
def server(running: serve.Server) -> str:
    return running.url


@pytest.fixture(scope="module")
def client(server: str) -> client_library.OpenAI:
    return client_library.OpenAI(base_url=f"{server}/v1", api_key=KEY, max_retries=0, timeout=60)


class Reference:
    """Plain `generate` on the same folder, in float32."""

    def __init__(self, folder: Path) -> None:
        self.model = ArtemisVLMForConditionalGeneration.from_pretrained(folder, dtype=torch.float32).eval()
        self.tokenizer = graft.load_tokenizer(folder)
        self.spec = stages.ImageEncoder.load(folder).spec

    def answer(self, text: str, data: bytes | None = None) -> str:
        inputs: dict[str, Any] = {}
        counts = []
        if data is not None:
            patches = patchify(decode_image(data), self.spec)
            inputs["pixel_values"] = normalize(torch.from_numpy(patches.pixels), self.spec)
            inputs["image_grid_thw"] = torch.tensor([[1, *patches.grid]])
            counts = [self.spec.tokens(patches.grid)]
        content = [*([{"type": "image"}] if counts else []), {"type": "text", "text": text}]
        messages = [{"role": "user", "content": content}]
        ids = torch.tensor([chat.encode_prompt(self.tokenizer, messages, image_tokens=counts, enable_thinking=False)])
        output = self.model.generate(
            input_ids=ids, attention_mask=torch.ones_like(ids), max_new_tokens=NEW, do_sample=False, pad_token_id=0, **inputs
        )
        return str(self.tokenizer.decode(output[0, ids.shape[1] :], skip_special_tokens=True))


@pytest.fixture(scope="module")
def reference(a3: Path) -> Reference:
    return Reference(a3)


@pytest.mark.parametrize("image", [True, False])
def test_answers_equal_plain_generate(client: client_library.OpenAI, reference: Reference, image: bool) -> None:
    data = picture() if image else None
    expected = reference.answer("What is <|image_pad|> this?", data)
    messages = turn("What is <|image_pad|> this?", *([data] if data else []))
    done = ask(client, messages)
    assert done.choices[0].message.content == expected
    assert done.usage.total_tokens == done.usage.prompt_tokens + done.usage.completion_tokens
    chunks = list(ask(client, messages, stream=True, stream_options={"include_usage": True}))
    assert "".join(c.choices[0].delta.content or "" for c in chunks if c.choices) == expected
    assert chunks[-1].usage == done.usage
    assert chunks[-2].choices[0].finish_reason == done.choices[0].finish_reason
    assert len({c.id for c in chunks}) == 1


def test_many_at_once_through_the_async_client(server: str, reference: Reference) -> None:
    pictures = [picture(i, (64 + 32 * i, 96)) for i in range(3)]
    expected = [reference.answer("Say.", data) for data in pictures]

    async def main() -> list[str]:
        async with client_library.AsyncOpenAI(base_url=f"{server}/v1", api_key=KEY, max_retries=0) as client:

            async def one(i: int) -> str:
                if i % 2:
                    return str((await ask(client, turn("Say.", pictures[i % 3]))).choices[0].message.content)
                stream = await ask(client, turn("Say.", pictures[i % 3]), stream=True)
                return "".join([c.choices[0].delta.content or "" async for c in stream])

            return await asyncio.gather(*(one(i) for i in range(12)))

    assert asyncio.run(main()) == [expected[i % 3] for i in range(12)]


def test_sampling_stop_and_models(client: client_library.OpenAI) -> None:
    drawn = [ask(client, turn("Go."), temperature=1, top_p=0.9, seed=seed).choices[0].message.content for seed in (5, 5, 6)]
    assert drawn[0] == drawn[1] != drawn[2]
    whole = ask(client, turn("Go.")).choices[0].message.content
    stop = whole[len(whole) // 2 :][:4]
    cut = ask(client, turn("Go."), stop=stop).choices[0]
    assert (cut.message.content, cut.finish_reason) == (whole[: whole.index(stop)], "stop")
    assert [m.id for m in client.models.list()] == ["tiny"]
    assert client.models.retrieve("tiny").id == "tiny"
    with pytest.raises(client_library.NotFoundError):
        client.models.retrieve("other")
    thought = ask(client, turn("Go."), reasoning_effort="high").choices[0].message
    assert (thought.content, bool(thought.reasoning_content)) == ("", True)


@pytest.mark.parametrize(
    ("options", "says"),
    [
        ({"messages": turn("a", b"not an image")}, "are not a readable image"),
        ({"messages": turn("a", picture()), "max_tokens": 5000}, "max_tokens is 5000; together they may be 600"),
        ({"messages": turn("a b " * 600), "max_tokens": None}, r"has \d+ tokens; with its answer it may have 600"),
        ({"messages": turn("a", picture(), picture(1))}, "a user turn holds 2 images; this model takes at most 1 in a turn"),
        ({"messages": turn("a"), "logit_bias": {"1": 1}}, "logit_bias is not supported"),
        ({"messages": [{"role": "user", "content": [{"type": "image_url", "image_url": {"url": "http://127.0.0.1/a"}}]}]},
         "not a public web server"),
    ],
)  # fmt: skip
@pytest.mark.parametrize("stream", [False, True])
def test_bad_requests_are_told_so(client: client_library.OpenAI, options: dict[str, Any], says: str, stream: bool) -> None:
    with pytest.raises(client_library.BadRequestError, match=says) as error:
        ask(client, stream=stream, **options)
    assert error.value.body["type"] == "invalid_request_error"
    assert (error.value.code == "context_length_exceeded") == ("600" in says)
    assert "Traceback" not in str(error.value)


def test_keys_cover_every_route_but_health(server: str) -> None:
    paths = ["/", "/v1/models", "/v1/models/tiny", "/v1/chat/completions", "/nothing", "//health", "/health/", "/docs"]
    for path in paths:
        for header in ("", "Bearer wrong", f"Token {KEY}", "Basic !!!", f"Bearer {KEY}x"):
            status, headers, text = http(f"{server}{path}", Authorization=header)
            assert (status, json.loads(text)["error"]["code"]) == (401, "invalid_api_key"), path
    assert headers["www-authenticate"].startswith("Basic")
    assert http(f"{server}/health", Authorization="")[0] == 200
    basic = base64.b64encode(f"anyone:{KEY}".encode()).decode()
    status, headers, page = http(f"{server}/", Authorization=f"Basic {basic}")
    assert status == 200
    assert b"tiny" in page
    assert "default-src 'none'" in headers["content-security-policy"]
    assert not re.search(rb"""(src|href)=["']?(https?:)?//|@import|\burl\(""", page), "the page must work without internet"


def test_what_needs_no_tower_does_not_run_it(client: client_library.OpenAI) -> None:
    handle = ray_serve.get_deployment_handle("VisionEncoder", serve.APP)
    ask(client, turn("Go.", picture(20)))
    before = handle.calls.remote().result()
    ask(client, turn("Go."))
    ask(client, turn("Again.", picture(20)))
    assert handle.calls.remote().result() == before
    ask(client, turn("Go.", picture(21)))
    assert handle.calls.remote().result() == before + 1


def test_readiness_names_what_is_missing(server: str) -> None:
    status, _, text = http(f"{server}/ready", Authorization="")
    assert (status, json.loads(text)) == (200, {"ready": True, "missing": []})


def test_malformed_requests(server: str) -> None:
    url = f"{server}/v1/chat/completions"
    for data in (b"{", b"", b"\xff", b"[]", b'{"a":1}', b"[" * 50_000):
        status, _, text = http(url, data)
        assert (status, json.loads(text)["error"]["type"]) == (400, "invalid_request_error")
    assert http(url, body(), **{"Content-Type": "text/plain"})[0] == 400
    assert http(url, body() + b" " * 300_000)[0] == 413
    status, headers, _ = http(url)
    assert (status, headers["allow"]) == (405, "POST")
    assert http(f"{server}/v1/nothing", b"{}")[0] == 404


def test_a_body_that_does_not_come_is_not_waited_for(server: str, config: ServeConfig) -> None:
    with socket.create_connection(("127.0.0.1", config.port), timeout=10) as slow:
        slow.sendall(
            b"POST /v1/chat/completions HTTP/1.1\r\nHost: x\r\nContent-Length: 100\r\n"
            b"Authorization: Bearer " + KEY.encode() + b"\r\n\r\n{"
        )
        started = time.monotonic()
        answer = slow.recv(4096)
    assert b" 408 " in answer.split(b"\r\n")[0]
    assert time.monotonic() - started < 6


def test_a_client_that_leaves_frees_the_slot(client: client_library.OpenAI) -> None:
    stream = ask(client, turn("Go on."), stream=True, max_tokens=550, stop="\x00never")
    next(iter(stream))
    stream.close()
    deadline = time.monotonic() + 5
    handle = ray_serve.get_deployment_handle("Decoder", serve.APP)
    while time.monotonic() < deadline:
        if not handle.stats.remote().result().running:
            return
        time.sleep(0.05)
    pytest.fail("the request still runs 5 s after its client left")


def test_more_than_the_limit_get_429(server: str, config: ServeConfig) -> None:
    statuses: list[tuple[int, str | None]] = []

    def one() -> None:
        request = body(model="tiny", max_tokens=80, reasoning_effort="none")
        status, headers, _ = http(f"{server}/v1/chat/completions", request)
        statuses.append((status, headers.get("retry-after")))

    threads = [threading.Thread(target=one) for _ in range(3 * config.max_requests)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    codes = {status for status, _ in statuses}
    assert codes == {200, 429}
    assert all(after == "1" for status, after in statuses if status == 429)


def test_without_an_encoder_text_still_works(server: str, client: client_library.OpenAI) -> None:
    ask(client, turn("Go.", picture()))
    for pid in replica_pids("VisionEncoder"):
        os.kill(pid, signal.SIGKILL)
    time.sleep(0.5)
    started = time.monotonic()
    status, headers, text = http(f"{server}/v1/chat/completions", body(model="tiny", messages=turn("Go.", picture(7))))
    took = time.monotonic() - started
    assert ask(client, turn("Go.")).choices[0].message.content
    assert status == 503, text
    assert "retry-after" in headers
    assert took < 1
    deadline = time.monotonic() + 40
    while http(f"{server}/ready")[0] != 200:
        assert time.monotonic() < deadline, "the encoder did not come back"
        time.sleep(0.3)
    ask(client, turn("Go.", picture(8)))


def test_a_killed_decoder(server: str, client: client_library.OpenAI) -> None:
    """A stream ends with an error and without [DONE]; a whole answer is asked for anew when the replica is back."""
    request = body(model="tiny", stream=True, max_tokens=580, reasoning_effort="none", stop="\x00never")
    fields = {"Authorization": f"Bearer {KEY}", "Content-Type": "application/json"}
    with urllib.request.urlopen(
        urllib.request.Request(f"{server}/v1/chat/completions", request, fields), timeout=60
    ) as answer:
        answer.readline()
        whole: list[Any] = []
        thread = threading.Thread(target=lambda: whole.append(ask(client, turn("Go."), max_tokens=500)))
        thread.start()
        for pid in replica_pids("Decoder"):
            os.kill(pid, signal.SIGKILL)
        rest = answer.read().decode()
    assert "[DONE]" not in rest
    last = json.loads(rest.strip().split("\n\n")[-1].removeprefix("data: "))
    assert last["error"]["type"] == "server_error"
    thread.join()
    assert whole
    assert whole[0].choices[0].message.content


def test_the_front_needs_no_proxy(
    running: serve.Server, client: client_library.OpenAI, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(running.front, "upstream", ("127.0.0.1", 1))  # where nobody listens
    assert ask(client, turn("Go.", picture())).choices[0].message.content


def test_a_killed_api_costs_no_request(client: client_library.OpenAI, server: str) -> None:
    """What it had not answered is asked for again, over Serve's proxy."""
    whole: list[Any] = []
    thread = threading.Thread(target=lambda: whole.append(ask(client, turn("Go."), max_tokens=500)))
    thread.start()
    time.sleep(0.3)
    for pid in replica_pids("Api"):
        os.kill(pid, signal.SIGKILL)
    thread.join()
    assert whole
    assert whole[0].choices[0].message.content


def test_one_process_for_both_stages(
    config: ServeConfig, client: client_library.OpenAI, reference: Reference, running: serve.Server
) -> None:
    ray_serve.run(serve.build_app(dataclasses.replace(config, colocate=True)), name=serve.APP, route_prefix="/")
    assert "VisionEncoder" not in ray_serve.status().applications[serve.APP].deployments
    done = ask(client, turn("Once more.", picture(3)))
    assert done.choices[0].message.content == reference.answer("Once more.", picture(3))
    deadline = time.monotonic() + 20  # an Api that was told of no folder is reached over Serve's proxy
    while running.front.doors.paths():
        assert time.monotonic() < deadline, "the door of a replica that has ended is still there"
        time.sleep(0.1)
    assert ask(client, turn("Once more.", picture(3))).choices[0].message.content == done.choices[0].message.content
