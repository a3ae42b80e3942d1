"""Text that a model generates, by fairseq's own generator."""

from argparse import Namespace
from collections.abc import Callable
from dataclasses import dataclass

import torch
from fairseq.sequence_generator import SequenceGenerator
from fairseq.tasks.language_modeling import LanguageModelingTask
from torch import Tensor, nn

from fairseq_hash.core.errors import UserError
from fairseq_hash.core.options import flag_of
from fairseq_hash.options.sampling_options import Sampling

DEFAULT_LENGTH = 50


@dataclass(frozen=True)
class Sample:
    """A text and its continuation by a model.

    Attributes:
        text: the whole text, without the end of the line.
        tokens: int64 `[L]`, the text's token ids, on the CPU.
        given: number of tokens that the model was given.
        log_probabilities: fp32 `[L - given]`, of each added token, in nats, at the sampling's temperature.
    """

    text: str
    tokens: Tensor
    given: int
    log_probabilities: Tensor


class _Generator(SequenceGenerator):
    """fairseq's generator, with probability 1 for the given text.

    Upstream: the tokens of a prefix keep their own log-probabilities. If one is so improbable that its probability is 0
    in fp32, as at a low temperature, drawing stops with "invalid multinomial distribution".
    """

    def _prefix_tokens(
        self, step: int, lprobs: Tensor, scores: Tensor, tokens: Tensor, prefix_tokens: Tensor, beam_size: int
    ) -> tuple[Tensor, Tensor, Tensor]:
        lprobs, tokens, scores = super()._prefix_tokens(step, lprobs, scores, tokens, prefix_tokens, beam_size)
        given_B1 = prefix_tokens[:, step].repeat_interleave(beam_size).unsqueeze(1)
        return lprobs.scatter(1, given_B1, 0.0), tokens, scores


def sample(
    model: nn.Module,
    task: LanguageModelingTask,
    read_BL: Tensor,
    sampling: Sampling,
    detokenize: Callable[[Tensor], str],
) -> list[Sample]:
    """Return samples for what a model reads, `[1, given + 1]` with the start symbol: see `LanguageModel.sample`."""
    given = read_BL.shape[1] - 1
    eos, size = task.target_dictionary.eos(), len(task.target_dictionary)
    if (read_BL[0, 1:] == eos).any():
        raise UserError("the text has several lines, and fairseq's generator stops at the end of a line; give one line")
    for name, most in (("number", size - 1), ("beam", size - 1), ("top_k", size)):
        value = getattr(sampling, name)
        if value is not None and value > most:
            raise UserError(
                f"{flag_of(name)} {value} is out of range; give at most {most}, because there are no more symbols"
            )
    room = model.max_positions() - 1 - given
    length = min(DEFAULT_LENGTH, room) if sampling.length is None else sampling.length
    if room < 1 or length > room:
        raise UserError(
            f"the model reads {model.max_positions():,} tokens at once: after {given:,} of the text there is room for "
            f"{max(room, 0):,} more, not {max(length, 1):,}; give a shorter text or --length"
        )
    options = Namespace(
        sampling=sampling.beam is None,
        sampling_topk=sampling.top_k or -1,
        sampling_topp=sampling.top_p or -1.0,
        temperature=sampling.temperature,
        beam=sampling.beam or sampling.number,
        max_len_a=0,
        max_len_b=given + length,
    )
    generator = task.build_generator([model], options, seq_gen_cls=_Generator)
    devices = [read_BL.device] if read_BL.device.type == "cuda" else []
    with torch.random.fork_rng(devices), torch.no_grad():
        torch.manual_seed(sampling.seed)
        (found,) = task.inference_step(generator, [model], {"net_input": {"src_tokens": read_BL}})
    return [_sample(one, given, detokenize) for one in found[: sampling.number]]


def _sample(found: dict[str, Tensor], given: int, detokenize: Callable[[Tensor], str]) -> Sample:
    tokens, scores = found["tokens"][:-1].cpu(), found["positional_scores"][:-1].cpu()  # without the end of the line
    return Sample(detokenize(tokens), tokens, given, scores[given:])
