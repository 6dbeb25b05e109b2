"""Questions to any OpenAI-compatible endpoint whose answers are JSON of a known form, each asked and paid for once.

Answers that have the form are kept on disk under a digest of server, model, messages and settings; whoever runs again,
or goes on after a kill, reads them there. The key is read from the environment and appears in no file, log or error.
"""

import asyncio
import hashlib
import json
import os
import random
import re
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

from pydantic import BaseModel, ValidationError

from moss_train.errors import ConfigError, DataError
from moss_train.redact import HIDDEN, covered, redact
from moss_train.synthesis.dialogue import WriterFault

if TYPE_CHECKING:
    import httpx

Form = TypeVar("Form", bound=BaseModel)

#: the server is busy or was: worth another try
_TRY_AGAIN = frozenset({408, 409, 425, 429})
#: this request is at fault, not the settings: the video is left out
_REFUSED = frozenset({400, 413, 422})
_LONGEST_BACKOFF_S = 60.0
_FENCE = re.compile(r"^```(?:json)?\s*|\s*```$")


@dataclass
class EndpointOptions:
    """A server with `POST <base_url>/chat/completions`: a hosted model, vLLM, SGLang, llama.cpp, Ollama, …"""

    base_url: str = "http://localhost:8000/v1"
    """Address up to and without `/chat/completions`."""
    model: str | None = None
    """Name of the model, as the server knows it. Needed by `writer=endpoint`."""
    api_key_env: str | None = "OPENAI_API_KEY"
    """Environment variable that holds the key; null sends none. The key itself is never written anywhere."""
    temperature: float = 0.0
    """Sampling temperature; null leaves it to the server."""
    max_tokens: int = 1024
    """Most tokens of one answer."""
    json_mode: bool = True
    """Ask the server for `response_format: json_object`; false for servers that do not know it."""
    concurrency: int = 16
    """Videos, and so requests, under way at a time."""
    timeout_s: float = 120.0
    """A request without an answer for so long has failed."""
    retries: int = 6
    """Tries after the first when the server is busy (429), broken (5xx) or silent: 1, 2, 4, … s apart, or as long as
    it asks for. After the last the run stops; what is written stays."""
    repairs: int = 2
    """How often an answer that is no JSON of the asked form is sent back; then the video is left out."""
    cache: str | None = None
    """Folder of the answers; null: `moss_train/synthesis` in the user's cache folder."""
    price_in: float = 0.0
    """Price of a million prompt tokens, in any currency; shown and summed up."""
    price_out: float = 0.0
    """Price of a million answered tokens."""
    max_cost: float | None = None
    """Stop when the run has cost so much; run again to go on."""

    def validate(self) -> None:
        if not self.model:
            raise ConfigError("writer=endpoint needs endpoint.model=…, the model's name as the server knows it")
        if not self.base_url.startswith(("http://", "https://")):
            raise ConfigError(f"endpoint.base_url={covered(self.base_url)!r} must start with http:// or https://")
        for name, least in (("concurrency", 1), ("max_tokens", 1), ("retries", 0), ("repairs", 0)):
            if getattr(self, name) < least:
                raise ConfigError(f"endpoint.{name}={getattr(self, name)} must be at least {least}")
        for name in ("timeout_s", "temperature", "price_in", "price_out", "max_cost"):
            value = getattr(self, name)
            if value is not None and (value < 0 or (name in ("timeout_s", "max_cost") and value == 0)):
                raise ConfigError(f"endpoint.{name}={value} must be above 0")
        if self.max_cost is not None and not (self.price_in or self.price_out):
            raise ConfigError("endpoint.max_cost needs endpoint.price_in and endpoint.price_out")
        if self.api_key_env is not None and not self.key():
            raise ConfigError(
                f"endpoint.api_key_env={self.api_key_env}: this environment variable is not set; export the key, or "
                "give endpoint.api_key_env=null for a server without keys"
            )
        if not (self.key().isascii() and self.key().isprintable()):
            raise ConfigError(
                f"endpoint.api_key_env={self.api_key_env}: the key holds letters that cannot stand in a header; export "
                "it again"
            )

    def key(self) -> str:
        """The key, "" for none. White space around it, as of a file that it was read from, is no part of it: a library
        that refuses a header would quote it."""
        return os.environ.get(self.api_key_env, "").strip() if self.api_key_env else ""

    def settings(self) -> dict[str, Any]:
        """What shapes an answer beside its prompt. A server may know another model by the same name, so its address is
        one of them, without a user and a password."""
        shaping = {name: getattr(self, name) for name in ("model", "temperature", "max_tokens", "json_mode")}
        return shaping | {"base_url": redact(self.base_url.rstrip("/"))}


