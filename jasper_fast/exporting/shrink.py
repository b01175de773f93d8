"""Make an export smaller: fewer tokens, float16 weights, or one int8 graph. Print what each step costs."""

from __future__ import annotations

import argparse
import heapq
import shutil
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np

from jasper_fast.config.data import SourceConfig
from jasper_fast.data.text import join_columns, text_digest
from jasper_fast.data.text_sources import read_source
from jasper_fast.exporting.coverage import check_coverage
from jasper_fast.exporting.parity import PROBES
from jasper_fast.exporting.small_forms import Form, GraphForm, WeightsForm, Whole, encode_model
from jasper_fast.exporting.token_table import folder_bytes, folder_vocabulary
from jasper_fast.exporting.vocabulary import Vocabulary
from jasper_fast.fitting.agreement import Reference
from jasper_fast.models.embedder import load_model
from jasper_fast.models.folder import FACTS_FILE, read_json, write_json
from jasper_fast.utils.errors import JasperError

MEASURED_TEXTS = 600  # of the corpus; a fifth of them are the questions
FEWEST_MEASURED = 50
COVERED = 0.999  # fraction of the corpus's tokens that are kept if no size is given
READ_AT_ONCE = 1000
SPARE = 0.01  # fraction of the size that stays free at least, for files that are written later
MB = 1e6


@dataclass(frozen=True)
class ShrinkRequest:
    """Options that make an export smaller. The default changes nothing.

    Args:
        vocabulary: text sources that decide which tokens are kept. Empty: all tokens are kept.
        columns: columns of these sources, joined to one text.
        half: True to store weights as float16.
        max_mb: largest size of the folder in MB (10^6 bytes). None: any size.
        graph: True if the smallest form must be a graph, False if it must be weights for PyTorch. None: the better one.
        reserve: bytes that stay free for files that are written later, such as the card and ``golden.json``.
        checks: texts by name that the pruned vocabulary must cover, such as those of evaluation sets.
        trust_remote_code: permission to run code from the model. Default: False.
    """

    vocabulary: tuple[str, ...] = ()
    columns: tuple[str, ...] = ("text",)
    half: bool = False
    max_mb: float | None = None
    graph: bool | None = None
    reserve: int = 0
    checks: Mapping[str, Sequence[str]] = field(default_factory=dict)
    trust_remote_code: bool = False


def add_options(parser: argparse.ArgumentParser) -> None:
    """Add the options of ``ShrinkRequest`` to a command that has ``--onnx``, ``--int8`` and ``--onnx-only``."""
    parser.add_argument(
        "--vocabulary",
        action="append",
        default=[],
        metavar="TEXTS",
        help="keep only the tokens that these texts and their language need; may be given several times",
    )
    parser.add_argument("--weights", choices=["fp16"], help="store weights as float16; readers compute in float32")
    parser.add_argument("--max-mb", type=float, metavar="MB", help="choose float16 or int8 and tokens to fit this size")


def shrink_request(arguments: argparse.Namespace) -> ShrinkRequest:
    """Return what the options of ``add_options`` and ``--columns`` ask for.

    Raises:
        JasperError: an option needs a folder of one form, and several are requested.
    """
    graphs = [name for name in ("onnx", "int8") if getattr(arguments, name)]
    if arguments.max_mb is not None and graphs and not arguments.onnx_only:
        raise JasperError(
            f"--max-mb writes one form of the model (got --{graphs[0]} for another). Fix: leave out --{graphs[0]}, or "
            "give --onnx-only for a graph"
        )
    return ShrinkRequest(
        vocabulary=tuple(arguments.vocabulary),
        columns=tuple(arguments.columns),
        half=arguments.weights == "fp16",
        max_mb=arguments.max_mb,
        graph=True if arguments.onnx_only else None,
        trust_remote_code=arguments.trust_remote_code,
    )


@dataclass(frozen=True)
class Step:
    """One step, and the model after it.

    Args:
        name: the step.
        mb: size of the folder in MB.
        tokens: number of tokens. None: all.
        removed: fraction of the corpus's tokens that were removed.
        agreement: mean nDCG@10 with the whole model's ranking of the corpus's texts. None: not measured.
    """

    name: str
    mb: float
    tokens: int | None = None
    removed: float = 0.0
    agreement: float | None = None

    def line(self) -> str:
        """Describe the step for the terminal."""
        tokens = (
            "" if self.tokens is None else f", {self.tokens:,} tokens ({self.removed:.2%} of the texts' tokens cut)"
        )
        cost = "" if self.agreement is None else f", agreement with the whole model {self.agreement:.4f}"
        return f"{self.name}: {self.mb:.2f} MB{tokens}{cost}"


