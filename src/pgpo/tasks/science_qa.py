r"""Science-QA: the L3 multiple-choice questions of SciKnowEval (arXiv 2406.09098, MIT license), one task per domain.

Split. The questions of a domain, numbered 0..n-1 (`idx`) in the order of the hub's file, are permuted with NumPy's
default_rng(42); the first ceil(n / 10) are the test set, the rest the training set, both in permuted order. That is
what `datasets.Dataset.train_test_split(test_size=0.1, seed=42)` does, and it gives the split files of lasgroup/SDPO.

| domain    | train | test | with two options | answers A/B/C/D in test | score of one letter, test |
|-----------|-------|------|------------------|-------------------------|---------------------------|
| biology   | 450   | 50   | 181 and 19       | 16/19/3/12              | B 38.0 %                  |
| chemistry | 1890  | 210  | 0                | 64/47/57/42             | A 30.5 %                  |
| materials | 841   | 94   | 0                | 30/25/22/17             | A 31.9 %                  |
| physics   | 720   | 80   | 0                | 19/33/14/14             | B 41.2 %                  |

Overlap. One Materials prompt stands in train and test character for character. Other test questions stand in train
with reordered options, or with other wrong options. Questions that have any such copy:

| domain    | in test  | in train |
|-----------|----------|----------|
| biology   | 4 of 50  | 4        |
| chemistry | 0 of 210 | 0        |
| materials | 3 of 94  | 10       |
| physics   | 5 of 80  | 8        |

`find_overlap` lists every pair; science_qa_manifest.json keeps the list. The test set always stays as published, so
that scores compare, and so does the training set unless `drop_overlap=True`. A score that claims generalization
should use that option, or be given with and without the listed test questions.

Stems. Questions may share their text and differ in their options, ten of Biology's test set in one text. They are no
independent questions, so that intervals count a stem as one cluster. Stems in the test sets: Biology 36 of 50
questions, Physics 79 of 80, Materials 93 of 94, Chemistry 210 of 210.

Six training questions of Physics give one text to several letters, three of them (idx 237, 632, 691) the right
option's text. They are kept; a letter with the right option's text is right.
"""

from __future__ import annotations

import hashlib
import json
import math
import os
import warnings
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from importlib import resources
from pathlib import Path
from typing import Any, NamedTuple, TypeVar

import numpy as np

from pgpo.errors import UserError
from pgpo.tasks import Row, Task
from pgpo.tasks.graders import Grade, grade_boxed, grade_tagged
from pgpo.tasks.jsonl import Record, read_jsonl

HUB_DATASET = "hicai-zju/SciKnowEval"
LEVEL = "L3"  # the reasoning level, used by SDPO and PGPO
TYPES = ("mcq-4-choices", "mcq-2-choices")  # lasgroup/SDPO keeps both
SEED = 42  # PGPO and lasgroup/SDPO
TEST_FRACTION = 0.1  # PGPO and lasgroup/SDPO
# Ours: about as many questions as in test, so that selecting is no noisier than the score that is reported.
VALIDATION_FRACTION = 0.1

# Name here -> (value of the column "domain", first part of the split files' names).
DOMAINS = {
    "biology": ("Biology", "biology"),
    "chemistry": ("Chemistry", "chemistry"),
    "materials": ("Material", "material"),
    "physics": ("Physics", "physics"),
}

_SHOWN = 8  # ours: so many kinds of rows that are left out are named

T = TypeVar("T")


