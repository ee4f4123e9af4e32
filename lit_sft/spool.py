"""Samples → encoded chunks in a work folder, by several processes; each is complete or absent, so a killed run goes on.

The worker processes import this module: it keeps torch out, so that they are small and start quickly.
"""

import hashlib
import io
import json
import os
import pickle
from array import array
from collections.abc import Iterable, Iterator
from contextlib import ExitStack
from dataclasses import dataclass
from functools import lru_cache
from itertools import compress, islice
from pathlib import Path

import numpy as np
from tqdm import tqdm

from lit_sft.applied import check_templates, find_template
from lit_sft.atomic import write_atomically
from lit_sft.errors import InputError, Interrupted, stops
from lit_sft.measures import measure, signatures
from lit_sft.prompts import Sample
from lit_sft.samples import check_ids, encode_sample, is_text
from lit_sft.sources import SHOWN, Problem, SampleStream, refusal
from lit_sft.tokenizer import Tokenizer
from lit_sft.workers import Workers

CHUNK = 1000
"""Rows of a chunk."""
ROW = np.dtype(
    [
        *((name, np.int32) for name in ("source", "row", "length", "n_prompt", "n_needed", "n_kept", "n_labels")),
        ("is_text", np.bool),
        ("template", np.uint8),
        *((name, np.uint64) for name in ("text", "prompt", "question")),
        *((name, np.float32) for name in ("alphanumeric", "repetition")),
    ]
)
"""What is known of an example: its source and row there, its tokens in all, before its first response, up to its last
label, and as many as its length limit leaves, the labels among those, whether it is plain text, what
``applied.find_template`` says of it, and its ``Measures``."""


@dataclass(frozen=True)
class Encoding:
    """All that decides what a sample becomes."""

    checkpoint_dir: Path
    tokenizer: str
    """Its fingerprint."""
    style: str
    mask_prompt: bool
    max_seq_length: int
    vocab_size: int
    """Ids that the model has embeddings for."""
    quality: bool
    """Whether the shares are measured that filters ask for."""
    near: bool
    """Whether MinHash signatures are made."""
    refuses_templates: bool
    """Whether data are refused in which a template is already applied."""


class Spool:
    """The encoded examples, in the order of their sources and rows.

    Attributes:
        rows: (N,) ROW, one an example.
        signatures: (N, PERMUTATIONS) uint32, or (N, 0) where none were asked for.
    """

    def __init__(self, paths: list[Path]) -> None:
        self.paths, self.firsts = paths, [0]
        most = len(paths) * CHUNK  # pages that are not written take no memory
        self.rows = np.empty(most, ROW)
        for i, path in enumerate(paths):
            rows, found, _ = _read_chunk(path)
            if i == 0:
                self.signatures = np.empty((most, found.shape[1]), np.uint32)
            here = slice(self.firsts[-1], self.firsts[-1] + len(rows))
            self.rows[here], self.signatures[here] = rows, found
            self.firsts.append(here.stop)
        self.rows, self.signatures = self.rows[: self.firsts[-1]], self.signatures[: self.firsts[-1]]
        self.ends = np.cumsum(self.rows["length"], dtype=np.int64)

    def problems(self) -> Iterator[Problem]:
        """The rows that gave no example, in their order."""
        for path in self.paths:
            yield from _read_chunk(path)[2]

    def read(self, examples: np.ndarray) -> Iterator[tuple[int, np.ndarray, np.ndarray]]:
        """The tokens of ``examples`` in the order of the disk: position in ``examples``, ids int32, labels mask."""
        order = np.argsort(examples, kind="stable")
        chunks = np.searchsorted(self.firsts, examples[order], side="right") - 1
        for positions in np.split(order, np.flatnonzero(np.diff(chunks)) + 1):
            chunk = int(np.searchsorted(self.firsts, examples[positions[0]], side="right")) - 1
            first, last = self.firsts[chunk], self.firsts[chunk + 1] - 1
            begin = self.ends[first] - self.rows["length"][first]
            ends = (self.ends[examples[positions]] - begin).tolist()
            starts = (ends - self.rows["length"][examples[positions]]).tolist()
            with self.paths[chunk].open("rb") as file:
                file.seek(4 * int(begin - self.ends[last]), os.SEEK_END)  # the tokens are what is last in a file
                if len(positions) > (last - first) // 4:  # read at once; a map's pages would count as our memory
                    ids, mask = _decoded(file.read())
                    for position, start, end in zip(positions.tolist(), starts, ends, strict=True):
                        yield position, ids[start:end], mask[start:end]
                    continue
                offset = file.tell()
                for position, start, end in zip(positions.tolist(), starts, ends, strict=True):
                    yield position, *_decoded(os.pread(file.fileno(), 4 * (end - start), offset + 4 * start))


