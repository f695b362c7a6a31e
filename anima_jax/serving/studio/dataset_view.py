"""A data set as training will use it: its pictures with captions, buckets and crops, and what is left out and why.

Everything is found by the code that training runs (`data.sources`, `data.examples`, `data.batch_plan`), so the answers
are the same. Nothing is written but captions that are edited.
"""

import collections
import contextlib
import dataclasses
import functools
import hashlib
import logging
import os
import re
import threading
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Any, Literal

import jax

from anima_jax.checkpoints.locations import is_remote
from anima_jax.config.dataset import DatasetConfig, DirectorySource, Source
from anima_jax.config.load import load_config, load_dataset
from anima_jax.config.main import MainConfig
from anima_jax.config.sizes import Size
from anima_jax.config.syntax import read_toml
from anima_jax.data.batch_plan import BatchPlan, Tier, describe, make_tiers
from anima_jax.data.captions import Captions
from anima_jax.data.dataset import index_path, most_frequent_tags
from anima_jax.data.examples import Example, examples_of, reader_of
from anima_jax.data.file_index import Entry, FileIndex
from anima_jax.data.images import set_up_pillow
from anima_jax.data.problems import Problems
from anima_jax.data.sources import Candidate, SourceReader, inspect, read_entries
from anima_jax.errors import UserError, one_line
from anima_jax.parallel.mesh import replicas, resolve_sizes
from anima_jax.text.tokenizers import TRAINING_LENGTH, load_tokenizers
from anima_jax.training.run import Run

log = logging.getLogger(__name__)

PLAIN_FOLDER = {"resolutions": [1024], "enable_ar_bucket": True, "min_ar": 0.5, "max_ar": 2.0, "num_ar_buckets": 9}
"""How a folder without a TOML is shown."""

THREADS = 2
"""That read files: the engine needs the processors, too."""

SetKind = Literal["training", "dataset", "folder"]
State = Literal["reading", "ready", "failed"]


@dataclasses.dataclass(eq=False)
class PictureRecord:
    """An image or video of the data set, trained or left out."""

    id: str
    source: int
    candidate: Candidate
    captions: Captions = Captions()
    entry: Entry | None = None
    left_out: str = ""
    """Why it is not trained, "" if it is."""
    notes: tuple[str, ...] = ()
    examples: tuple[Example, ...] = ()

    @property
    def version(self) -> str:
        """What changes with its file."""
        return self.entry.digest.hex()[:12] if self.entry else "0"

    @property
    def name(self) -> str:
        """Its file name, or its name in a tar or data set, with escapes for bytes that are not text."""
        return one_line(os.path.basename(self.candidate.media.name))

    @property
    def searched(self) -> str:
        """What a search looks into: its name and captions, without capital letters."""
        return " ".join((self.name, *self.captions.tags, *self.captions.nl)).casefold()

    @property
    def text(self) -> str:
        """Its first caption."""
        return next(iter((*self.captions.tags, *self.captions.nl)), "")


@dataclasses.dataclass(frozen=True)
class Reading:
    """What was found when the data set was last read, and the plan that training would make of it."""

    records: tuple[PictureRecord, ...] = ()
    by_id: dict[str, PictureRecord] = dataclasses.field(default_factory=dict[str, PictureRecord])
    lines: tuple[str, ...] = ()
    """The line of each source in training's log."""
    problems: tuple[str, ...] = ()
    """Files that could not be used, one line each."""


@dataclasses.dataclass(frozen=True)
class TrainingPlan:
    """The examples of an epoch, and how training groups them."""

    examples: tuple[Example, ...] = ()
    tiers: tuple[Tier, ...] = ()
    table: tuple[str, ...] = ()
    """The lines that training prints."""
    steps_of_first_epoch: int = 0
    steps: int = 0
    tags: dict[str, int] = dataclasses.field(default_factory=dict[str, int])
    lengths: dict[str, int] = dataclasses.field(default_factory=dict[str, int])
    """Text → tokens of it, of Qwen3 or T5, whichever are more."""
    error: str = ""