@dataclass(frozen=True)
class Question:
    """One multiple-choice question, text for text as published; `answer` is one of `labels`."""

    domain: str
    idx: int
    text: str
    labels: tuple[str, ...]
    options: tuple[str, ...]
    answer: str

    @property
    def digest(self) -> str:
        """SHA-256 of the content without the number, in hexadecimal."""
        content = json.dumps([self.text, self.labels, self.options, self.answer], separators=(",", ":"))
        return hashlib.sha256(content.encode("ascii")).hexdigest()

    @property
    def id(self) -> str:
        """Domain, number and 8 digits of the digest: equal ids mean equal content, whatever the version of the data."""
        return f"{self.domain}-{self.idx}-{self.digest[:8]}"

    @property
    def stem(self) -> str:
        """What questions with the same text share, whatever their options: 8 digits of its SHA-256."""
        return f"{self.domain}-{hashlib.sha256(_plain(self.text).encode()).hexdigest()[:8]}"

    @property
    def with_options(self) -> str:
        """The question and its options, one per line as `A: text`, as in lasgroup/SDPO."""
        return self.text + "\n\n" + "\n".join(f"{label}: {text}" for label, text in zip(self.labels, self.options))


def load(
    domain: str,
    *,
    path: str | os.PathLike[str] | None = None,
    revision: str | None = None,
    style: str = "boxed",
    validation_fraction: float = VALIDATION_FRACTION,
    drop_overlap: bool = False,
    check: bool = True,
) -> Task:
    r"""The task of one domain: "biology", "chemistry", "materials" (or "material") or "physics".

    path, revision, check: see `load_split`. style: "boxed" (the PGPO paper's prompt, answer in \boxed{}) or "sdpo"
    (reasoning and answer tags). validation_fraction: share of the training questions held out for selection; 0 holds
    out none, as the paper does. drop_overlap: leave out the training questions that overlap with the test set; the
    validation set is the same either way.

    Raises UserError for bad options, unreadable or malformed data, and local data that is not the published data.
    """
    if style not in _STYLES:
        raise UserError(f"Unknown prompt style {style!r}; choose one of {', '.join(_STYLES)}.")
    train, test = load_split(domain, path=path, revision=revision, check=check)
    rest, validation = hold_out(train, test, validation_fraction)
    if drop_overlap:
        overlapping = {pair.train_id for pair in find_overlap(train, test)}
        rest = [question for question in rest if question.id not in overlapping]
    write_prompt, grade = _STYLES[style]
    train_rows, validation_rows, test_rows = (
        [_row(question, write_prompt) for question in questions] for questions in (rest, validation, test)
    )
    return Task("science_qa", train_rows, validation_rows, test_rows, grade)


def load_split(
    domain: str,
    *,
    path: str | os.PathLike[str] | None = None,
    revision: str | None = None,
    check: bool = True,
) -> tuple[list[Question], list[Question]]:
    """The training and test questions of one domain, in order, before a validation set is held out.

    path: a folder with `physics-train.jsonl`, `physics-test.jsonl` and so on (`material-...` for materials); or a JSONL
    file, or a folder of such files read in the order of their names, with unsplit questions in the columns of the hub,
    which are then split. Without path the hub's dataset is loaded at `revision` (its newest by default).
    check: compare with the manifest. A local copy that differs is an error, because it is meant to be the published
    data. A hub version that differs is a warning, because its owners may correct a question. With False (for your own
    questions) there is neither.
    Rows of unsplit data that are left out (another spelling of the domain, another type or level) are counted in a
    warning, or in the error, unless what remains is the published data.

    Raises UserError.
    """
    domain = _known_domain(domain)
    if path is None:
        place = f"{HUB_DATASET} at revision {revision or 'main'}"
        train, test, left_out = _from_hub(domain, revision, place)
    elif revision is None:
        place = str(path)
        train, test, left_out = _from_path(domain, Path(path).expanduser())
    else:
        raise UserError(f"revision={revision!r} is for the hub but path={str(path)!r} is given too; pass only one.")
    number, uses = Counter(question.idx for question in train + test).most_common(1)[0]
    if uses > 1:
        raise UserError(f'{place}: {uses} {domain} questions have "idx" {number}; give each its own number.')
    differences = check_manifest(domain, train, test) if check else []
    if differences:
        finding = f"The {domain} questions of {place} are not the published ones: {'; '.join(differences)}"
        if left_out.any_of_ours:
            finding += f"; left out: {left_out}"
        if path is not None:
            raise UserError(f"{finding}; restore the files, or pass check=False to use them as they are.")
        warnings.warn(f"{finding}; scores will not compare, so pin revision= or pass path=.", stacklevel=2)
    elif left_out.any_of_ours and not check:
        warnings.warn(
            f"{place}: {len(train) + len(test)} {domain} questions are used, {left_out.total()} rows are left out, "
            f"because only domain {DOMAINS[domain][0]!r}, level {LEVEL!r} and type {' or '.join(map(repr, TYPES))} "
            f"count here: {left_out}.",
            stacklevel=2,
        )
    return train, test