def shrink(request: ShrinkRequest, folder: Path) -> list[Step]:
    """Make an unpublished flat model folder smaller, in place.

    Agreement is nDCG@10 on up to 600 texts of the corpus, where the whole model's nearest texts are the right answers.

    Args:
        request: what to do.
        folder: flat sentence-transformers folder. With ``max_mb``, it may become ``onnx/model_int8.onnx`` and the
            tokenizer, without the files that PyTorch loads.

    Returns:
        The steps, which are also printed and written to ``training.json``.

    Raises:
        JasperError: the texts cannot be read, the tokenizer cannot be pruned, or the vocabulary loses a language of the
            texts to check. The size cannot be reached; the message has the smallest possible one.
    """
    if not (request.vocabulary or request.half or request.max_mb is not None):
        return []
    _check(request)
    with tempfile.TemporaryDirectory(dir=folder.parent, prefix=".unfinished-shrink-") as place:
        work = _Work(request, folder, Path(place))
        out, steps = work.as_asked() if request.max_mb is None else work.to_size(request.max_mb * MB)
        if out is not None:
            _replace_content(folder, out)
    facts = read_json(folder / FACTS_FILE) if (folder / FACTS_FILE).is_file() else {}
    write_json(folder / FACTS_FILE, {**facts, "shrunk": [vars(step) for step in steps]})
    return steps


def _check(request: ShrinkRequest) -> None:
    if request.max_mb is not None and not 0 < request.max_mb < float("inf"):
        raise JasperError(f"--max-mb: got {request.max_mb}, expected a size above 0 MB. Fix: give a size such as 10")
    if request.graph and request.half:
        raise JasperError(
            "--weights fp16 is for the weights that PyTorch loads (got it for an export with only a graph). Fix: leave "
            "out --weights fp16, or the options for the graph"
        )


class _Work:
    """One call of ``shrink``.

    Args:
        request: what to do.
        folder: the whole model.
        place: empty folder for smaller ones.
    """

    def __init__(self, request: ShrinkRequest, folder: Path, place: Path) -> None:
        model = load_model(str(folder), device="cpu", trust_remote_code=request.trust_remote_code)
        graph = request.max_mb is not None and request.graph is not False and not request.half
        vocabulary = folder_vocabulary(folder, model) if request.vocabulary or graph else None
        counts: np.ndarray | None = None
        self.sample: list[str] = []
        if vocabulary is not None and request.vocabulary:
            counts, self.sample = _read_corpus(request, vocabulary)
        self.request, self.place = request, place
        self.whole = Whole(folder, model, vocabulary, counts, request.trust_remote_code)
        self.texts = [*PROBES.values(), *self.sample]
        self.rows = encode_model(model, self.texts)
        self.reference: Reference | None = None
        if len(self.sample) >= FEWEST_MEASURED:
            self.reference = Reference(*_parts(self.rows[-len(self.sample) :]))
        elif request.vocabulary:
            print(f"note: --vocabulary: {len(self.sample)} texts are too few to measure what the steps cost")
        self.start = self._report("whole model", folder_bytes(folder) / MB)

    def as_asked(self) -> tuple[Path, list[Step]]:
        """Prune the vocabulary to what the corpus needs, and store float16, if requested."""
        out, steps = self.place / "small", [self.start]
        size, counts = 1, self.whole.counts
        if counts is not None:
            found = np.cumsum(counts[self.whole.order])
            size = max(int(np.searchsorted(found, COVERED * found[-1])) + 1, self.whole.least)
        for half in ([False] if counts is not None else []) + ([True] if self.request.half else []):
            form = WeightsForm(self.whole, half)
            self._check_languages(form.kept(size))
            steps.append(self._measure(form, out, size, form.write(size, out)))
        return out, steps

    def to_size(self, limit: float) -> tuple[Path | None, list[Step]]:
        """Write the forms that are allowed, each as large as the limit permits, and choose the better one."""
        if folder_bytes(self.whole.folder) <= limit - self.request.reserve:
            print(f"the model has at most {limit / MB:g} MB already")
            return None, [self.start]
        usable = limit - max(SPARE * limit, self.request.reserve)
        smallest, found = {}, []
        for form in self._forms():
            out = self.place / form.name.replace(" ", "-")
            size, written = _fit(form, out, usable)
            if written > usable:
                smallest[form.name] = written
                print(f"{form.name}: at least {written / MB:.2f} MB")
                continue
            self._check_languages(form.kept(size))
            found.append((out, self._measure(form, out, size, written)))
        if not found:
            raise JasperError(self._too_large(limit, smallest))
        out, step = max(found, key=lambda one: one[1].agreement or 0)  # the first one if nothing was measured
        print(f"chosen: {step.name}")
        return out, [self.start, step]

    def _forms(self) -> Iterator[Form]:
        """Yield the forms that the request allows."""
        if not self.request.graph:
            yield WeightsForm(self.whole, half=True)
        if self.request.graph is not False and not self.request.half:
            place = self.place / "graph"
            place.mkdir()
            try:
                yield GraphForm(self.whole, place)
            except JasperError as error:
                if self.request.graph:
                    raise
                print(f"note: no int8 graph: {error}")

    def _measure(self, form: Form, out: Path, size: int, written: int) -> Step:
        rows, kept, agreement = form.encode(out, self.texts), form.kept(size), None
        self._check_same(form, rows, kept)
        if self.reference is not None:
            agreement = float(self.reference.measure(*_parts(rows[-len(self.sample) :])).ndcg.mean())
        counts = self.whole.counts
        removed = 0.0 if counts is None or kept is None else 1 - float(counts[kept].sum()) / max(counts.sum(), 1)
        name = f"{form.name} with {len(form.fine(size)):,} fine tokens" if isinstance(form, GraphForm) else form.name
        return self._report(name, written / MB, None if kept is None else len(kept), removed, agreement)

    def _check_same(self, form: Form, rows: np.ndarray, kept: np.ndarray | None) -> None:
        """Compare embeddings of a small form with the whole model's, for texts whose tokens were all kept."""
        cosines = (rows * self.rows).sum(axis=1)
        if kept is not None and self.whole.vocabulary is not None:
            known = set(kept.tolist())
            cosines = cosines[[known.issuperset(ids) for ids in self.whole.vocabulary.encode(self.texts)]]
        if len(cosines) and not cosines.min() >= form.least_cosine:
            raise JasperError(
                f"{form.name}: texts whose tokens were all kept have other embeddings (got a cosine of "
                f"{cosines.min():.6f}, expected at least {form.least_cosine}). Nothing was published. Fix: export "
                "without --vocabulary, --weights and --max-mb"
            )

    def _report(self, *values: object) -> Step:
        step = Step(*values)  # type: ignore[arg-type]
        print(step.line(), flush=True)
        return step

    def _check_languages(self, kept: np.ndarray | None) -> None:
        if kept is None or self.whole.vocabulary is None:
            return
        for name, texts in self.request.checks.items():
            check_coverage(self.whole.vocabulary, kept, texts, name)

    def _too_large(self, limit: float, smallest: Mapping[str, int]) -> str:
        name, size = min(smallest.items(), key=lambda one: one[1])
        size += self.request.reserve
        fix = f"give --max-mb {np.ceil(size / MB * 10) / 10:g}, or train a student with fewer or narrower layers"
        if not self.request.vocabulary:
            fix = f"give --vocabulary TEXTS, so that tokens can be removed, or {fix}"
        return (
            f"--max-mb: the model cannot be made that small (got {size / MB:.2f} MB at least, as {name}, expected at "
            f"most {limit / MB:g}). Nothing was published. Fix: {fix}"
        )


