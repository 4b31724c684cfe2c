"""One request, followed down. Reading the suite begins here.

    bytes --body_reader--> typed body --validation--> GenerationRequest --tokenizer--> token ids
          --dispatcher, placement--> a decode worker --worker_stream--> (services/decode) and back:
          worker_stream --session--> Generation --choice_text--> deltas --*_reply, sse--> bytes

Going down is `Pipeline`; coming back up is `Generation.batches`, which `sse.EventStream` or `replies.collect` reads.
Most tokens of a stream take a shorter way up, from `session.Choice` straight to the client: `replies/direct_line`.
"""

from __future__ import annotations

import asyncio
import time
from functools import partial

from services.gateway.access.admission import Admission
from services.gateway.access.caller import current_caller
from services.gateway.metrics import RequestMetrics
from services.gateway.replies.chat_reply import ChatReply
from services.gateway.replies.completion_reply import CompletionReply
from services.gateway.replies.reply_format import ReplyFormat
from services.gateway.requests.body_reader import parse_body
from services.gateway.requests.chat_prompt import chat_prompt
from services.gateway.requests.grammar_check import GrammarCheck
from services.gateway.requests.request import Endpoint, GenerationRequest
from services.gateway.requests.text_work import INLINE_CHARS, TextWork
from services.gateway.requests.validation import chat_request, check_length, completion_request, output_limit, truncated
from services.gateway.schemas.chat import ChatBody
from services.gateway.schemas.completion import CompletionBody
from services.gateway.served_model import ServedModel
from services.gateway.sessions.dispatcher import Dispatcher
from services.gateway.sessions.generation import Generation, Patience, Stamps
from services.gateway.sessions.session import Mailbox, Session
from services.gateway.sessions.workers import Workers
from services.gateway.settings import GatewaySettings
from shared.errors import InvalidRequest
from shared.identity import TOKEN_BYTES, pack_tokens