def split(rows: Sequence[T]) -> tuple[list[T], list[T]]:
    """(train, test): 90/10 with seed 42, as `datasets.Dataset.train_test_split(test_size=0.1, seed=42)` splits.

    Raises UserError for fewer than two rows.
    """
    if len(rows) < 2:
        raise UserError(f"There is only {len(rows)} question to split into train and test; give at least 2.")
    order = np.random.default_rng(SEED).permutation(len(rows))
    test_size = math.ceil(TEST_FRACTION * len(rows))
    return [rows[i] for i in order[test_size:]], [rows[i] for i in order[:test_size]]


def hold_out(
    train: Sequence[Question], test: Sequence[Question], fraction: float = VALIDATION_FRACTION
) -> tuple[list[Question], list[Question]]:
    """Hold out ceil(fraction * len(train)) questions for validation: (rest, validation), both in the order of train.

    Only questions that overlap (see `Overlap`) neither with a test question nor with another training question are
    eligible: otherwise selecting on them would peek at the test set, or reward memorizing the training set. The
    eligible ones whose SHA-256 together with the seed is smallest are taken; unlike a random permutation that depends
    neither on the order of the questions nor on the version of a generator.

    Raises UserError for a fraction outside [0, 1) or one that asks for more than the eligible questions.
    """
    if not 0 <= fraction < 1:
        raise UserError(f"validation_fraction={fraction} is not in [0, 1); {VALIDATION_FRACTION} is the default.")
    uses = Counter(key for question in [*train, *test] for key in _overlap_keys(question))
    eligible = [question for question in train if all(uses[key] == 1 for key in _overlap_keys(question))]
    size = math.ceil(fraction * len(train))
    if size > len(eligible):
        raise UserError(
            f"validation_fraction={fraction} asks for {size} of {len(train)} training questions, "
            f"but only {len(eligible)} have no copy in train or test; lower it."
        )
    lottery = {question.id: hashlib.sha256(f"{SEED}:{question.digest}".encode()).hexdigest() for question in eligible}
    chosen = set(sorted(lottery, key=lambda id: lottery[id])[:size])
    rest = [question for question in train if question.id not in chosen]
    return rest, [question for question in train if question.id in chosen]


class Overlap(NamedTuple):
    """A training and a test question with the same question text, ignoring case and spacing.

    kind "prompt": the same options too, character for character. "options": the same options in another order, case
    or spacing. "answer": other wrong options, but the same text of the right one.
    """

    train_id: str
    test_id: str
    kind: str


def find_overlap(train: Sequence[Question], test: Sequence[Question]) -> list[Overlap]:
    """Every overlapping pair of a training and a test question, in the order of test, then of train."""
    train_keys = [_overlap_keys(question) for question in train]
    pairs = []
    for tested in test:
        same_options, same_answer = _overlap_keys(tested)
        for trained, keys in zip(train, train_keys):
            if same_options in keys:
                same_prompt = trained.with_options == tested.with_options
                pairs.append(Overlap(trained.id, tested.id, "prompt" if same_prompt else "options"))
            elif same_answer in keys:
                pairs.append(Overlap(trained.id, tested.id, "answer"))
    return pairs