def _decoded(tokens: bytes) -> tuple[np.ndarray, np.ndarray]:
    """Ids and labels mask of tokens as a chunk has them."""
    tokens = np.frombuffer(tokens, np.int32)
    mask = tokens < 0
    return np.where(mask, ~tokens, tokens), mask


def fill(
    folder: Path,
    streams: list[SampleStream],
    encoding: Encoding,
    tokenizer: Tokenizer,
    on_error: str,
    num_workers: int,
) -> tuple[Spool, list[int]]:
    """Encode all rows of ``streams`` into ``folder``; gives them, and the number of rows read from each stream.

    Chunks that lie there are used again where they were made of the same rows and ``encoding``. With ``on_error``
    "fail" every row is still read and checked, but from the first malformed one on none is encoded.

    Raises InputError when a stream cannot be read, gives no example, has templates applied that ``encoding`` refuses
    or, with ``on_error`` "fail", has malformed rows; RunFailed when a worker process dies; Interrupted when a signal
    came.
    """
    paths: list[Path] = []
    n_rows, n_again = [0] * len(streams), 0
    told_of: dict[int, str] = {}
    faults = _Faults()
    with ExitStack() as stack:
        progress = stack.enter_context(tqdm(desc="tokenizing", unit=" rows", disable=None))
        workers = None
        for source, items in _chunks(streams):
            if stops:  # whose exception was dropped: tqdm drops what is raised while it starts its thread
                raise Interrupted("error: stopped by a signal; nothing is left half written", stops[-1])
            if not n_rows[source]:
                told = f"{streams[source].name}: " if len(streams) > 1 else ""
                told_of[source] = str(streams[source])
                print(f"reading {told}{told_of[source]}", flush=True)
            n_rows[source] += len(items)
            progress.update(len(items))
            if on_error == "fail":
                faults.add(item for item in items if isinstance(item, Problem))
            content = pickle.dumps((encoding, items))
            digest = hashlib.blake2b(content, digest_size=16)
            paths.append(folder / f"{len(paths):06d}-{source}-{digest.hexdigest()}.npy")
            if faults.count or paths[-1].exists():
                n_again += not faults.count
                continue
            if workers is None and len(paths) > 2 and num_workers > 1:  # small data do not wait for processes
                workers = stack.enter_context(Workers(num_workers))
            if workers is None:
                write_chunk(paths[-1], source, items, encoding, tokenizer)
                if len(paths) == 1:  # seen early, as reading all may take long
                    _check(Spool(paths), streams, encoding)
            else:
                workers.submit(_write_chunk_of, paths[-1], source, content)
    for source, told in told_of.items():
        if told != str(streams[source]):
            print(f"{streams[source].name}, read to its end: {streams[source]}")
    if n_again:
        print(f"{n_again} of {len(paths)} chunks of {CHUNK} rows were there from an interrupted run")
    spool = None if faults.count else Spool(paths)
    if spool is not None and (on_error == "fail" or not len(spool.rows)):
        faults.add(spool.problems())
    if faults.count:
        seen = next((stream.seen for stream in streams if faults.first[0].place.startswith(stream.name)), {})
        raise refusal(faults.first, faults.count, faults.count < sum(n_rows), seen)
    _check(spool, streams, encoding)
    for path in set(folder.glob("*.npy")) - set(paths):
        path.unlink()
    return spool, n_rows