@dataclass
class Usage:
    """What a run has asked for."""

    requests: int = 0  #: answered by the server
    cached: int = 0  #: answered from disk
    retries: int = 0
    repairs: int = 0
    tokens_in: int = 0
    tokens_out: int = 0
    cost: float = 0.0


class ChatClient:
    """Use it as an async context manager; many coroutines may ask at a time."""

    def __init__(self, options: EndpointOptions):
        try:
            import httpx
        except ImportError as error:
            raise ConfigError("writer=endpoint needs httpx: pip install 'moss_train[synth]'") from error
        self.usage = Usage()
        self._httpx = httpx
        self._options = options
        self._key = options.key()
        self._address = covered(options.base_url)  #: for messages
        default = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "moss_train" / "synthesis"
        self._cache = Path(options.cache) if options.cache else default
        headers = {"Authorization": f"Bearer {self._key}"} if self._key else {}
        limits = httpx.Limits(max_connections=options.concurrency)
        self._http = httpx.AsyncClient(headers=headers, timeout=options.timeout_s, limits=limits)

    async def __aenter__(self) -> "ChatClient":
        return self

    async def __aexit__(self, *error: object) -> None:
        await self._http.aclose()

    async def ask(self, messages: list[dict[str, str]], form: type[Form]) -> Form:
        """The answer to `messages` in the given form; an answer of another form is sent back with what is wrong.

        Raises WriterFault when the server refuses this request or never gives the form, DataError when it cannot be
        reached or the run has cost too much, ConfigError when key or model are wrong.
        """
        messages = list(messages)
        fault = ""
        for _ in range(self._options.repairs + 1):
            text = await self._answer(messages, form)
            try:
                return form.model_validate_json(_bare(text))
            except ValidationError as error:
                first = error.errors(include_url=False, include_input=False)[0]
                where = ".".join(str(part) for part in first["loc"])
                fault = f"{where}: {first['msg']}" if where else first["msg"]
            messages += [
                {"role": "assistant", "content": text},
                {"role": "user", "content": f"That is not of the asked form ({fault}). Answer with the JSON alone."},
            ]
            self.usage.repairs += 1
        self.usage.repairs -= 1
        raise WriterFault("bad_answer", f"no JSON of the asked form after {self._options.repairs + 1} tries: {fault}")

    async def _answer(self, messages: list[dict[str, str]], form: type[BaseModel]) -> str:
        options = self._options
        identity = json.dumps([messages, options.settings()], sort_keys=True, ensure_ascii=False)
        digest = hashlib.sha256(identity.encode()).hexdigest()
        kept = self._cache / digest[:2] / f"{digest}.json"
        if kept.is_file():
            self.usage.cached += 1
            return json.loads(kept.read_text(encoding="utf-8"))["text"]
        body: dict[str, Any] = {"model": options.model, "messages": messages, "max_tokens": options.max_tokens}
        if options.temperature is not None:
            body["temperature"] = options.temperature
        if options.json_mode:
            body["response_format"] = {"type": "json_object"}
        if options.max_cost is not None and self.usage.cost >= options.max_cost:
            raise DataError(
                f"the run has cost {self.usage.cost:.2f}, endpoint.max_cost={options.max_cost}: what is written stays; "
                "raise it and run again to go on"
            )
        answer = await self._post(body)
        text, usage = self._read(answer)
        self.usage.requests += 1
        self.usage.tokens_in += usage[0]
        self.usage.tokens_out += usage[1]
        self.usage.cost += (usage[0] * options.price_in + usage[1] * options.price_out) / 1e6
        try:
            form.model_validate_json(_bare(text))
        except ValidationError:
            return text  # what has not the form is asked again in another run
        kept.parent.mkdir(parents=True, exist_ok=True)
        partial = kept.with_name(f"{kept.name}.{os.getpid()}.{id(asyncio.current_task())}")
        record = {"text": text, "tokens_in": usage[0], "tokens_out": usage[1]}
        partial.write_text(json.dumps(record, ensure_ascii=False), encoding="utf-8")
        partial.replace(kept)
        return text

    def _read(self, answer: Any) -> tuple[str, tuple[int, int]]:
        """Text of the first choice, and tokens in and out."""
        try:
            text = answer["choices"][0]["message"]["content"] or ""
            usage = answer.get("usage") or {}
            return str(text), (int(usage.get("prompt_tokens") or 0), int(usage.get("completion_tokens") or 0))
        except (KeyError, IndexError, TypeError, ValueError, AttributeError) as error:
            raise DataError(
                f"{self._address} answered in another form than a chat completion ({error!r}): is it the "
                "address of an OpenAI-compatible endpoint?"
            ) from error

    async def _post(self, body: dict[str, Any]) -> Any:
        options, url = self._options, f"{self._options.base_url.rstrip('/')}/chat/completions"
        failure = ""
        for attempt in range(options.retries + 1):
            wait_s = min(2.0**attempt, _LONGEST_BACKOFF_S) * (0.75 + 0.5 * random.random())
            try:
                response = await self._http.post(url, json=body)
                if response.status_code == 200:
                    return response.json()
                failure = f"HTTP {response.status_code}: {self._said(response)}"
                self._check(response.status_code, failure)
                asked_s = _asked_wait_s(response)
                wait_s = wait_s if asked_s is None else asked_s
            except self._httpx.TransportError as error:
                failure = self._scrub(f"{type(error).__name__}: {error}")
            except ValueError as error:
                failure = f"its answer is no JSON ({error})"
            if attempt < options.retries:
                self.usage.retries += 1
                await asyncio.sleep(wait_s)
        raise DataError(
            f"{self._address} gave no answer in {options.retries + 1} tries ({failure}): what is written stays; run "
            "again to go on when it is back"
        )

    def _check(self, status: int, failure: str) -> None:
        """Raise unless another try may help."""
        if status in _TRY_AGAIN or status >= 500:
            return
        if status in _REFUSED:
            raise WriterFault("refused", failure)
        if status in (401, 403):
            raise ConfigError(f"{self._address}: {failure}; check endpoint.api_key_env")
        raise ConfigError(f"{self._address}: {failure}; check endpoint.base_url and endpoint.model")

    def _said(self, response: "httpx.Response") -> str:
        """What the server says is wrong, on one line, without the key."""
        return self._scrub(" ".join(response.text.split())[:300]) or "no reason given"

    def _scrub(self, text: str) -> str:
        return covered(text.replace(self._key, HIDDEN) if self._key else text)

    def figures(self) -> dict[str, Any]:
        return asdict(self.usage)


def _asked_wait_s(response: "httpx.Response") -> float | None:
    """Seconds that the server asks to wait, if it does so in seconds."""
    try:
        return min(max(0.0, float(response.headers["retry-after"])), 10 * _LONGEST_BACKOFF_S)
    except (KeyError, ValueError):
        return None


def _bare(text: str) -> str:
    """The JSON without a fence of Markdown around it."""
    return _FENCE.sub("", text.strip())