def _overlap_keys(question: Question) -> tuple[tuple[str, ...], tuple[str, ...]]:
    """Two questions overlap if they have one of these in common: text and option set, or text and right option."""
    text = _plain(question.text)
    right_option = question.options[question.labels.index(question.answer)]
    return ("options", text, *sorted(map(_plain, question.options))), ("answer", text, _plain(right_option))


def _plain(text: str) -> str:
    """The text without what case and spacing tell."""
    return " ".join(text.split()).casefold()


# Prompts: one writer and one grader per style.


def _row(question: Question, write_prompt: Callable[[Question], list[dict[str, str]]]) -> Row:
    return {
        "id": question.id,
        "prompt": write_prompt(question),
        "answer": question.answer,
        "domain": question.domain,
        "stem": question.stem,
        "labels": list(question.labels),
        "options": list(question.options),
    }


def _boxed_prompt(question: Question) -> list[dict[str, str]]:
    """The student's prompt of the PGPO paper; its `{question}` includes the options."""
    instruction = r"Please reason step by step, and put your final answer within \boxed{}."
    return [{"role": "user", "content": f"{question.with_options}\n{instruction}"}]


def _sdpo_prompt(question: Question) -> list[dict[str, str]]:
    """SDPO's answer format in our words; it names the letters that the question really has."""
    letters = f"{', '.join(question.labels[:-1])} or {question.labels[-1]}"
    system = (
        "You are given a multiple-choice question. Work out the answer inside <reasoning> tags. Then give the letter "
        f"of the right option ({letters}) inside <answer> tags, with nothing else in them and nothing after them:\n"
        "<reasoning>\nyour step-by-step reasoning\n</reasoning>\n<answer>\nthe letter\n</answer>"
    )
    user = f"{question.with_options}\nPlease reason step by step."
    return [{"role": "system", "content": system}, {"role": "user", "content": user}]


def _graded_by(grader: Callable[..., Grade]) -> Callable[[str, Row], Grade]:
    def grade(completion: str, row: Row) -> Grade:
        return grader(
            completion,
            row["answer"],
            row["labels"],
            options=row.get("options"),
            opened=row.get("thinking_opened", False),
        )

    return grade


_STYLES = {"boxed": (_boxed_prompt, _graded_by(grade_boxed)), "sdpo": (_sdpo_prompt, _graded_by(grade_tagged))}


# Manifest: what the published data looks like.


def build_manifest(folder: str | os.PathLike[str]) -> dict[str, Any]:
    """What science_qa_manifest.json holds: counts, hashes and overlap of the split files of all domains in `folder`."""
    domains = {}
    for domain in DOMAINS:
        train, test = load_split(domain, path=folder, check=False)
        overlap = [list(pair) for pair in find_overlap(train, test)]
        domains[domain] = {"train": _facts(train), "test": _facts(test), "overlap": overlap}
    return {"dataset": HUB_DATASET, "level": LEVEL, "seed": SEED, "test_fraction": TEST_FRACTION, "domains": domains}


def read_manifest() -> dict[str, Any]:
    """The manifest of the published data, from the package's own files."""
    text = resources.files("pgpo.tasks").joinpath("science_qa_manifest.json").read_text(encoding="utf-8")
    manifest: dict[str, Any] = json.loads(text)
    return manifest


def check_manifest(domain: str, train: Sequence[Question], test: Sequence[Question]) -> list[str]:
    """How the questions differ from the published ones: a clause per differing split, an empty list if they do not."""
    published = read_manifest()["domains"][_known_domain(domain)]
    differences = []
    for name, questions in (("train", train), ("test", test)):
        found, expected = _facts(questions), published[name]
        if any(found[count] != expected[count] for count in ("questions", "two_options")):
            differences.append(
                f"{name} has {found['questions']} questions ({found['two_options']} with two options) "
                f"instead of {expected['questions']} ({expected['two_options']})"
            )
        elif found["sha256"] != expected["sha256"]:
            differences.append(
                f"{name} has as many questions as it should, but their content or order differs "
                f"(sha256 {found['sha256'][:12]} instead of {expected['sha256'][:12]})"
            )
    return differences