class Pipeline:
    """Turns bodies into generations that run. One for the gateway; requests share nothing but what is given here."""

    def __init__(
        self,
        model: ServedModel,
        settings: GatewaySettings,
        workers: Workers,
        dispatcher: Dispatcher,
        text_work: TextWork,
        grammar_check: GrammarCheck,
        metrics: RequestMetrics,
        admission: Admission,
    ) -> None:
        self._model = model
        self._settings = settings
        self._workers = workers
        self._dispatcher = dispatcher
        self._text_work = text_work
        self._grammar_check = grammar_check
        self._metrics = metrics
        self._admission = admission

    async def chat(self, raw: bytes, received_s: float) -> Generation:
        """Starts what a chat body asks for.

        Args:
            raw: The body.
            received_s: When the body was complete, `time.monotonic()`.

        Raises:
            TandemError: It cannot be served, as the message says.
        """
        body = parse_body(raw, ChatBody, self._settings.unknown_fields)
        return await self.chat_generation(body, len(raw), received_s)

    async def chat_generation(self, body: ChatBody, num_chars: int, received_s: float) -> Generation:
        """Starts what a typed chat body asks for: the way in for every API that can be said as a chat.

        Args:
            body: Checked field by field.
            num_chars: About how long it is; long ones are rendered beside the event loop.
            received_s: When it was complete, `time.monotonic()`.

        Raises:
            TandemError: It cannot be served, as the message says.
        """
        request = await self.chat_request(body, num_chars, created=int(time.time()))
        return await self.start(request, received_s)

    async def chat_request(self, body: ChatBody, num_chars: int, *, created: int) -> GenerationRequest:
        """The request behind a typed chat body, rendered and checked, not tokenized and not started.

        Raises:
            TandemError: It cannot be served, as the message says.
        """
        self._model.check_name(body.model)
        self._model.check_generates()
        render = chat_prompt(body, self._model, self._settings)
        limit_s = self._settings.template_timeout_s
        is_short = num_chars <= INLINE_CHARS and not body.chat_template_kwargs
        try:
            prompt = await asyncio.wait_for(self._text_work.run(render, is_short=is_short), limit_s)
        except TimeoutError:
            raise InvalidRequest(f"the chat template took longer than {limit_s:g} s", param="messages") from None
        return chat_request(body, prompt, self._model, self._settings, created=created)

    async def completion(self, raw: bytes, received_s: float) -> Generation:
        """Starts what a completion body asks for.

        Raises:
            TandemError: It cannot be served, as the message says.
        """
        return await self.completion_generation(
            parse_body(raw, CompletionBody, self._settings.unknown_fields), received_s
        )

    async def completion_generation(self, body: CompletionBody, received_s: float) -> Generation:
        """Starts what a typed completion body asks for.

        Raises:
            TandemError: It cannot be served, as the message says.
        """
        self._model.check_name(body.model)
        self._model.check_generates()
        request = completion_request(body, self._model, self._settings, created=int(time.time()))
        return await self.start(request, received_s)

    def reply_format(self, generation: Generation) -> ReplyFormat:
        """How the client wants to read it."""
        request, model = generation.request, self._model
        if request.endpoint is Endpoint.CHAT:
            return ChatReply(request, generation.sessions, model.name, model.tokenizer)
        return CompletionReply(request, generation.sessions, model.name, model.tokenizer)

    async def start(self, request: GenerationRequest, received_s: float) -> Generation:
        """Tokenizes, checks against the context length, and submits; the caller closes what it gets.

        Raises:
            TandemError: It cannot be served, as the message says.
        """
        stamps = Stamps(received_s)
        if request.sampling.grammar:
            await self._grammar_check.check(request.sampling.grammar, request.grammar_field)
        special = request.add_special_tokens
        context_len = self._workers.context_len(self._model.max_model_len)
        for text in request.prompts:
            if isinstance(text, str):
                check_length(self._model.tokenizer.least_tokens(text), request, context_len)
        prompts = [
            truncated(await self.tokenize(prompt, add_special_tokens=special), request, context_len)
            for prompt in request.prompts
        ]
        stamps.tokenized_s = time.monotonic()
        mailbox = Mailbox()
        sessions = [self._session(prompt, request, mailbox) for prompt in prompts]
        caller = current_caller()
        ticket = await self._admission.enter(
            caller, self._model.name, sum(map(len, prompts)) // TOKEN_BYTES, request.asked_output_tokens
        )
        generation = Generation(
            request,
            sessions,
            mailbox,
            stamps,
            tokenizer=self._model.tokenizer,
            dispatcher=self._dispatcher,
            workers=self._workers,
            metrics=self._metrics,
            ticket=ticket,
            patience=Patience(
                migration_wait_s=self._settings.migration_wait_s,
                max_attempts=self._settings.max_attempts,
                max_lost_workers=self._settings.max_lost_workers,
                abort_grace_s=self._settings.abort_grace_s,
            ),
        )
        limits_s = [limit for limit in (self._settings.request_timeout_s, caller.timeout_s) if limit]
        try:
            await generation.start(wait_s=self._settings.worker_wait_s, timeout_s=min(limits_s, default=0.0))
        except BaseException:
            generation.close()
            raise
        return generation

    def _session(self, prompt: bytes, request: GenerationRequest, mailbox: Mailbox) -> Session:
        max_model_len = self._model.max_model_len
        max_tokens = output_limit(
            request,
            len(prompt) // TOKEN_BYTES,
            context_len=self._workers.context_len(max_model_len),
            cache_len=self._workers.cache_len(max_model_len),
        )
        return Session(prompt, request.sampling_for(max_tokens), request.num_choices, mailbox)

    async def tokenize(self, prompt: str | bytes, *, add_special_tokens: bool) -> bytes:
        """Packed tokens of a prompt; long texts of unknown words are tokenized beside the event loop."""
        if isinstance(prompt, bytes):
            return prompt
        known = self._model.tokenizer.encode_known(prompt, add_special_tokens=add_special_tokens)
        if known is not None:
            return known
        encode = partial(self._model.tokenizer.encode, prompt, add_special_tokens=add_special_tokens)
        return pack_tokens(await self._text_work.run(encode, is_short=len(prompt) <= INLINE_CHARS))
