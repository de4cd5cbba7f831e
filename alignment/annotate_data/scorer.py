"""Scores of texts under a sequence-classification reward model, in batches that do not change the scores."""

import itertools
from collections.abc import Callable, Collection, Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor

import torch

from annotate_data.texts import encode
from common.cli import UserError
from common.models import context_length, default_device, load_config, load_reward_model, load_tokenizer

# Texts are sorted by length inside a window: long enough to batch well, short enough to hold in memory.
WINDOW = 4096

# Most tokens of a batch, padding included, by device: a GPU wants large batches; a CPU batches that its caches hold.
TOKEN_BUDGET = {"cuda": 16384, "cpu": 2048}


class TextBatches:
    """What the reward model reads of texts, in batches that depend on texts and token budget alone; without weights.

    Args:
        name: a folder or hub name of an `AutoModelForSequenceClassification`.
        max_length: tokens kept of a text, as far as tokenizer and model allow them; None = all of these.
        token_budget: most tokens, padding included, in one forward pass; None = what suits this machine's
            device, see TOKEN_BUDGET.
        trust_remote_code: whether the model may bring its own Python code.

    Attributes:
        cut: how many of the texts so far were longer than `max_length`.
    """

    def __init__(
        self,
        name: str,
        max_length: int | None = None,
        token_budget: int | None = None,
        trust_remote_code: bool = False,
    ) -> None:
        config = load_config(name, "reward model", trust_remote_code)
        self.name, self.vocabulary = name, config.get_text_config().vocab_size
        self.tokenizer = load_tokenizer(name, "reward model", trust_remote_code)
        limits = (max_length, context_length(config, self.tokenizer))
        self.max_length = min((limit for limit in limits if limit is not None), default=None)
        self.token_budget = token_budget or TOKEN_BUDGET[default_device()]
        self.cut = 0

    def encode_all(self, texts: Iterable[tuple[str, str]]) -> Iterator[list[int]]:
        """Yields the token ids of each text with its response; only a window of texts is in memory."""
        texts = iter(texts)
        while window := list(itertools.islice(texts, WINDOW)):
            whole, responses = map(list, zip(*window, strict=True))
            tokens, cut = encode(self.tokenizer, whole, self.max_length, responses)
            self.cut += sum(cut)
            for ids in tokens:
                self._check_ids(ids)
                yield ids

    def _check_ids(self, ids: list[int]) -> None:
        highest = max(ids, default=0)
        if highest >= self.vocabulary:  # a token that was added to the tokenizer only
            token = self.tokenizer.convert_ids_to_tokens(highest)
            raise UserError(
                f"reward model {self.name}: a text holds the token {token!r}, whose id {highest} is beyond the "
                f"model's vocabulary of {self.vocabulary}"
            )


def length_batches(lengths: Sequence[int], budget: int, skip: Collection[int] = frozenset()) -> Iterator[list[int]]:
    """Yields indices of texts of similar length, the longest of a window first.

    Batches whose texts are all in `skip` (indices that need no score) are left out; the others do not depend on
    it: a continued run computes the same numbers.

    Args:
        lengths: tokens of each text.
        budget: most tokens of a batch, padding included.
    """
    for start in range(0, len(lengths), WINDOW):
        window = range(start, min(start + WINDOW, len(lengths)))
        waiting = sorted(window, key=lambda i: -lengths[i])
        while waiting:
            size = within_budget(len(waiting), lengths[waiting[0]], budget)
            if not all(i in skip for i in waiting[:size]):
                yield waiting[:size]
            waiting = waiting[size:]