def _facts(questions: Sequence[Question]) -> dict[str, Any]:
    content = "\n".join(f"{question.idx} {question.digest}" for question in questions)
    return {
        "questions": len(questions),
        "two_options": sum(len(question.labels) == 2 for question in questions),
        "answers": dict(sorted(Counter(question.answer for question in questions).items())),
        "sha256": hashlib.sha256(content.encode("ascii")).hexdigest(),
    }


# Reading: records with the place where they stand -> validated questions.


class _LeftOut(Counter[tuple[str, str]]):
    """Rows that are not asked for: (column, its value) -> how many."""

    @property
    def any_of_ours(self) -> bool:
        """Whether there are others than those of the other science domains, which nobody misses."""
        other_domains = {("domain", published) for published, _ in DOMAINS.values()}
        return not self.keys() <= other_domains

    def __str__(self) -> str:
        shown = [f"{count} of {column} {value!r:.40}" for (column, value), count in self.most_common(_SHOWN)]
        rest = sum(self.values()) - sum(count for _, count in self.most_common(_SHOWN))
        return ", ".join(shown + [f"{rest} of others"] * (rest > 0))


def _known_domain(domain: str) -> str:
    name = str(domain).lower()
    name = "materials" if name == "material" else name
    if name not in DOMAINS:
        raise UserError(f"Unknown science domain {domain!r}; choose one of {', '.join(DOMAINS)}.")
    return name


def _from_hub(domain: str, revision: str | None, place: str) -> tuple[list[Question], list[Question], _LeftOut]:
    try:
        import datasets  # slow to import, and not needed for local files

        table = datasets.load_dataset(HUB_DATASET, split="test", revision=revision)
    except Exception as error:  # no network, unknown revision, broken cache: these share no base class
        reason = f"{type(error).__name__}: {error}".strip().splitlines()[0]
        raise UserError(
            f"Cannot load {place} from the Hugging Face hub ({reason}); "
            "check the network and the revision, or pass path= (--data_path) with a local copy."
        ) from error
    return _split_wanted(domain, [Record(row, f"{place}, row {i}") for i, row in enumerate(table)], place)


def _from_path(domain: str, path: Path) -> tuple[list[Question], list[Question], _LeftOut]:
    try:
        exists = path.exists()
    except OSError as error:  # such as a name that is too long
        raise UserError(f"{str(path)[:60]!r} cannot be read ({error.strerror}); check the path.") from error
    if not exists:
        raise UserError(f"There is no file or folder {path}; pass path= with the SciKnowEval files.")
    if path.is_file():
        if _is_split_file(path):
            raise UserError(f"{path} is one file of a split; pass the folder that holds both, {path.parent}.")
        return _split_wanted(domain, list(read_jsonl(path)), str(path))
    files = sorted(path.glob("*.jsonl"))
    if not files:
        raise UserError(f"The folder {path} holds no .jsonl file; pass path= with the SciKnowEval files.")
    if not any(map(_is_split_file, files)):
        return _split_wanted(domain, [record for file in files for record in read_jsonl(file)], str(path))
    pair = [path / f"{DOMAINS[domain][1]}-{name}.jsonl" for name in ("train", "test")]
    missing = [file.name for file in pair if not file.is_file()]
    if missing:
        raise UserError(f"The folder {path} lacks {' and '.join(missing)}; add what is missing.")
    train, test = ([_from_split_file(domain, record) for record in read_jsonl(file)] for file in pair)
    return train, test, _LeftOut()


def _is_split_file(file: Path) -> bool:
    return file.name.endswith(("-train.jsonl", "-test.jsonl"))