def _fit(form: Form, out: Path, limit: float) -> tuple[int, int]:
    """Write the largest size of a form that fits, by bisection over the bytes of written folders.

    Returns:
        The size and its bytes. They are those of the smallest size if even it does not fit.
    """
    low, high = form.sizes
    written = {high: form.write(high, out)}
    if written[high] <= limit:
        return high, written[high]
    written[low] = form.write(low, out)
    while written[low] <= limit and high - low > max(1, form.sizes[1] // 1000):
        # The bytes are nearly linear in the size, so the first guess is close. A margin keeps it inside the interval.
        share = (0.9995 * limit - written[low]) / (written[high] - written[low])
        guess = low + int(np.clip(share, 0.01, 0.99) * (high - low))
        guess = min(max(guess, low + 1), high - 1)
        written[guess] = form.write(guess, out)
        low, high = (guess, high) if written[guess] <= limit else (low, guess)
        if limit - written[low] < 0.001 * limit:
            break
    return low, form.write(low, out)


def _read_corpus(request: ShrinkRequest, vocabulary: Vocabulary) -> tuple[np.ndarray, list[str]]:
    """Count the tokens of the corpus, and draw texts to measure with."""
    counts, texts = np.zeros(len(vocabulary.tokens), np.int64), 0
    drawn: dict[str, str] = {}
    for some in _batches(request):
        texts += len(some)
        counts += vocabulary.count(some)
        known = {text_digest(text): text for text in some} | drawn
        drawn = {digest: known[digest] for digest in heapq.nsmallest(MEASURED_TEXTS, known)}
    print(f"--vocabulary: {texts:,} texts with {counts.sum():,} tokens, {np.count_nonzero(counts):,} of them distinct")
    return counts, list(drawn.values())


def _batches(request: ShrinkRequest) -> Iterator[list[str]]:
    batch: list[str] = []
    for path in request.vocabulary:
        source = SourceConfig(path=path, columns=list(request.columns))
        for row in read_source(source):
            batch += [join_columns(row)] if source.join else row
            if len(batch) >= READ_AT_ONCE:
                yield batch
                batch = []
    if batch:
        yield batch


def _parts(rows: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Split embeddings into questions, a fifth of them, and documents."""
    first = len(rows) // 5
    return rows[:first], rows[first:]


def _replace_content(folder: Path, new: Path) -> None:
    for path in folder.iterdir():
        shutil.rmtree(path) if path.is_dir() else path.unlink()
    for path in new.iterdir():
        shutil.move(path, folder)