class DatasetView:
    """A data set, read in the background. Its methods may be called from any thread.

    `path` is a dataset TOML, a training TOML, or a folder of images. `tokenizers` is the folder of those that count
    tokens, unless the training TOML names others. Raises UserError if a TOML has errors.
    """

    def __init__(self, path: str | os.PathLike[str], *, tokenizers: str | os.PathLike[str] | None = None):
        self.path = os.fspath(path)
        self.config: MainConfig | None = None
        self.kind, self.data, self.messages = self._load()
        self._tokenizers = load_tokenizers((self.config and self.config.model.tokenizers) or tokenizers)
        self.token_limit = self.config.model.max_caption_tokens if self.config else TRAINING_LENGTH
        self.lock = threading.RLock()
        self.state: State = "reading"
        self.error = ""
        self.version = 0
        """Another number whenever pictures or captions have changed."""
        self.done = 0
        """Files that were looked at in the reading in progress."""
        self.reading, self._plan = Reading(), TrainingPlan()
        self._stale_plan, self._again = True, False
        self._lengths: dict[str, int] = {}
        self._folders: list[int] = []
        self._indexes: dict[str, FileIndex] = {}
        self.readers: list[SourceReader[Any]] = []
        self._thread: threading.Thread | None = None
        self._planning = threading.Lock()
        self.read()

    # ---- configuration ----------------------------------------------------------------------------------------------

    def _load(self) -> tuple[SetKind, DatasetConfig, tuple[str, ...]]:
        if os.path.isdir(self.path):
            table = {"directory": [{"path": os.path.abspath(self.path), **PLAIN_FOLDER}]}
            return "folder", DatasetConfig.model_validate(table), ()
        if os.path.lexists(self.path) and not {"directory", "tfds"}.isdisjoint(read_toml(self.path)):
            return "dataset", *load_dataset(self.path)
        self.config = load_config(self.path, i_know_what_i_am_doing=True)
        return "training", self.config.data, self.config.messages

    @property
    def batch_size_of(self) -> Callable[[Size], int]:
        """Size → number of examples of a step on this machine, 1 without a training TOML."""
        if self.config is None:
            return lambda size: 1
        try:
            number = replicas(resolve_sizes(self.config.mesh.sizes, jax.device_count()))
        except UserError:  # a mesh of another machine
            number = 1
        return Run(self.config, number).global_batch

    def roots(self, source: int) -> list[str]:
        """Return the folder of a source, and its captions file: what may be edited."""
        found = self.data.sources[source]
        if not isinstance(found, DirectorySource):
            return []
        return [found.path, *([found.captions_file] if found.captions_file else [])]

    def source_name(self, source: int) -> str:
        """Return the path of a source, or the name of its data set."""
        found = self.data.sources[source]
        return found.path if isinstance(found, DirectorySource) else found.name or found.builder_dir or ""

    # ---- reading ----------------------------------------------------------------------------------------------------

    def read(self) -> None:
        """Read the data set again, in the background; files that did not change are not opened."""
        with self.lock:
            self._again = True
            if self._thread is None or not self._thread.is_alive():
                self.state, self.error = "reading", ""
                self._thread = threading.Thread(target=self._read_all, name="anima data set", daemon=True)
                self._thread.start()

    def wait(self, timeout: float | None = None) -> None:
        """Wait until the data set is read."""
        if (thread := self._thread) is not None:
            thread.join(timeout)

    def read_if_changed(self) -> None:
        """Read the data set again if files were added to one of its folders, or removed."""
        with self.lock:
            if self.state == "ready" and self._folders != self._folder_times():
                self.read()

    def own_change(self) -> None:
        """Do not take files that were just written here for a change from outside."""
        with self.lock:
            self._folders = self._folder_times()
            self._stale_plan = True
            self._again = self._again or self.state == "reading"  # it may have read the file as it was before
            self.version += 1

    def _folder_times(self) -> list[int]:
        times = []
        for source in range(len(self.data.sources)):
            for path in self.roots(source):
                try:
                    times.append(0 if is_remote(path) else os.stat(path).st_mtime_ns)
                except OSError:
                    times.append(-1)
        return times

    def _read_all(self) -> None:
        while True:
            with self.lock:
                if not self._again:
                    return
                self._again, self.state, self.error = False, "reading", ""
            times = self._folder_times()
            try:
                with _without_log():
                    reading, readers = self._read()
                plan = self._planned(reading)
            except Exception as error:
                if not isinstance(error, UserError):
                    log.exception("the data set cannot be read")
                with self.lock:
                    self.state, self.error = "failed", one_line(error)
                continue
            with self.lock:
                self.reading, self.readers, self._plan = reading, readers, plan
                self._folders, self._stale_plan = times, False
                self.state, self.version = "ready", self.version + 1

    def _read(self) -> tuple[Reading, list[SourceReader[Any]]]:
        set_up_pillow()
        self.done = 0
        problems, records, lines, readers = Problems(), list[PictureRecord](), list[str](), list[SourceReader[Any]]()
        for number, source in enumerate(self.data.sources):
            reader, found = reader_of(source, prepare=False), dict[str, PictureRecord]()

            def observe(
                candidate: Candidate,
                result: Entry | UserError | None,
                reasons: Sequence[str],
                number: int = number,
                found: dict[str, PictureRecord] = found,
            ) -> None:
                found[candidate.media.name] = self._record(number, candidate, result, reasons)
                self.done += 1

            entries, line = read_entries(reader, self._index(reader), problems, threads=THREADS, observe=observe)
            if not found:  # a data set that is known to be as it was when it was last read
                for entry in entries:
                    observe(Candidate(entry.media, functools.partial(_captions_of, entry)), entry, ())
            records += found.values()
            lines.append(line)
            readers.append(reader)
        by_id = {record.id: record for record in records}
        return Reading(tuple(records), by_id, tuple(lines), tuple(problems.lines)), readers

    def _index(self, reader: SourceReader[Any]) -> FileIndex:
        """Return what is known of a source's files, from the cache of training or from an earlier reading."""
        path = index_path((self.config and self.config.cache_dir) or reader.cache_dir, reader)
        return self._indexes.setdefault(path, FileIndex(path, keep=False))

    def _record(
        self, source: int, candidate: Candidate, result: Entry | UserError | None, reasons: Sequence[str]
    ) -> PictureRecord:
        key = f"{source}\0{candidate.media.name}".encode("utf-8", "surrogatepass")
        record = PictureRecord(hashlib.sha256(key).hexdigest()[:16], source, candidate)
        self._update(record, result, reasons)
        return record

    def _update(self, record: PictureRecord, result: Entry | UserError | None, reasons: Sequence[str]) -> None:
        record.notes, record.left_out, record.entry, record.examples = tuple(reasons), "", None, ()
        if isinstance(result, Entry):
            record.entry, record.captions = result, Captions(tuple(filter(None, result.captions)), result.nl)
        elif result is None:
            record.captions, record.notes, record.left_out = Captions(), (), reasons[0]
        else:
            name = one_line(record.candidate.media.name)
            folder = f"{os.path.dirname(name)}{os.sep}"
            record.left_out = one_line(result).removeprefix(f"{name}: ").replace(folder, "")
            try:
                record.captions = record.candidate.captions() or Captions()
            except UserError:
                record.captions = Captions()

    def refresh(self, records: Sequence[PictureRecord]) -> None:
        """Read these pictures and their captions again, after an edit, and others that are the same files."""
        names = {record.candidate.media.name for record in records}
        found = records if len(self.readers) == 1 else self.reading.records
        for record in (each for each in found if each.candidate.media.name in names):
            index = self._index(self.readers[record.source])
            source = self.data.sources[record.source]
            self._update(record, *inspect(record.candidate, index, source))
            if record.entry:  # until the next plan, which may leave it out of a share of the data set
                record.examples = tuple(self._examples([record.entry], source, Problems()))
                self._lengths |= self._tokens(text for example in record.examples for text in example.captions)
        self.own_change()

    # ---- plan -------------------------------------------------------------------------------------------------------

    @property
    def last_plan(self) -> TrainingPlan:
        """The plan as it was when it was last made; its `lengths` have those of captions edited since."""
        return self._plan

    def plan(self) -> TrainingPlan:
        """Return the plan that training would make of the pictures and captions as they are now."""
        with self._planning:
            if self._stale_plan and self.state != "reading":
                self._stale_plan = False
                self._plan = self._planned(self.reading)
            return self._plan

    def _examples(self, entries: Sequence[Entry], source: Source, problems: Problems) -> list[Example]:
        each_epoch = bool(self.config and not self.config.model.cache_text_embeddings)
        pairs = self.config.pairs if self.config else ""
        with _without_log():
            return examples_of(entries, source, problems, shuffle_each_epoch=each_epoch, pairs=pairs)

    def _planned(self, reading: Reading) -> TrainingPlan:
        config, problems = self.config, Problems()
        planned = {id(record.entry): record.entry for record in reading.records if record.entry}
        examples, tags = list[Example](), collections.Counter[str]()
        of_entry = collections.defaultdict[int, list[Example]](list)
        for number, source in enumerate(self.data.sources):
            entries = [
                entry
                for record in reading.records
                if record.source == number and (entry := record.entry) and id(entry) in planned
            ]
            own = self._examples(entries, source, problems)
            for example in own:
                of_entry[id(example.entry)].append(example)
            tags.update(most_frequent_tags(own, len(own) * 1000 + 1))
            examples += own
        unplaced = {line[: at.start()]: line[at.end() :] for line in problems.lines for at in re.finditer(": ", line)}
        for record in reading.records:
            if record.entry and id(record.entry) in planned:  # it was not edited meanwhile
                record.examples = tuple(of_entry.get(id(record.entry), ()))
                record.left_out = "" if record.examples else self._why(record, unplaced)
        self._lengths = lengths = self._tokens(text for example in examples for text in example.captions)
        if not examples:
            return TrainingPlan(error="there is nothing to train on: " + "; ".join(reading.lines))
        buckets = [example.bucket for example in examples]
        try:
            tiers = make_tiers(buckets, self.batch_size_of)
        except UserError as error:
            return TrainingPlan(tuple(examples), tags=dict(tags), lengths=lengths, error=one_line(error))
        plan = BatchPlan(tiers, config.seed if config else 0)
        steps = plan.steps_for(config.epochs if config else 1)
        if config and config.max_steps:
            steps = min(steps, config.max_steps)
        table = tuple(describe(tiers, buckets))
        return TrainingPlan(tuple(examples), tuple(tiers), table, plan.steps_for(1), steps, dict(tags), lengths)

    def _why(self, record: PictureRecord, unplaced: dict[str, str]) -> str:
        """Return why an entry has no example."""
        source = self.data.sources[record.source]
        if (found := unplaced.get(one_line(record.candidate.media.name))) is not None:
            return found
        if source.subsample_ratio < 1:
            return f"not in the share of the data set that is used (subsample_ratio = {source.subsample_ratio:g})"
        return f"not in the part of the data set that an epoch uses (num_repeats = {source.num_repeats:g})"

    def _tokens(self, texts: Iterable[str]) -> dict[str, int]:
        """Return text → tokens, counting only those of new texts."""
        wanted, known = list(dict.fromkeys(texts)), self._lengths
        new = [text for text in wanted if text not in known]
        counted = dict[str, int]()
        for start in range(0, len(new), 1024):
            part = new[start : start + 1024]
            counted |= dict(zip(part, map(int, self._tokenizers.lengths(part).max(1)), strict=True))
        return {text: counted[text] if text in counted else known[text] for text in wanted}


@contextlib.contextmanager
def _without_log() -> Iterator[None]:
    """Drop what this thread would log about the data set, which the page shows."""
    own = threading.get_ident()

    def is_of_another(record: logging.LogRecord) -> bool:
        return record.thread != own

    loggers = [logging.getLogger(f"anima_jax.data.{name}") for name in ("examples", "problems", "sources")]
    for logger in loggers:
        logger.addFilter(is_of_another)
    try:
        yield
    finally:
        for logger in loggers:
            logger.removeFilter(is_of_another)


def _captions_of(entry: Entry) -> Captions:
    return Captions(entry.captions, entry.nl)