def _from_split_file(domain: str, record: Record) -> Question:
    if _unwanted(domain, record):
        raise UserError(
            f"{record.where}: not of domain {DOMAINS[domain][0]}, level {LEVEL} and type {' or '.join(TYPES)}; "
            "remove it from this file."
        )
    return _question(domain, _number(record), record)


def _split_wanted(
    domain: str, records: Sequence[Record], place: str
) -> tuple[list[Question], list[Question], _LeftOut]:
    """(train, test) of the wanted questions, and what is left out. The questions are in order: by "idx" where all have
    one, else as they stand, numbered from 0."""
    wanted, left_out = [], _LeftOut()
    for record in records:
        if (reason := _unwanted(domain, record)) is None:
            wanted.append(record)
        else:
            left_out[reason] += 1
    if not wanted:
        raise UserError(
            f"{place} holds no question of domain {DOMAINS[domain][0]}, level {LEVEL} and type {' or '.join(TYPES)}, "
            f"but {left_out}; pass path= with a file that does, or correct the spelling."
        )
    if all("idx" in record.columns for record in wanted):
        questions = [_question(domain, _number(record), record) for record in sorted(wanted, key=_number)]
    else:
        questions = [_question(domain, position, record) for position, record in enumerate(wanted)]
    return *split(questions), left_out


def _unwanted(domain: str, record: Record) -> tuple[str, str] | None:
    """The column that tells that a row is not asked for, and its value; None for a wanted row."""
    if (found := _column(record, "domain", str)) != DOMAINS[domain][0]:
        return "domain", found
    if (found := _column(record, "type", str)) not in TYPES:
        return "type", found
    details = _column(record, "details", dict)
    if "level" not in details:
        raise UserError(f'{record.where}: column "details" has no "level"; make it like {{"level": "{LEVEL}"}}.')
    return None if details["level"] == LEVEL else ("level", str(details["level"]))


def _question(domain: str, idx: int, record: Record) -> Question:
    where = record.where
    text = _column(record, "question", str)
    choices = _column(record, "choices", dict)
    answer = _column(record, "answerKey", str)
    labels, options = choices.get("label"), choices.get("text")
    if not text.strip():
        raise UserError(f'{where}: column "question" is blank; write the question there.')
    if not _is_list_of_texts(labels) or not _is_list_of_texts(options) or not len(labels) == len(options) >= 2:
        raise UserError(f'{where}: column "choices" must have two or more texts in "label" and as many in "text".')
    if not all(len(label) == 1 and "A" <= label <= "Z" for label in labels):
        raise UserError(f"{where}: the option labels are {labels!s:.60}; make each one capital letter.")
    if len(set(labels)) < len(labels):
        raise UserError(f"{where}: the option labels {labels!s:.60} repeat a letter; give each option its own.")
    if answer not in labels:
        raise UserError(
            f"{where}: answerKey {answer!r:.60} is not among the option labels {labels!s:.60}; correct one of them."
        )
    return Question(domain, idx, text, tuple(labels), tuple(options), answer)


def _number(record: Record) -> int:
    number: int = _column(record, "idx", int)
    if number < 0 or isinstance(number, bool):
        raise UserError(f'{record.where}: column "idx" is {number!r}; make it a whole number from 0.')
    return number


def _column(record: Record, name: str, kind: type) -> Any:
    if name not in record.columns:
        found = ", ".join(record.columns)
        raise UserError(f'{record.where}: no column "{name}" among {found:.200}; use the columns of {HUB_DATASET}.')
    value = record.columns[name]
    if not isinstance(value, kind):
        expected = {str: "a text", int: "a whole number", dict: "an object"}[kind]
        raise UserError(f'{record.where}: column "{name}" is {value!r:.60}; make it {expected}.')
    return value


def _is_list_of_texts(value: Any) -> bool:
    return isinstance(value, list) and all(isinstance(item, str) and item.strip() for item in value)