class RewardScorer(TextBatches):
    """A reward model that scores texts.

    Args:
        column: which label is the reward; may be None where there is only one.
        dtype: float32 or bfloat16.
        say: is given what the user should know of.
        options: see `TextBatches`.
    """

    def __init__(
        self,
        name: str,
        column: int | None = None,
        dtype: str = "float32",
        trust_remote_code: bool = False,
        say: Callable[[str], None] = print,
        **options,
    ) -> None:
        super().__init__(name, trust_remote_code=trust_remote_code, **options)
        self.say = say
        self.model = load_reward_model(name, dtype, trust_remote_code).to(default_device())
        self.column = _checked_column(name, self.model.config.num_labels, column)
        self.padding_is_safe = self._padding_is_safe(dtype)

    def score(self, texts: list[str]) -> list[float]:
        """One score a text, in order."""
        scores = dict(self.stream(texts))
        return [scores[i] for i in range(len(texts))]

    def stream(self, texts: list[str], skip: Collection[int] = frozenset()) -> Iterator[tuple[int, float]]:
        """Yields (index, score) of the texts that are not in `skip`, as batches finish."""
        rows = list(self.encode_all((text, "") for text in texts))
        for indices in length_batches([len(row) for row in rows], self.token_budget, skip):
            scores = self.score_rows([rows[i] for i in indices])
            yield from (pair for pair in zip(indices, scores, strict=True) if pair[0] not in skip)

    def score_rows(self, rows: list[Sequence[int]]) -> list[float]:
        """Scores of a batch's token lists: in one pass, unless padding or memory forbids that."""
        scores: list[float] = []
        while waiting := rows[len(scores) :]:
            part = waiting[: within_budget(len(waiting), len(waiting[0]), self.token_budget)]
            if not self.padding_is_safe:
                part = list(itertools.takewhile(lambda row: len(row) == len(waiting[0]), part))
            scores += self._try_forward(part) or []
        return scores

    def _try_forward(self, batch: list[Sequence[int]]) -> list[float] | None:
        """The batch's scores, or None after memory ran out and the token budget was halved."""
        try:
            return self.forward(batch)
        except torch.OutOfMemoryError:
            if len(batch) == 1:
                raise UserError(
                    f"a text of {len(batch[0])} tokens alone does not fit in the GPU's memory; use a smaller "
                    "--max_length, or --dtype bfloat16"
                ) from None
        # Halve what was really used: the budget may be far above it.
        self.token_budget = min(self.token_budget, len(batch) * len(batch[0])) // 2
        torch.cuda.empty_cache()
        self.say(f"out of GPU memory: going on with batches of {self.token_budget} tokens")
        return None

    def forward(self, batch: list[Sequence[int]]) -> list[float]:
        """Scores of one batch of token lists, the longest first; on a CPU each core takes a part of it."""
        inputs = pad_right(batch, self.model.config)
        if inputs is None:  # every id of the vocabulary occurs, so nothing is left to pad with
            return [score for row in batch for score in self.forward([row])]
        parts = parts_of(inputs, torch.get_num_threads()) if self.model.device.type == "cpu" else [inputs]
        if len(parts) == 1:
            return self._scores(*parts)
        return [score for scores in in_threads(self._scores, parts) for score in scores]

    @torch.inference_mode()
    def _scores(self, inputs: dict[str, torch.Tensor]) -> list[float]:
        inputs = {name: tensor.to(self.model.device) for name, tensor in inputs.items()}
        return self.model(**inputs).logits[:, self.column].float().tolist()

    def _padding_is_safe(self, dtype: str) -> bool:
        """Whether a text padded to a longer one keeps its score; a model's own code may not promise that."""
        texts = ["A short text.", "A text that is longer, so that the short one needs padding beside it."]
        rows, _ = encode(self.tokenizer, texts, self.max_length)
        inputs = pad_right(rows, self.model.config)
        if inputs is None:  # then `forward` never pads these
            return True
        together, alone = self._scores(inputs)[0], self.forward(rows[:1])[0]
        tolerance = 1e-3 if dtype == "float32" else 0.1 * (1 + abs(alone))
        # NaN scores are reported with their row later.
        if not abs(together - alone) > tolerance:
            return True
        self.say(f"padding changes this model's scores ({alone:.4f} to {together:.4f}): batching equal lengths only")
        return False


class ScoringEngine:
    """A scorer in an actor of its own: what it says goes with its answers."""

    def __init__(self, name: str, **options) -> None:
        self.notes: list[str] = []
        self.scorer = RewardScorer(name, say=self.notes.append, **options)

    def __call__(self, rows: list[Sequence[int]]) -> tuple[list[float], list[str]]:
        scores = self.scorer.score_rows(rows)
        notes = self.notes.copy()
        self.notes.clear()
        return scores, notes


def parts_of(inputs: dict[str, torch.Tensor], count: int) -> list[dict[str, torch.Tensor]]:
    """Divide a batch [B, T], padded on the right, into `count` parts at most, each as wide as its longest text."""
    chunks = zip(*(tensor.chunk(count) for tensor in inputs.values()), strict=True)
    parts = [dict(zip(inputs, chunk, strict=True)) for chunk in chunks]
    widths = [int(part["attention_mask"].sum(1).max()) for part in parts]
    return [{name: x[:, :width] for name, x in part.items()} for part, width in zip(parts, widths, strict=True)]


def in_threads(work: Callable, parts: list) -> list:
    """Return `work` of every part, each on one core: cores that share a product wait for one another every time."""
    cores = torch.get_num_threads()
    try:
        with ThreadPoolExecutor(len(parts), initializer=torch.set_num_threads, initargs=(1,)) as pool:
            return list(pool.map(work, parts))
    finally:
        torch.set_num_threads(cores)


def within_budget(count: int, longest: int, budget: int) -> int:
    """How many of `count` texts, all padded to `longest` tokens, fit into one pass of `budget` tokens; 1 or more."""
    return min(count, max(1, budget // max(1, longest)))


def pad_right(rows: list[Sequence[int]], config) -> dict[str, torch.Tensor] | None:
    """Pads token lists on the right, in such a way that the score is read at each text's last token.

    Decoder models with a head look for the last id that is not `config.pad_token_id`. Where that id is EOS, or
    occurs in a text for another reason, they score an earlier token without a word. So pad with an id that occurs
    in none of the rows, and tell the model so; the attention mask hides what the padding holds.

    Returns:
        {input_ids [B, T], attention_mask [B, T]}, or None if several rows together use every id.
    """
    text_config = config.get_text_config()
    eos = text_config.eos_token_id
    used = set(itertools.chain.from_iterable(rows)).union(eos if isinstance(eos, list) else [eos])
    vocabulary = range(text_config.vocab_size)
    candidates = itertools.chain([text_config.pad_token_id], vocabulary)
    pad = next((i for i in candidates if i in vocabulary and i not in used), None)
    if pad is None and len(rows) > 1:
        return None
    config.pad_token_id = text_config.pad_token_id = pad
    longest = max(map(len, rows))
    return {
        "input_ids": torch.tensor([[*row, *[pad] * (longest - len(row))] for row in rows]),
        "attention_mask": torch.tensor([[1] * len(row) + [0] * (longest - len(row)) for row in rows]),
    }


def _checked_column(name: str, labels: int, column: int | None) -> int:
    if column is None and labels > 1:
        raise UserError(f"reward model {name}: has {labels} labels; choose one with --reward_column 0 … {labels - 1}")
    if column is not None and column >= labels:
        raise UserError(f"reward model {name}: --reward_column {column}, but it has {labels} label(s)")
    return column or 0
