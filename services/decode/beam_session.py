"""A session that searches with beams: it reads the engine's outputs itself and speaks to its gateway at the end."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

from protos import worker_pb2 as pb
from services.decode.beams import Beam, BeamSearch
from services.decode.routes import Routes
from services.decode.session import DecodeSession
from services.decode.wire import sampling_from_wire
from shared.engine.sampling_params import MAX_LOGPROBS
from shared.engine.sequence import FinishReason, Sequence
from shared.engine.step import PromptScores, TokenLogprobs
from shared.errors import InvalidRequest, TandemError, WorkerLost
from shared.identity import SequenceId
from shared.worker.kv_state import KvEvent
from shared.worker.process import WorkerParts

MAX_BEAM_WIDTH = MAX_LOGPROBS // 2


class BeamSession(DecodeSession):
    """See `DecodeSession`; `sequences` are the beams of the present step. A `StepReader` of its own.

    Attributes:
        num_choices: Beams that are returned.
        returns_logprobs: With their tokens' log-probabilities.

    Args:
        routes: Of the servicer; the session's sequences come and go there.
        deliver: Takes the best beams when the search is over.
        fail: Ends the session with an error.
    """

    def __init__(
        self,
        parts: WorkerParts,
        submit: pb.Submit,
        routes: Routes,
        deliver: Callable[[BeamSession, list[Beam]], None],
        fail: Callable[[DecodeSession, TandemError], None],
    ) -> None:
        self._asked = asked = sampling_from_wire(submit.sampling)
        if not submit.num_choices <= asked.beam_width <= MAX_BEAM_WIDTH:
            raise InvalidRequest(
                f"{asked.beam_width} beams for {submit.num_choices} choices, at most {MAX_BEAM_WIDTH} are searched",
                param="n",
            )
        super().__init__(parts, self._first_step(submit))
        self.num_choices = submit.num_choices
        self.returns_logprobs = asked.num_logprobs is not None
        self._routes = routes
        self._deliver = deliver
        self._fail = fail
        ends = asked.stop_token_ids if asked.ignore_eos else asked.stop_token_ids | parts.guides.eos_token_ids
        self._search = BeamSearch(asked, ends)
        self._likeliest: dict[SequenceId, TokenLogprobs] = {}
        self._outstanding = {sequence.sequence_id for sequence in self.sequences}
        self._first = self.sequences[0]
        self._first.keeps_blocks = True
        self._prompt = self._first.token_ids[: self._first.num_prompt_tokens]

    def add_prompt_scores(self, session: DecodeSession, scores: PromptScores) -> None:
        """See `StepReader`; such sessions ask for none."""

    def add_token(
        self, session: DecodeSession, sequence: Sequence, token_id: int, logprobs: TokenLogprobs | None
    ) -> None:
        """See `StepReader`: what was sampled does not matter, what is likeliest does."""
        self.note_token(sequence)
        assert logprobs is not None, "beams ask for log-probabilities"
        self._likeliest[sequence.sequence_id] = logprobs

    def add_finish(self, session: DecodeSession, sequence: Sequence) -> None:
        """See `StepReader`."""
        self._routes.pop(sequence.sequence_id, None)
        self._outstanding.discard(sequence.sequence_id)
        if sequence.finish_reason is FinishReason.ABORTED:
            self._fail(self, WorkerLost(f"worker {self._parts.status.identity.worker_id} stopped"))
        elif not self._outstanding:
            self._step()

    def fail(self, session: DecodeSession, error: TandemError) -> None:
        """See `StepReader`."""
        self._fail(self, error)

    def flush(self) -> None:
        """See `StepReader`; the session sends nothing before its end."""

    def end(self) -> list[SequenceId]:
        """See `DecodeSession`; also gives up the blocks of beams that wait for the others."""
        super().end()
        self._parts.engine.abort(self._outstanding)
        for sequence in self.sequences:
            self._parts.engine.release(sequence)
        return []

    def beam_finish_message(self, number: int, beam: Beam) -> pb.Finish:
        """The last word on the choice that got this beam."""
        return pb.Finish(
            sequence=self.first_sequence + number,
            reason=pb.FINISH_REASON_LENGTH if beam.stop_token_id < 0 else pb.FINISH_REASON_STOP,
            stop_token_id=beam.stop_token_id,
            prompt_tokens=len(self._prompt),
            cached_tokens=self._cached_tokens(self._first),
            output_tokens=len(beam.token_ids),
            timeline=self._timeline(self._first),
        )

    def started_message(self) -> pb.Started:
        """See `DecodeSession`."""
        return pb.Started(session_id=self.session_id, cached_tokens=self._cached_tokens(self._first))

    def _step(self) -> None:
        """From one step's outputs to the next step, or to the end."""
        if life := self._unfinished.pop(self._first.sequence_id, None):
            life.apply(KvEvent.END)
        self._search.advance([self._likeliest[sequence.sequence_id] for sequence in self.sequences])
        self._likeliest.clear()
        if self._search.is_over:
            self._deliver(self, self._search.best())
            return
        before = self.sequences
        origins = [before[number] for number in self._search.origins]
        self.sequences = [
            self._sequence(number, beam, origin)
            for number, (beam, origin) in enumerate(zip(self._search.beams, origins, strict=True))
        ]
        self._outstanding = {sequence.sequence_id for sequence in self.sequences}
        for sequence in self.sequences:
            self._routes[sequence.sequence_id] = (self, self)
        try:
            self._parts.engine.branch(before, list(zip(origins, self.sequences, strict=True)))
        except TandemError as exc:
            for sequence in before:
                self._parts.engine.release(sequence)
            self._fail(self, exc)

    def _sequence(self, number: int, beam: Beam, origin: Sequence) -> Sequence:
        params = replace(
            self._asked, max_tokens=len(beam.token_ids) + 1, num_logprobs=2 * self._asked.beam_width, temperature=0.0
        )
        return Sequence(
            session_id=self.session_id,
            token_ids=[*self._prompt, *beam.token_ids],
            num_prompt_tokens=len(self._prompt),
            sampling=params,
            namespace=self._first.namespace,
            choice=number,
            priority=self._first.priority,
            tenant=self._first.tenant,
            arrival_s=self._first.arrival_s,
            block_hashes=list(origin.block_hashes),
            keeps_blocks=True,
        )

    @staticmethod
    def _first_step(submit: pb.Submit) -> pb.Submit:
        """The same session with one choice of one token: what the search begins with."""
        first = pb.Submit()
        first.CopyFrom(submit)
        first.num_choices = 1
        del first.resumed[:]  # beams show nothing before they are complete, so they begin anew elsewhere
        first.sampling.max_tokens = 1
        first.sampling.temperature = 0.0
        first.sampling.num_logprobs = 2 * submit.sampling.beam_width
        return first