def _check(spool: Spool, streams: list[SampleStream], encoding: Encoding) -> None:
    if encoding.refuses_templates:
        check_templates(spool.rows, [stream.name for stream in streams], encoding.style)


class _Faults:
    """The first problems, and how many there are."""

    def __init__(self) -> None:
        self.first: list[Problem] = []
        self.count = 0

    def add(self, problems: Iterable[Problem]) -> None:
        for problem in problems:
            self.count += 1
            if len(self.first) < SHOWN:
                self.first.append(problem)


def _chunks(streams: list[SampleStream]) -> Iterator[tuple[int, list[Sample | Problem]]]:
    """Up to CHUNK rows at a time, with the number of their stream."""
    for source, stream in enumerate(streams):
        rows = iter(stream)
        while items := list(islice(rows, CHUNK)):
            yield source, items


def _write_chunk_of(path: Path, source: int, content: bytes) -> None:
    """``write_chunk`` in another process, of what ``fill`` pickled."""
    encoding, items = pickle.loads(content)
    write_chunk(path, source, items, encoding, _tokenizer(encoding.checkpoint_dir, encoding.tokenizer))


def write_chunk(
    path: Path, source: int, items: list[Sample | Problem], encoding: Encoding, tokenizer: Tokenizer
) -> None:
    """Encode rows of the stream number ``source`` and write them: what ``_read_chunk`` gives, then the tokens.

    A token is an int32: its id, or ``~id``, which is negative, where it is to be predicted.
    """
    rows, texts, problems = [], [], []
    tokens, labelled = array("i"), bytearray()
    for item in items:
        if isinstance(item, Problem):
            problems.append(item)
            continue
        try:
            example = encode_sample(item, encoding.style, tokenizer, encoding.mask_prompt)
            check_ids(example.input_ids, encoding.vocab_size, tokenizer)
        except InputError as error:
            problems.append(Problem(item.place, str(error)))
            continue
        ids, mask = example.input_ids, example.labels_mask
        n_kept = example.n_kept(encoding.max_seq_length)
        learned = list(compress(ids, mask)) if encoding.quality else None
        lengths = len(ids), example.n_prompt, example.n_needed, n_kept, mask[:n_kept].count(True)
        kinds = is_text(item.messages), find_template(item.messages, encoding.style, tokenizer)
        rows.append((source, item.row, *lengths, *kinds, *measure(item.messages, learned)))
        texts.append(item.messages)
        tokens.fromlist(ids)
        labelled += bytes(mask)
    buffer = io.BytesIO()
    np.save(buffer, np.array(rows, ROW))
    np.save(buffer, signatures(texts) if encoding.near else np.empty((len(rows), 0), np.uint32))
    told = json.dumps([vars(problem) for problem in problems], default=str)
    np.save(buffer, np.frombuffer(told.encode(), np.uint8))
    ids, mask = np.frombuffer(tokens, np.int32), np.frombuffer(labelled, bool)
    np.save(buffer, np.where(mask, ~ids, ids))
    write_atomically(path, buffer.getvalue())


def _read_chunk(path: Path) -> tuple[np.ndarray, np.ndarray, list[Problem]]:
    """All that is in a chunk but the tokens: rows, signatures and problems."""
    with path.open("rb") as file:
        rows, found, told = np.load(file), np.load(file), np.load(file)
    return rows, found, [Problem(**problem) for problem in json.loads(told.tobytes())]


@lru_cache(maxsize=1)
def _tokenizer(checkpoint_dir: Path, fingerprint: str) -> Tokenizer:
    tokenizer = Tokenizer(checkpoint_dir)
    if tokenizer.fingerprint != fingerprint:
        raise InputError(f"the tokenizer in {checkpoint_dir} has changed meanwhile; run the command again")
    return tokenizer
